"""What every tool's config needs: reading it, its settings one by one, and what is left of it for a note.

Where a data set's pictures lie, as far as they are on this machine, and what lies there.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Container, Iterator, Mapping, Sequence
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Any

from sfumato.data.captions import CAPTION_SUFFIXES
from sfumato.data.images import SUFFIXES
from sfumato.data.listing import REPEATS_PATTERN
from sfumato.errors import ConfigError
from sfumato.utils.text_files import decode_text

Sources = list[dict[str, Any]]
"""Keys and values of each [[source]], in the order of datasets/README.md."""
BY_THE_BASE = (
    "its images are learned as those of a class, beside each batch and at --prior-weight; to learn what the base "
    "predicts instead, leave them out and pass their captions as --prior-prompts"
)
OF_TRAINING = (
    "settings of the training itself are not converted; sfumato recipe converts them, and the images with them"
)
FROM_NAMES = (
    "spaces stand for - and _ in names of files, and a .txt or metadata.jsonl beside the images comes before them; "
    "move it away"
)


def read_settings(path: Path) -> Any:
    """The file's values, without those that name nothing. Raises ConfigError for what is no TOML, YAML or JSON."""
    return without_empty(read_values(path))


def read_values(path: Path) -> Any:
    """The file's values. Raises ConfigError for what is no TOML, YAML or JSON."""
    try:
        text = decode_text(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Name the config of the other tool.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not readable as text (not UTF-8). Save it as UTF-8.") from None
    try:
        if path.suffix.lower() == ".toml":
            return tomllib.loads(text)
        if path.suffix.lower() == ".json":
            return json.loads(text)
        if path.suffix.lower() in (".yaml", ".yml"):
            return _yaml(text)
        raise ConfigError(
            f"{path.name}: wanted kohya's .toml or .json, ai-toolkit's .yaml or .json, or OneTrainer's or "
            "SimpleTuner's .json."
        )
    except ConfigError:
        raise
    except Exception as error:  # each parser has its own
        raise ConfigError(f"{path.name}: cannot be parsed ({' '.join(str(error).split())[:120]}). Mend it.") from None


def _yaml(text: str) -> Any:
    import yaml

    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise ValueError("it has aliases, *name")  # no tool writes them, and a few lines of them grow to gigabytes
    return yaml.safe_load(text)


def without_empty(values: Any) -> Any:
    """The settings without those that name nothing, as a YAML file's `keep_tokens:` does: they are as if left out."""
    if isinstance(values, dict):
        return {key: without_empty(value) for key, value in values.items() if value is not None}
    return [without_empty(value) for value in values] if isinstance(values, list) else values


def check_tables(values: Any, name: str) -> list[dict[str, Any]]:
    """The list's entries. Raises ConfigError for one that is no table of settings."""
    if not isinstance(values, list):
        raise ConfigError(f"{name} is {values!r:.40}; wanted a list of tables.")
    for value in values:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} holds {value!r:.40}; wanted a table of settings.")
    return values


def parsed_scalars(own: Mapping[str, Any], texts: Container[str]) -> dict[str, Any]:
    """The settings with numbers and yes or no as such, where a program saved its fields as texts: "0.1", "true"."""
    return {key: value if key in texts else _scalar(value) for key, value in own.items()}


def _scalar(value: Any) -> Any:
    try:
        return json.loads(value.lower()) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def int_setting(own: Mapping[str, Any], key: str) -> int:
    """The setting as a whole number, 0 if unset."""
    if not isinstance(value := own.get(key, 0), int) or isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r:.40}; wanted a whole number.")
    return value


def unused_notes(own: Mapping[str, Any], used: Container[str], elsewhere: Mapping[str, str]) -> Iterator[str]:
    """A note on each setting that is not taken. elsewhere: what does for it here."""
    for key, value in own.items():
        if key in elsewhere:
            yield f"{key} = {value}: {elsewhere[key]}"
        elif key not in used and value not in (None, False, "", [], {}, 0):
            yield f"{key} = {value}: has no counterpart here and is left out"


_NEUTRAL: Mapping[str, Any] = {
    **{"repeats": 1, "class": False, "validation": False, "words": "", "caption": None, "trigger": None},
    **{"caption_suffix": None, "caption_lines": False, "wildcards": False, "shuffle_tags": False, "keep_tags": 0},
    **{"separator": ",", "keep_tags_separator": "|||", "secondary_separator": "", "caption_dropout": 0},
    **{"tag_dropout": 0, "resolution": None, "flip": False, "crop": "center", "mask": "none", "weight": 1},
}
"""The value of each key of a source with which it changes nothing."""


