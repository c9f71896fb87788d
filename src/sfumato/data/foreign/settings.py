"""What every tool's config needs: reading it, its settings one by one, folders, and what is left of it for a note."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.data.captions import CAPTION_SUFFIXES
from sfumato.errors import ConfigError

Sources = list[dict[str, Any]]
"""Keys and values of each [[source]], in the order of datasets/README.md."""


def read(path: Path) -> Any:
    """The file's values, without those that name nothing. Raises ConfigError for what is no TOML, YAML or JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"{path}: not readable as text ({reason}). Name the config of the other tool.") from None
    try:
        if path.suffix.lower() == ".toml":
            values: Any = tomllib.loads(text)
        elif path.suffix.lower() == ".json":
            values = json.loads(text)
        elif path.suffix.lower() in (".yaml", ".yml"):
            import yaml

            values = yaml.safe_load(text)
        else:
            raise ConfigError(f"{path.name}: wanted .toml or .json (kohya), .yaml or .json (ai-toolkit).")
    except ConfigError:
        raise
    except Exception as error:  # each parser has its own
        raise ConfigError(f"{path.name}: cannot be parsed ({' '.join(str(error).split())[:120]}). Mend it.") from None
    return _without_empty(values)


def _without_empty(values: Any) -> Any:
    """The settings without those that name nothing, as a YAML file's `keep_tokens:` does: they are as if left out."""
    if isinstance(values, dict):
        return {key: _without_empty(value) for key, value in values.items() if value is not None}
    return [_without_empty(value) for value in values] if isinstance(values, list) else values


def tables(values: Any, name: str) -> list[dict[str, Any]]:
    """The list's entries. Raises ConfigError for one that is no table of settings."""
    if not isinstance(values, list):
        raise ConfigError(f"{name} is {values!r:.40}; wanted a list of tables.")
    for value in values:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} holds {value!r:.40}; wanted a table of settings.")
    return values


def told(own: Mapping[str, Any], texts: Container[str]) -> dict[str, Any]:
    """The settings with numbers and yes or no as such, where a program saved its fields as texts: "0.1", "true"."""
    return {key: value if key in texts else _scalar(value) for key, value in own.items()}


def _scalar(value: Any) -> Any:
    try:
        return json.loads(value.lower()) if isinstance(value, str) else value
    except ValueError:
        return value


def number(own: Mapping[str, Any], key: str) -> int:
    """The setting as a whole number, 0 if unset."""
    if not isinstance(value := own.get(key, 0), int):
        raise ConfigError(f"{key} is {value!r:.40}; wanted a whole number.")
    return value


def left_over(own: Mapping[str, Any], used: Container[str], elsewhere: Mapping[str, str]) -> Iterator[str]:
    """A note on each setting that is not taken. elsewhere: what does for it here."""
    for key, value in own.items():
        if key in elsewhere:
            yield f"{key} = {value}: {elsewhere[key]}"
        elif key not in used and value not in (None, False, "", [], {}, 0):
            yield f"{key} = {value}: has no counterpart here and is left out"


def plain(**values: Any) -> dict[str, Any]:
    """The values that are not the defaults of a source, in the order of datasets/README.md."""
    neutral = {"repeats": 1, "class": False, "words": "", "caption": None, "trigger": None, "caption_suffix": None}
    neutral |= {"shuffle_tags": False, "keep_tags": 0, "separator": ",", "caption_dropout": 0, "tag_dropout": 0}
    neutral |= {"flip": False, "crop": "center", "mask": "none", "weight": 1}
    return {key: value for key, value in values.items() if key == "path" or value != neutral[key]}


def suffix(extension: str | None) -> str | None:
    """An ending that is not looked for first anyway."""
    if not extension:
        return None
    extension = extension if extension.startswith(".") else f".{extension}"
    return None if extension.lower() == CAPTION_SUFFIXES[0] else extension


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
