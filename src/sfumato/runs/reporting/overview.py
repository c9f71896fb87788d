"""What run folders tell of their trainings, beside one another. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from sfumato.errors import ConfigError, RunError
from sfumato.runs.folder import IGNORED_OPTIONS, extra_names, is_run, read_facts, run_name
from sfumato.runs.lock import is_in_use
from sfumato.runs.reporting.plot import last_samples, read_log, running_mean
from sfumato.utils.formatting import quote_argument
from sfumato.utils.image_grid import contact_sheet, shrink_for_sheet
from sfumato.utils.text_files import read_toml

State = Literal["running", "stopped", "done"]
FIGURES = ("loss", "fit", "validation", "drift", "class_drift")
"""What is told of a log: of the loss the running mean, of the others the last measurement."""
_NAMES = frozenset(("output", "name", "resume", "dry_run", "finish"))
"""Settings of every run's own, in which runs differ always or never."""


@dataclass(frozen=True)
class Overview:
    """One training. made: its steps so far. steps: those asked for, if that is known. figures: as FIGURES, what there
    is of them. learned: the file or folder of what it learned, none before its end. settings: its resolved config."""

    folder: Path
    program: str
    made: int
    steps: int | None
    state: State
    figures: Mapping[str, float]
    learned: Path | None
    settings: Mapping[str, Any]


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The run folders among these and below them, each once. Raises ConfigError for a place without any."""
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"{place}: there is no such folder; name that of a run, or one that holds some.")
        below = list(_runs_below(place))
        if not below:
            raise ConfigError(f"{place} holds no run; name the folder of one, or one that holds some.")
        found += below
    return list({each.resolve(): each for each in found}.values())


def _runs_below(place: Path) -> Iterator[Path]:
    for folder, below, _ in os.walk(place):
        if is_run(Path(folder)):
            below.clear()  # what lies in a run is its own
            yield Path(folder)
        below[:] = sorted(name for name in below if not name.startswith("."))


def read_overview(folder: Path) -> Overview:
    """What the folder tells; what is broken or missing there is left out."""
    facts = read_facts(folder)
    try:
        settings = read_toml(folder / "config.toml")
    except (OSError, ConfigError):
        settings = {}
    try:
        curves = read_log(folder / "log.jsonl")
    except RunError:
        curves = {}
    figures = {name: curves[name][1][-1] for name in FIGURES if name in curves}
    if "loss" in figures:
        figures["loss"] = running_mean(curves["loss"][1])[-1]
    steps, learned = settings.get("steps"), _learned(folder, facts)
    running = is_in_use(folder)
    return Overview(
        folder,
        facts.get("program", ""),
        max((steps[-1] for steps, _ in curves.values()), default=0),
        steps if isinstance(steps, int) else None,
        "running" if running else "done" if learned else "stopped",
        figures,
        learned,
        settings,
    )


def _learned(folder: Path, facts: Mapping[str, str]) -> Path | None:
    """What a run wrote at its end, where it has made no steps since."""
    names = [f"{run_name(folder)}.safetensors", *(name for name in extra_names(facts) if name != "adapters")]
    saved_s = max((path.stat().st_mtime for path in (folder / "checkpoints").glob("*/manifest.json")), default=0.0)
    for path in (folder / name for name in names):
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        if files and max(file.stat().st_mtime for file in files) >= saved_s:
            return path
    return None


def differing_settings(runs: Sequence[Overview]) -> list[dict[str, Any]]:
    """Of each run the settings that another run of its program has otherwise; None stands for one that is unset."""
    found = []
    for run in runs:
        others = [other.settings for other in runs if other.program == run.program]
        names = sorted({name for each in others for name in each} - IGNORED_OPTIONS - _NAMES)
        apart = [name for name in names if any(each.get(name) != run.settings.get(name) for each in others)]
        found.append({name: run.settings.get(name) for name in apart})
    return found


def format_settings(settings: Mapping[str, Any]) -> str:
    """Settings in one line, "learning_rate 0.001, optimizer muon"."""
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items())


def _value(value: Any) -> str:
    if value is None:
        return "unset"
    return quote_argument(value) if isinstance(value, str) else str(value)


def sample_sheet(runs: Sequence[Overview]) -> Image.Image:
    """The last samples of each run that has any, a row for each run and a column for each prompt. Raises ConfigError
    where none has."""
    drawn = [
        (run, apart, *last_samples(run.folder / "samples"))
        for run, apart in zip(runs, differing_settings(runs), strict=True)
    ]
    drawn = [row for row in drawn if row[3]]
    if not drawn:
        raise ConfigError("no run has sample images; they come with --sample-every, which is on by default.")
    prompts = list(dict.fromkeys(key for *_, pictures in drawn for key in pictures))
    side = max(max(picture.size) for *_, pictures in drawn for picture in pictures.values())
    count = len(drawn) * len(prompts)
    cells = [
        [shrink_for_sheet(pictures[key], side, count) if key in pictures else None for key in prompts]
        for *_, pictures in drawn
    ]
    are_apart = len({run.folder.name for run, *_ in drawn}) == len(drawn)
    names = [run.folder.name if are_apart else str(run.folder) for run, *_ in drawn]
    labels = [
        f"{name}, step {step}\n{format_settings(apart)}".strip()
        for name, (_, apart, step, _) in zip(names, drawn, strict=True)
    ]
    return contact_sheet(cells, row_labels=labels, column_labels=[prompt for prompt, _ in prompts])