def non_default(**values: Any) -> dict[str, Any]:
    """The values that are not the defaults of a source, in the order of datasets/README.md."""
    return {key: value for key, value in values.items() if key == "path" or value != _NEUTRAL[key]}


def resolution_key(sides: Sequence[int]) -> int | list[int] | None:
    """The key `resolution` of a source whose images are learned at these sizes; None for none."""
    each = list(dict.fromkeys(sides))
    return each if len(each) > 1 else each[0] if each else None


def caption_suffix(own: Mapping[str, Any], key: str) -> str | None:
    """The ending that a setting names, unless it is looked for first anyway."""
    if not (extension := own.get(key)):
        return None
    if not isinstance(extension, str):
        raise ConfigError(f"{key} is {extension!r:.40}; wanted the ending of captions' names, such as .txt.")
    extension = extension if extension.startswith(".") else f".{extension}"
    return None if extension.lower() == CAPTION_SUFFIXES[0] else extension


_MOST_EPOCHS = 10_000
"""Of the other tool in one here."""


def with_whole_repeats(entries: Sources, tool: str, notes: list[str]) -> Sources:
    """The sources with whole repeats in the proportions of those they have, which may be fractions; those that are held
    out come once."""
    shares = [Fraction(1 if entry.get("validation") else entry.get("repeats", 1)) for entry in entries]
    many = lcm(*(share.denominator for share in shares))
    if many > _MOST_EPOCHS:
        least = min(
            share for share, entry in zip(shares, entries, strict=True) if share and not entry.get("validation")
        )
        notes.append(f"repeats are whole numbers, in nearly {tool}'s proportions, of which the least is 1 here")
        repeats = [round(share / least) for share in shares]
    else:
        repeats = [int(share * many) for share in shares]
        if many > 1:
            notes.append(f"repeats are whole numbers, so that an epoch here is {many} of {tool}'s")
    return [
        non_default(**{**entry, "repeats": 1 if entry.get("validation") else count})
        for entry, count in zip(entries, repeats, strict=True)
    ]


def normalize_path(path: Any) -> Path:
    """A path as the other tool has it, Windows' too."""
    return Path(str(path).replace("\\", "/"))


def find_folder(path: Any, source: Path) -> Path | None:
    """Where it lies: beside the config, in `source`, or below the present folder; tools count from where they are
    started, which may be either."""
    return next(
        (place / normalize_path(path) for place in (source, Path.cwd()) if (place / normalize_path(path)).exists()),
        None,
    )


def relative_folder(path: Any, source: Path, home: Path, notes: list[str]) -> str:
    """The folder as seen from `home`, to which a path is relative where it can be."""
    found = normalize_path(path)
    if found.is_absolute():
        return found.as_posix()
    there = find_folder(path, source)
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


def folders_with_pictures(path: Any, source: Path) -> list[str]:
    """The folder and those below it, as far as they hold pictures, but no hidden ones; itself if there are none.

    A dataset.toml names each, where other tools look into all that is below.
    """
    if (there := find_folder(path, source)) is None:
        return [str(path)]
    below = [place.relative_to(there).as_posix() for place in _walk(there)]
    return [(normalize_path(path) / name).as_posix() for name in below] or [str(path)]


def _walk(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()  # a link may lead back
    for place, below, files in os.walk(folder, followlinks=True):
        below[:] = [] if os.path.realpath(place) in seen else sorted(name for name in below if not name.startswith("."))
        if os.path.realpath(place) not in seen and any(Path(name).suffix.lower() in SUFFIXES for name in files):
            yield Path(place)
        seen.add(os.path.realpath(place))


def folder_notes(path: str, source: Path) -> Iterator[str]:
    """What a folder holds that is read otherwise here."""
    for entry in _entries(path, source):
        if entry.is_dir() and REPEATS_PATTERN.fullmatch(entry.name):
            yield (
                f"{path}: holds {entry.name}, whose name says repeats here, so that images beside it are left out; "
                "rename it"
            )
            break


def multiline_captions(path: str, source: Path) -> list[str]:
    """The names of the folder's captions that have several lines."""
    texts = (entry for entry in _entries(path, source) if entry.match("[!.]*.txt") and entry.is_file())
    return [entry.name for entry in texts if _lines(entry) > 1]


def _entries(path: str, source: Path) -> list[Path]:
    there = find_folder(path, source)
    return sorted(there.iterdir()) if there is not None and there.is_dir() else []


def _lines(file: Path) -> int:
    return sum(bool(line.strip()) for line in file.read_bytes().split(b"\n"))
