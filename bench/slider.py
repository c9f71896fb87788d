"""What a slider from words does: its images at several weights before a judge that has learned from real ones only.

    python -m bench.slider --data pocket-data --out slider.json

A slider learns from eight things to move a style to another, by the shipped config, with no image. It draws other
things, the same seeds at each weight. The judge tells in which style and of what each is. Beside it stand the base's
own images with either style named in the prompt: what the words alone do. Prints JSON.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.judge import Judge, look
from bench.judge_pictures import read_pictures
from bench.pocket_runs import every_nth, images_of, judge_of, learn, places_of, shown
from bench.real import print_report
from bench.style_runs import CONFIGS
from sfumato import Adapter, cli, compose
from sfumato.errors import ConfigError
from sfumato.models import load_base
from sfumato.utils.text_files import read_toml

RECIPE = CONFIGS / "slider-flat.toml"


@dataclass(frozen=True)
class Config:
    """Judge a slider between two styles at several weights."""

    data: Path = Path("pocket-data")
    """The folder that bench/pocket_data.py built."""
    more: str = "flat"
    """Style at weight 1."""
    less: str = "noto"
    """Style at weight -1."""
    weights: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    """Weights to draw at."""
    things: int = 60
    """How many of the base's other things are drawn."""
    train_seed: tuple[int, ...] = (0, 1, 2)
    """Seeds of trainings."""
    judge_steps: int = 800
    """Optimizer steps of the judge."""
    cache: Path = Path(".cache/judge")
    """Folder of trained judges."""
    keep: Path | None = None
    """Folder that keeps the sliders; one that is there is not trained again."""
    out: Path | None = None
    """File that receives the JSON besides."""


@dataclass(frozen=True)
class Question:
    """What is asked of the judge: the places of the things and of the two styles among those that it knows."""

    judge: Judge
    things: Tensor
    more: int
    less: int

    def shares(self, pictures: Tensor) -> dict[str, float]:
        """Of pictures of the things, in their order: the share in either style, and of those that show the thing."""
        verdict = look(self.judge, pictures)
        style = verdict.style_logits.argmax(1)
        return {
            "more": round(float((style == self.more).float().mean()), 4),
            "less": round(float((style == self.less).float().mean()), 4),
            **shown(verdict, self.things),
        }


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    pictures = read_pictures(config.data)
    for style in (config.more, config.less):
        if style not in pictures.styles:
            raise ConfigError(f"{style}: no style of {config.data}; wanted two of {', '.join(pictures.styles)}.")
    judge = judge_of(pictures, config.data, cache=config.cache, steps=config.judge_steps)
    taught = read_toml(RECIPE)["concept"]
    known = [concept for concept in pictures.concepts if concept not in taught]
    things = every_nth(known, config.things)
    more, less = map(pictures.styles.index, (config.more, config.less))
    question = Question(judge, places_of(pictures, things), more, less)
    base = load_base("pocket")
    by_words = {
        "none": question.shares(images_of(base, things)),
        "more": question.shares(images_of(base, [f"{thing}, {config.more} style" for thing in things])),
        "less": question.shares(images_of(base, [f"{thing}, {config.less} style" for thing in things])),
    }
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = config.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ends = ("--more", f"{{concept}}, {config.more} style", "--less", f"{{concept}}, {config.less} style")
        for seed in config.train_seed:
            run = folder / f"{config.more}-{config.less}-{seed}"
            path, minutes = learn("slider", run, str(RECIPE), *ends, "--seed", str(seed))
            rows = {}
            with compose(base, Adapter(path, 0.0, name="slider")) as mix:
                for weight in config.weights:
                    mix.set(slider=weight)
                    rows[f"{weight:g}"] = question.shares(images_of(base, things))
            runs.append({"seed": seed, "minutes": minutes, "bytes": path.stat().st_size, "by_weight": rows})
    means = {
        weight: {
            name: round(statistics.mean(run["by_weight"][weight][name] for run in runs), 4) for name in by_words["none"]
        }
        for weight in (f"{weight:g}" for weight in config.weights)
    }
    return {"things": len(things), "taught": taught, "by_words": by_words, "mean_by_weight": means, "runs": runs}


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.slider")


if __name__ == "__main__":
    cli.run(main)
