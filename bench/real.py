"""The real pictures that benches choose from, STYLE/CONCEPT.png, and how a bench begins and ends as a program."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.config import Config, parse
from sfumato.errors import ConfigError, DataError
from sfumato.utils.atomic import write_text
from sfumato.utils.formatting import option_flag

BASE_CONCEPTS = Path(__file__).parents[1] / "src/sfumato/models/pocket/concepts.json"

Cells = dict[tuple[str, str], Path]
"""(concept, style) -> picture."""


def check_least(config: object, *names: str, least: int = 1) -> None:
    """Raises ConfigError for one of these options that is less; unset is fine."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{option_flag(name)} is {value}; it must be at least {least}.")


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: a whole number of at least so much; anything else ends the program with one line."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise ArgumentTypeError(f"is {value}; wanted at least {least}")
        return value

    number.__name__ = "int"  # as argparse names it in the line
    return number


def cells_of(data: Path, styles: Sequence[str] = ()) -> Cells:
    """Every picture of the styles, by (concept, style); of every folder that holds pictures, where none is named.

    Raises DataError where there is none.
    """
    found = sorted(folder.name for folder in data.iterdir() if folder.is_dir()) if data.is_dir() else []
    cells: Cells = {}
    for style in styles or found:
        files = sorted((data / style).glob("*.png"))
        if styles and not files:
            raise DataError(f"{data / style} holds no .png; give --data a folder laid out as STYLE/CONCEPT.png.")
        cells |= {(file.stem.replace("-", " "), style): file for file in files}
    if not cells:
        raise DataError(f"{data} holds no folder of pictures; give --data a folder laid out as STYLE/CONCEPT.png.")
    return cells


def styles_of(cells: Mapping[tuple[str, str], Path]) -> tuple[str, ...]:
    """The styles that have a picture, in the order of the cells."""
    return tuple(dict.fromkeys(style for _, style in cells))


def known_concepts(cells: Mapping[tuple[str, str], Path], *, everywhere: bool = True) -> list[str]:
    """The concepts that the base has learned and that have a picture in all of the cells' styles, or in any."""
    styles = styles_of(cells)
    listed = json.loads(BASE_CONCEPTS.read_text(encoding="utf-8"))
    if not everywhere:
        return [name for name in listed if any((name, style) in cells for style in styles)]
    return [name for name in listed if all((name, style) in cells for style in styles)]


def print_report(
    config_type: type[Config], measure: Callable[[Config], dict[str, Any]], argv: Sequence[str], program: str
) -> None:
    """Measure what the command line asks for, print the report as JSON, and write it to --out besides."""
    config = parse(config_type, argv, program=program)
    report = json.dumps(measure(config), indent=1)
    print(report)
    out: Path | None = getattr(config, "out", None)
    if out is not None:
        write_text(out, report + "\n")
