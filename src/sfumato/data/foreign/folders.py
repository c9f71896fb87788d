"""Where a data set's pictures lie, as far as they are on this machine, and what lies there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfumato.data.images import SUFFIXES
from sfumato.data.listing import REPEATS


def spelt(path: Any) -> Path:
    """A path as the other tool has it, Windows' too."""
    return Path(str(path).replace("\\", "/"))


def find(path: Any, source: Path) -> Path | None:
    """Where it lies: beside the config, in `source`, or below the present folder; tools count from where they are
    started, which may be either."""
    return next((place / spelt(path) for place in (source, Path.cwd()) if (place / spelt(path)).exists()), None)


def relative(path: Any, source: Path, home: Path, notes: list[str]) -> str:
    """The folder as seen from `home`, to which a path is relative where it can be."""
    found = spelt(path)
    if found.is_absolute():
        return found.as_posix()
    there = find(path, source)
    if there is None:
        notes.append(
            f"{found.as_posix()}: neither beside the config nor below the present folder; a dataset.toml counts from "
            "its own folder, so mend this path in it"
        )
        return found.as_posix()
    try:
        return there.resolve().relative_to(home).as_posix()
    except ValueError:
        return there.resolve().as_posix()


def with_pictures(path: Any, source: Path) -> list[str]:
    """The folder and those below it, as far as they hold pictures, but no hidden ones; itself if there are none.

    A dataset.toml names each, where other tools look into all that is below.
    """
    if (there := find(path, source)) is None:
        return [str(path)]
    below = [place.relative_to(there).as_posix() for place in _walk(there)]
    return [(spelt(path) / name).as_posix() for name in below] or [str(path)]


def _walk(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()  # a link may lead back
    for place, below, files in os.walk(folder, followlinks=True):
        below[:] = [] if os.path.realpath(place) in seen else sorted(name for name in below if not name.startswith("."))
        if os.path.realpath(place) not in seen and any(Path(name).suffix.lower() in SUFFIXES for name in files):
            yield Path(place)
        seen.add(os.path.realpath(place))


def notes_on(path: str, source: Path) -> Iterator[str]:
    """What a folder holds that is read otherwise here."""
    for entry in _entries(path, source):
        if entry.is_dir() and REPEATS.fullmatch(entry.name):
            yield (
                f"{path}: holds {entry.name}, whose name says repeats here, so that images beside it are left out; "
                "rename it"
            )
            break


def of_several_lines(path: str, source: Path) -> list[str]:
    """The names of the folder's captions that have several lines."""
    texts = (entry for entry in _entries(path, source) if entry.match("[!.]*.txt") and entry.is_file())
    return [entry.name for entry in texts if _lines(entry) > 1]


def _entries(path: str, source: Path) -> list[Path]:
    there = find(path, source)
    return sorted(there.iterdir()) if there is not None and there.is_dir() else []


def _lines(file: Path) -> int:
    return sum(bool(line.strip()) for line in file.read_bytes().split(b"\n"))
