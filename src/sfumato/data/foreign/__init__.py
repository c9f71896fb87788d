"""Other tools' data set configs -> a dataset.toml, a file a tool.

What has a meaning here is converted; every other setting that is not at its neutral value is named in a note, never
dropped in silence. Each tool's `sources(values, folder, notes)` is handed the config's values and the folder that it
lies in, adds to the notes, and gives None for a config that is another tool's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.data.foreign import ai_toolkit, kohya
from sfumato.data.foreign.settings import Sources, read, relative
from sfumato.data.source import check_keys, source_of
from sfumato.errors import ConfigError

_TOOLS: Mapping[str, Callable[[Any, Path, list[str]], Sources | None]] = MappingProxyType(
    {
        "kohya": kohya.sources,
        "ai-toolkit": ai_toolkit.sources,
    }
)


@dataclass(frozen=True)
class Converted:
    """text: of the dataset.toml. sources: how many it names. notes: what could not be carried over, and why."""

    text: str
    sources: int
    tool: str
    notes: tuple[str, ...]


def convert(path: Path, target: Path | None = None) -> Converted:
    """The config at `path` as a dataset.toml that lies at `target` (beside `path` if None), to which its paths are
    relative where they can be. Raises ConfigError for a file that is no tool's."""
    values = read(path)
    folder, home = path.resolve().parent, (target or path).resolve().parent
    notes: list[str] = []
    read_by = ((tool, sources(values, folder, notes)) for tool, sources in _TOOLS.items())
    tool, entries = next(((tool, found) for tool, found in read_by if found is not None), ("", None))
    if entries is None:
        raise ConfigError(
            f"{path.name}: neither kohya's [[datasets]] or train_data_dir nor ai-toolkit's config.process[].datasets "
            "is in it. Name such a config; datasets/README.md says how a dataset.toml is written by hand."
        )
    for number, entry in enumerate(entries, start=1):
        where = f"{path.name}, its data set {number}: "
        check_keys(entry, where)
        if entry.get("repeats", 1) < 1:  # which sd-scripts leaves out, too
            notes.append(f"{entry['path']}: {entry['repeats']} repeats, so it is left out")
            continue
        source_of(entry, home, where)
    entries = [entry for entry in entries if entry.get("repeats", 1) >= 1]
    if not entries:
        raise ConfigError(
            f"{path.name}: its list of data sets is empty, or none of them has repeats; there is nothing to convert."
        )
    for entry in entries:
        entry["path"] = relative(entry["path"], folder, home, notes)
    return Converted(_to_toml(entries, path.name, tool), len(entries), tool, tuple(dict.fromkeys(notes)))


def _to_toml(entries: Sources, name: str, tool: str) -> str:
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment(f"Converted from {tool}'s {name}; datasets/README.md of sfumato lists the keys."))
    sources = tomlkit.aot()
    for entry in entries:
        sources.append(tomlkit.item(entry))
    document.add("source", sources)
    return tomlkit.dumps(document)
