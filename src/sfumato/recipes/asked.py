"""What a training of another tool was asked to do: its settings, taken one by one, and what is left of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import ConfigError
from sfumato.foreign_options import ABSENT, OPTIONS, UNASKED


@dataclass
class Asked:
    """script: the other tool's program, such as train_network.py. folder: where its paths count from, besides the
    present one. taken: settings that were looked at. notes: what its file says besides."""

    name: str
    script: str
    values: dict[str, Any]
    folder: Path
    taken: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    parts: dict[str, Asked] = field(default_factory=dict)

    def part(self, key: str) -> Asked:
        """The settings of a part of the model, or of another group of settings; none where it is unset."""
        if key not in self.parts:
            found = self.get(key)
            values = found if isinstance(found, dict) else {}
            self.parts[key] = Asked(f"{self.name}: {key}", self.script, values, self.folder)
        return self.parts[key]

    def with_parts(self) -> Iterator[Asked]:
        """These settings, and those of the parts that were looked at."""
        yield self
        for part in self.parts.values():
            yield from part.with_parts()

    def get(self, key: str, otherwise: Any = None) -> Any:
        """The setting as it is there, or `otherwise` where it is unset."""
        self.taken.add(key)
        value = self.values.get(key)
        return otherwise if value is None else value

    def find(self, given: str) -> Path | None:
        """The file or folder of a name, which counts from where the other tool is started: here, beside the file, or
        above its folder, as with SimpleTuner's config/NAME/config.json."""
        spelt = given.replace("\\", "/")
        places = (self.folder, Path.cwd(), *self.folder.parents[:2])
        return next((place / spelt for place in places if (place / spelt).exists()), None)

    def text(self, key: str, otherwise: str | None = None) -> str | None:
        """A setting that is a text, also where it looks like a number. Raises ConfigError for what is none."""
        value = self.get(key, otherwise)
        if value is True or isinstance(value, (list, dict)):
            quoted = " Put a name with spaces into quotes." if isinstance(value, list) and len(value) > 1 else ""
            raise ConfigError(f"{self.name}: {key} is {value!r:.40}; wanted a text.{quoted}")
        return None if value in (None, "", False) else str(value)

    def path(self, key: str) -> str | None:
        """A setting that names a file or folder, as it is seen from here where it lies beside the other tool's file."""
        given = self.text(key)
        there = None if given is None or Path(given).exists() else self.find(given)
        return given if there is None else there.as_posix()

    def number(self, key: str, otherwise: float | None = None) -> float | None:
        """A setting that is a number. Raises ConfigError for what is none."""
        value = self.get(key, otherwise)
        return otherwise if value is None or value == "" else self.as_number(key, value)

    def whole(self, key: str, otherwise: int | None = None) -> int | None:
        """A setting that is a whole number. Raises ConfigError for what is none."""
        value = self.number(key, otherwise)
        return None if value is None else self.as_whole(key, value)

    def as_number(self, key: str, value: Any) -> float:
        """The value of a setting, which is to be a number. Raises ConfigError for what is none."""
        try:
            if value is not True and math.isfinite(number := float(value)):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        raise ConfigError(f"{self.name}: {key} is {value!r:.40}; wanted a number.")

    def as_whole(self, key: str, value: Any) -> int:
        """The value of a setting, which is to be a whole number. Raises ConfigError for what is none."""
        if (number := self.as_number(key, value)) != int(number):
            raise ConfigError(f"{self.name}: {key} is {number:g}; wanted a whole number.")
        return int(number)

    def flag(self, key: str) -> bool:
        """Whether a setting is switched on."""
        value = self.get(key, False)
        return value.lower() not in ("", "false", "0", "no") if isinstance(value, str) else bool(value)

    def several(self, key: str) -> list[str]:
        """A setting of several texts, or of one."""
        value = self.get(key, [])
        return [str(each) for each in (value if isinstance(value, list) else [value]) if each != ""]

    def pairs(self, key: str) -> dict[str, str]:
        """A setting of several NAME=VALUE."""
        found = (text.partition("=") for text in self.several(key))
        return {name.strip(): value.strip() for name, _, value in found if name.strip()}

    def left(self, elsewhere: Collection[str], program: str) -> Iterator[str]:
        """A note on each setting that was not taken and does something. elsewhere: settings that others convert."""
        for key, value in self.values.items():
            if key in self.taken or key in elsewhere or value in (None, False, "", [], {}) or _is_in(key, UNASKED):
                continue
            why = next((why for names, why in ABSENT.items() if key in names.split()), None)
            here = next((ours for ours, names in OPTIONS.items() if key in names.split()), None)
            if why is None and here is not None:
                why = f"{here} of sfumato train {program} {'counts steps' if 'epoch' in key else 'is the nearest'}"
            shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{key} = {shown:.60}: {why or 'has no counterpart here and is left out'}"

    def is_settled(self, note: str) -> bool:
        """Whether a note is on a setting that a recipe says, or that needs none."""
        key = note.partition(" = ")[0]
        return key in self.taken or _is_in(key, UNASKED)


def _is_in(key: str, names: Mapping[str, str]) -> bool:
    return any(key in several.split() for several in names)


@dataclass
class Recipe:
    """told: options of our trainer that the other tool's settings say. usual: those that say what it does where
    nothing is said and ours does something else. ask: options that are left to the person."""

    program: str
    told: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ask: tuple[str, ...] = ()

    def say(self, option: str, value: Any, otherwise: Any = None) -> None:
        """Set an option to what is told, or to what is usual there; to neither where both are None."""
        if value is not None:
            self.told[option] = value
        elif otherwise is not None:
            self.usual[option] = otherwise

    @property
    def values(self) -> dict[str, Any]:
        """All of its options."""
        return {**self.usual, **self.told}
