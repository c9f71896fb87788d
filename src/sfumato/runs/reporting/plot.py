"""The curves of a run's log as a PNG.

The sample images in a run's folder. Imports no torch.

RUN/samples/000060/0.png    each by step and number
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sfumato.errors import RunError
from sfumato.utils.atomic import atomic_path
from sfumato.utils.image_grid import read_image_or_none

TITLES = {
    "loss": "loss of each step, and its running mean",
    "fit": "fit: loss on fixed noise and timesteps",
    "validation": "validation: the same on images held out",
    "drift": "drift: change on unrelated prompts",
    "rate": "learning rate",
    "gradient_norm": "norm of the gradient",
}
"""What is plotted, in this order, under which heading; other numbers of a log follow under their own names."""


def plot_log(log: Path, path: Path) -> Path:
    """Draw one panel for each number in a JSONL log (one object a line, each with `step`) and write it to `path`.

    Raises RunError if the log is missing or holds nothing. The PNG carries no date, so equal logs give equal files.
    """
    curves = read_log(log)
    if not curves:
        raise RunError(f"{log}: nothing in it to plot yet; wait for the first steps.")
    # The object API: no global state, no display, and nothing imported until something is plotted.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [*(name for name in TITLES if name in curves), *sorted(curves.keys() - TITLES.keys())]
    rows = -(-len(names) // 2)
    last = max(1, *(steps[-1] for steps, _ in curves.values()))
    figure = Figure(figsize=(10, 2.9 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, min(2, len(names)), number + 1)
        steps, values = curves[name]
        sparse = len(steps) <= 40
        axes.plot(
            steps,
            values,
            color="#9db8d9" if name == "loss" else "#1f4e8c",
            linewidth=1.6 if name != "loss" and (sparse or name == "rate") else 0.8,
            marker="o" if sparse else None,
            markersize=3.5,
        )
        if name == "loss":
            axes.plot(steps, running_mean(values), color="#1f4e8c", linewidth=1.8)
        axes.set_title(TITLES.get(name, name), fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.set_xlim(0, last * 1.02)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if name != "loss" and min(values) >= 0:
            axes.set_ylim(bottom=0)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def read_log(log: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> (steps, values) of the finite numbers in a log. A last line cut short by a crash is left out."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RunError(f"{log}: the log cannot be read ({error.strerror}); name the folder of a run.") from None
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):
                break
            raise RunError(f'{log}, line {number}: wanted {{"step": 1, "loss": 0.2}}, found {line[:60]!r}.') from None
        for name, value in row.items():
            if isinstance(value, int | float) and abs(value) <= sys.float_info.max:  # which a whole number may exceed
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return curves


def running_mean(values: Sequence[float]) -> list[float]:
    """At each place the mean of the values around it, a tenth of all, fewer near the ends."""
    half = max(1, len(values) // 20)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for place in range(len(values)):
        first, end = max(0, place - half), min(len(values), place + half + 1)
        means.append((sums[end] - sums[first]) / (end - first))
    return means


PROMPT = "sfumato.prompt"
"""The text in an image's file that is its prompt: a run that goes on by --force may have others."""


def steps_drawn(samples: Path) -> list[int]:
    """The steps that have a folder of samples, in order."""
    return sorted(int(path.name) for path in samples.glob("[0-9]*") if path.name.isdigit())


def sample_path(samples: Path, step: int, number: int) -> Path:
    return samples / f"{step:06d}" / f"{number}.png"


def sample_row(samples: Path, step: int, prompts: Sequence[str]) -> list[Image.Image] | None:
    """The images of a step. None where one is missing or is of another prompt: a killed process may have left half of
    a row, a disk a broken image."""
    row = [
        picture for number in range(len(prompts)) if (picture := read_image_or_none(sample_path(samples, step, number)))
    ]
    told = [picture.info.get(PROMPT, prompt) for picture, prompt in zip(row, prompts, strict=False)]
    return row if told == list(prompts) else None


def last_samples(samples: Path) -> tuple[int, dict[tuple[str, int], Image.Image]]:
    """The last step with samples, and its images by prompt, and by how often the prompt has come before; step 0 and
    none where there are none."""
    for step in reversed(steps_drawn(samples)):
        found: dict[tuple[str, int], Image.Image] = {}
        paths = sorted((samples / f"{step:06d}").glob("[0-9]*.png"), key=lambda path: (len(path.name), path.name))
        for picture in filter(None, map(read_image_or_none, paths)):
            prompt = str(picture.info.get(PROMPT, ""))
            found[prompt, sum(each == prompt for each, _ in found)] = picture
        if found:
            return step, found
    return 0, {}
