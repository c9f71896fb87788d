"""How long the pocket base takes to load and to draw, beside a plain diffusers pipeline of the same folder.

    python -m bench.pocket_drawing

Both sides in turns in one process, by the clock, on as many threads as torch takes, each side first in every other
round; prints JSON: the median seconds of loading and ours over diffusers', the same of a picture, with one drawn at
once and with eight, and by how many of 255 levels the pictures differ at most.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL.Image import Image

from bench.real import check_least, print_report
from sfumato import cli, draw, load_base
from sfumato.errors import ConfigError
from sfumato.models import FAMILIES
from sfumato.models.loading import POCKET_FOLDER
from sfumato.precision import decide

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what a picture of the pocket base takes."""

    prompt: str = "crab, noto style"
    """What is drawn, from the seeds 0, 1, ..."""
    steps: tuple[int, ...] = (FAMILIES["pocket"].defaults.sampling_steps, 25)
    """Steps of the folder's own sampler."""
    at_once: tuple[int, ...] = (1, 8)
    """Pictures of a batch."""
    rounds: int = 7
    """Measured rounds of both sides, after one that is not."""
    out: Path | None = None
    """File that receives the JSON besides."""


def timed(work: Callable[[], Made]) -> tuple[float, Made]:
    """Seconds by the clock, and what came out."""
    began = time.perf_counter()
    made = work()
    return time.perf_counter() - began, made


def in_turns(sides: Mapping[str, Callable[[], Made]], rounds: int) -> tuple[dict[str, float], dict[str, Made]]:
    """The median seconds of each side, and what it made last.

    One round more is not measured, and every round begins with the other side: who comes second finds warm caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    made: dict[str, Made] = {}
    for number in range(rounds + 1):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            took, made[name] = timed(sides[name])
            if number:
                seconds[name].append(took)
    return {name: statistics.median(each) for name, each in seconds.items()}, made


def compared(seconds: Mapping[str, float]) -> dict[str, float]:
    """Both sides' seconds, and ours over theirs."""
    ours, theirs = seconds["sfumato"], seconds["diffusers"]
    return {"sfumato": round(ours, 3), "diffusers": round(theirs, 3), "ratio": round(ours / theirs, 2)}


def by_diffusers(pipe: Any, config: Config, seeds: Sequence[int], steps: int, guidance: float) -> list[Image]:
    """The pictures as its user draws them."""
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": noise}
    drawn: list[Image] = pipe([config.prompt] * len(seeds), **settings).images
    return drawn


def most_apart(some: Sequence[Image], others: Sequence[Image]) -> int:
    """Levels of 255."""
    pairs = zip(some, others, strict=True)
    return max(int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()) for a, b in pairs)


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    check_least(config, "rounds")
    for option, counts in (("--at-once", config.at_once), ("--steps", config.steps)):
        if not counts or min(counts) < 1:
            raise ConfigError(f"{option}: wanted one or more counts, each at least 1.")
    from diffusers import StableDiffusionPipeline

    load: Any = StableDiffusionPipeline.from_pretrained
    loaders: dict[str, Callable[[], Any]] = {
        "sfumato": lambda: load_base("pocket", precision=decide("fp32", device="cpu")),
        "diffusers": lambda: load(POCKET_FOLDER, torch_dtype=torch.float32),
    }
    seconds, loaded = in_turns(loaders, config.rounds)
    loaded["diffusers"].set_progress_bar_config(disable=True)
    report: dict[str, Any] = {"threads": torch.get_num_threads(), "loading": compared(seconds)}
    for steps, count in itertools.product(config.steps, config.at_once):
        sides = loaded["sfumato"], loaded["diffusers"]
        report[f"{steps} steps, {count} at once"] = beside(*sides, config, steps, range(count))
    return report


def beside(base: Any, pipe: Any, config: Config, steps: int, seeds: Sequence[int]) -> dict[str, float]:
    """The seconds of a picture on both sides, their ratio, and how far the pictures are apart."""
    guidance = base.defaults.guidance
    sides: dict[str, Callable[[], list[Image]]] = {
        "sfumato": lambda: draw(base, config.prompt, list(seeds), steps=steps, batch=len(seeds)),
        "diffusers": lambda: by_diffusers(pipe, config, seeds, steps, guidance),
    }
    seconds, drawn = in_turns(sides, config.rounds)
    of_one = {name: took / len(seeds) for name, took in seconds.items()}
    return {**compared(of_one), "levels": most_apart(drawn["sfumato"], drawn["diffusers"])}


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.pocket_drawing")


if __name__ == "__main__":
    cli.run(main)
