"""Compare trainings: how far each is, what it measured, in which settings they differ, and what they draw."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sfumato.cli import run
from sfumato.config import TypedConfig, parse
from sfumato.errors import ConfigError
from sfumato.utils.atomic import atomic_path, check_overwrite
from sfumato.utils.formatting import escape_control

if TYPE_CHECKING:
    from sfumato.runs.reporting.overview import Overview


@dataclass(frozen=True)
class Config(TypedConfig):
    """List trainings: steps, state, loss and measurements, and below each the settings in which those of the same
    program differ.

    Example: sfumato runs runs -o runs.png
    """

    folders: tuple[Path, ...] = (Path("runs"),)
    """Folders of runs, or folders that hold some."""
    _: KW_ONLY
    output: Annotated[Path | None, Parameter(alias="-o")] = None
    """PNG file for the last sample images of all runs, with a row for each run and a column for each prompt."""
    overwrite: bool = False
    """Replace an image file that exists."""
    json: bool = False
    """Print JSON."""


def look(config: Config) -> list[Overview]:
    """What the folders tell. Writes the sheet if one is asked for."""
    from sfumato.runs.reporting.overview import find_runs, read_overview, sample_sheet

    if config.output is not None:
        if config.output.suffix.lower() != ".png":
            raise ConfigError(f"--output {config.output}: wanted a .png.")
        check_overwrite(config.output, config.overwrite)
    found = [read_overview(folder) for folder in find_runs(config.folders)]
    if config.output is not None:
        sheet = sample_sheet(found)
        with atomic_path(config.output) as temporary:
            sheet.save(temporary)
    return found


def table(runs: Sequence[Overview]) -> str:
    """A line for each run, and one below it for the settings in which it differs from others."""
    from sfumato.runs.reporting.overview import differing_settings, format_settings

    names = [str(each.folder) for each in runs]
    width, programs = max(map(len, names)), max(len(each.program) for each in runs)
    steps = [f"{each.made} of {'?' if each.steps is None else each.steps}" for each in runs]
    most = max(map(len, steps))
    lines = []
    for each, name, made, apart in zip(runs, names, steps, differing_settings(runs), strict=True):
        figures = "  ".join(f"{what} {value:.4g}" for what, value in each.figures.items())
        lines.append(
            f"{name:<{width}}  {each.program:<{programs}}  {made:>{most}}  {each.state:<7}  {figures}".rstrip()
        )
        if apart:
            lines.append(f"{'':<{width}}  {format_settings(apart)}")
    return "\n".join(map(escape_control, lines))


def as_json(runs: Sequence[Overview]) -> list[dict[str, object]]:
    """The same for other programs."""
    from sfumato.runs.reporting.overview import differing_settings

    return [
        {
            "folder": str(each.folder),
            "program": each.program,
            "made": each.made,
            "steps": each.steps,
            "state": each.state,
            "figures": dict(each.figures),
            "learned": None if each.learned is None else str(each.learned),
            "differs": apart,
        }
        for each, apart in zip(runs, differing_settings(runs), strict=True)
    ]


def main(argv: Sequence[str]) -> int:
    """Report as the arguments say. Returns 0 if there are runs."""
    config = parse(Config, argv, program="runs")
    found = look(config)
    print(json.dumps(as_json(found), indent=2) if config.json else table(found))
    if config.output is not None:
        print(config.output, file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
