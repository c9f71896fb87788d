"""The axes of an XY plot, and the order that fills it coarse to fine. Imports no torch."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.adapters.weights import checked_number
from sfumato.config import expand_home
from sfumato.errors import AdapterError, ConfigError, did_you_mean
from sfumato.utils.limits import (
    checked_adapter_guidance,
    checked_density,
    checked_guidance,
    checked_seed,
    checked_steps,
)
from sfumato.utils.schedulers import find_sampler

if TYPE_CHECKING:
    from sfumato.models.prompts.syntax import Syntax

PLAIN: dict[str, Callable[[str], Any]] = {
    "prompt": str,
    "negative": str,
    "seed": int,
    "steps": int,
    "guidance": float,
    "adapter_guidance": float,
    "sampler": str,
    "method": str,
    "density": float,
}
"""Settings that an axis may vary, and what reads each value."""


def checked_method(name: str) -> str:
    """The name of a merging method. Raises ConfigError, one line, for one that there is not."""
    from sfumato.merging.methods import METHODS

    if name not in METHODS:
        raise ConfigError(f"there is no method {name!r}; known are {', '.join(METHODS)}.")
    return name


CHECKS: dict[str, Callable[[Any], object]] = {
    "seed": checked_seed,
    "steps": checked_steps,
    "guidance": checked_guidance,
    "adapter_guidance": checked_adapter_guidance,
    "sampler": find_sampler,
    "method": checked_method,
    "density": checked_density,
}
"""What refuses a value that was read but cannot be meant, of an axis or of the option of that name."""


@dataclass(frozen=True)
class Axis:
    """What varies along a side: a name of PLAIN, "weight" of the adapter `label`, or "adapter", one file a value."""

    kind: str
    values: tuple[Any, ...]
    label: str = ""

    @property
    def labels(self) -> list[str]:
        """What stands beside each row or above each column."""
        if self.kind == "prompt":
            return [str(value) for value in self.values]
        if self.kind == "adapter":
            return _file_names(self.values)
        if self.kind == "method":
            return list(self.values)
        if self.kind == "weight":
            return [f"{self.label} {value:g}" for value in self.values]
        return [
            f"{self.kind} {value:g}" if isinstance(value, float) else f"{self.kind} {value}" for value in self.values
        ]


def parse_axis(text: str, labels: Sequence[str], syntax: Syntax = "plain") -> Axis:
    """`prompt=a crab|an owl`, `seed=1,2,3`, `LABEL=0,0.5,1` (weights), `adapter=a.safetensors,runs/*.safetensors`.

    labels: the adapters' names. Prompts are parted by |, everything else by commas. syntax: of the prompts; A1111's
    brackets may hold a | of their own. Raises ConfigError, one line.
    """
    named = next((label for label in labels if "=" in label and text.startswith(f"{label}=")), None)
    name, equals, rest = (named, "=", text[len(named) + 1 :]) if named else text.partition("=")
    if name not in ("prompt", "negative"):
        found = rest.split(",")
    else:
        found = _outside_brackets(rest) if syntax == "a1111" else rest.split("|")
    parts = [part.strip() for part in found]
    parts = [part for part in parts if part or name == "negative"]
    if not equals or not parts:
        raise ConfigError(f"axis {text!r}: wanted NAME=VALUES, such as seed=1,2,3 or prompt=a crab|an owl.")
    if name == "adapter":
        return Axis("adapter", tuple(file for part in parts for file in _files(part, text)))
    if name in labels:
        try:
            return Axis("weight", tuple(checked_number(name, float(part)) for part in parts), name)
        except (ValueError, AdapterError) as error:
            raise ConfigError(f"axis {text!r}: {str(error).rstrip('.')}; wanted weights such as 0,0.5,1.") from None
    if name not in PLAIN:
        hint = did_you_mean(name, [*PLAIN, "adapter", *labels])
        raise ConfigError(f"axis {text!r}: there is no {name!r} to vary; {hint}")
    try:
        values = tuple(PLAIN[name](part) for part in parts)
    except ValueError:
        raise ConfigError(f"axis {text!r}: {name} takes numbers, parted by commas.") from None
    for value in values:
        if name in CHECKS:
            CHECKS[name](value)
    return Axis(name, values)


def _file_names(specs: Sequence[str]) -> list[str]:
    """The files' names with their weights; where several are called the same, with the folders that tell them apart."""
    paths = [Path(spec.replace(".safetensors", "")).parts for spec in specs]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [name.replace(":", " ") for name in names]


def _outside_brackets(text: str) -> list[str]:
    """The text parted at each | that no bracket holds and no backslash precedes."""
    parts, depth = [""], 0
    for token in re.findall(r"\\.|.", text, re.DOTALL):
        depth = max(0, depth + (token in "[(") - (token in "])"))
        if token == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _files(part: str, text: str) -> list[str]:
    part = expand_home(part)
    is_pattern = any(sign in part for sign in "*?[") and not Path(part).exists()  # "line [v2].safetensors" is a file
    found = sorted(glob.glob(part, recursive=True), key=_in_order) if is_pattern else [part]
    if not found:
        raise ConfigError(f"axis {text!r}: no file matches {part}.")
    return found


def _in_order(name: str) -> list[tuple[str, int]]:
    """What names are sorted by, with numbers by their size: checkpoint-500 before checkpoint-1000."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)]


def coarse_to_fine(columns: int, rows: int) -> Iterator[list[tuple[int, int]]]:
    """All cells (column, row) in rounds: the corners first, then what lies halfway between, and so on.

    After each round the cells seen so far are as evenly spread as they can be, so that a plot says most early.
    """
    levels = [_levels(columns), _levels(rows)]
    deepest = max(max(levels[0]), max(levels[1]))
    for level in range(deepest + 1):
        cells = [
            (column, row)
            for row in range(rows)
            for column in range(columns)
            if max(levels[0][column], levels[1][row]) == level
        ]
        if cells:
            yield cells


def _levels(count: int) -> list[int]:
    """The round in which each of `count` places comes: 0 for the ends, then the middles of what is left."""
    levels = [-1] * count
    levels[0] = levels[-1] = 0
    spans, level = [(0, count - 1)], 1
    while spans:
        halves = []
        for low, high in spans:
            if high - low > 1:
                middle = (low + high) // 2
                levels[middle] = level
                halves += [(low, middle), (middle, high)]
        spans, level = halves, level + 1
    return levels
