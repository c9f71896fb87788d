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

from sfumato.data.dataset_config import check_keys, parse_source
from sfumato.errors import ConfigError
from sfumato.interop.datasets import ai_toolkit, onetrainer, sd_scripts, simpletuner
from sfumato.interop.datasets.settings import Sources, read_settings, relative_folder

_TOOLS: Mapping[str, Callable[[Any, Path, list[str]], Sources | None]] = MappingProxyType(
    {
        "kohya": sd_scripts.sources,
        "ai-toolkit": ai_toolkit.sources,
        "SimpleTuner": simpletuner.sources,
        "OneTrainer": onetrainer.sources,
    }
)


@dataclass(frozen=True)
class Converted:
    """text: of the dataset.toml. sources: how many it names. notes: what could not be carried over, and why.
    resolution: that of all of them, None where they have several, or say none."""

    text: str
    sources: int
    tool: str
    notes: tuple[str, ...]
    resolution: int | None = None


def convert(path: Path, target: Path | None = None) -> Converted:
    """The config at `path` as a dataset.toml that lies at `target` (beside `path` if None), to which its paths are
    relative where they can be. Raises ConfigError for a file that is no tool's."""
    return convert_values(read_settings(path), path.name, path.resolve().parent, target or path)


def convert_values(values: Any, name: str, folder: Path, target: Path) -> Converted:
    """The same of a config's values that lie in `folder`. name: of the config's file."""
    home = target.resolve().parent
    notes: list[str] = []
    read_by = ((tool, sources(values, folder, notes)) for tool, sources in _TOOLS.items())
    try:
        tool, entries = next(((tool, found) for tool, found in read_by if found is not None), ("", None))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    if entries is None:
        raise ConfigError(
            f"{name}: neither kohya's [[datasets]] or train_data_dir, ai-toolkit's config.process[].datasets, "
            "OneTrainer's concepts nor SimpleTuner's data sets are in it. Name such a config; datasets/README.md says "
            "how a dataset.toml is written by hand."
        )
    for number, entry in enumerate(entries, start=1):
        where = f"{name}, its data set {number}: "
        check_keys(entry, where)
        if not _is_idle(entry):
            parse_source(entry, home, where)
    none = [f"{entry['path']}: {entry['repeats']} repeats, so it is left out" for entry in entries if _is_idle(entry)]
    entries = [entry for entry in entries if not _is_idle(entry)]
    if not entries:
        reasons = "; ".join((none or notes)[:3]) or "its list of data sets is empty"
        raise ConfigError(f"{name}: there is nothing to convert: {reasons}.")
    resolution, notes = _one_resolution(entries, notes)
    notes += none
    for entry in entries:
        entry["path"] = relative_folder(entry["path"], folder, home, notes)
    return Converted(_to_toml(entries, name, tool), len(entries), tool, tuple(dict.fromkeys(notes)), resolution)


def _one_resolution(entries: Sources, notes: list[str]) -> tuple[int | None, list[str]]:
    """Take the key from sources that all have the same one, which is --resolution then. Gives that, and the notes that
    hold."""
    said = [entry.get("resolution") for entry in entries]
    if any(each != said[0] for each in said) or isinstance(said[0], list):
        return None, [note for note in notes if not note.startswith("resolution = ")]
    for entry in entries:
        entry.pop("resolution", None)
    is_told = said[0] is None or any(note.startswith("resolution = ") for note in notes)
    return said[0], [*notes, *([] if is_told else [f"resolution = {said[0]}: --resolution"])]


def _is_idle(entry: Mapping[str, Any]) -> bool:
    """Whether no epoch holds it, as sd-scripts has it, too."""
    return bool(entry.get("repeats", 1) < 1)


def _to_toml(entries: Sources, name: str, tool: str) -> str:
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment(f"Converted from {tool}'s {name}; datasets/README.md of sfumato lists the keys."))
    sources = tomlkit.aot()
    for entry in entries:
        sources.append(tomlkit.item(entry))
    document.add("source", sources)
    return tomlkit.dumps(document)
