"""What the benches of single trainers on the pocket base share: a judge, an adapter by a command, and images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.judge import Judge, Verdict, cached_judge
from bench.judge_pictures import Pictures, read_others, withheld_cells
from bench.style_runs import to_tensors
from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.generation.draw import draw
from sfumato.models import Base


def judge_of(pictures: Pictures, data: Path, *, cache: Path, steps: int) -> Judge:
    """The judge that has learned from these pictures of the data, without those that are withheld from the base."""
    seen, _ = pictures.apart(withheld_cells(data))
    return cached_judge(seen, cache=cache, steps=steps, others=read_others(data, pictures.styles))


def every_nth(names: Sequence[str], count: int) -> list[str]:
    """So many of the names, from all over them."""
    return list(names[:: max(1, len(names) // count)][:count])


def learn(program: str, folder: Path, *options: str) -> tuple[Path, float | None]:
    """The adapter that the trainer's command leaves in this folder, and its minutes; None where it was there already.

    options: further words of the command line.
    """
    path, began = folder / f"{folder.name}.safetensors", time.perf_counter()
    if path.exists():
        return path, None
    quietly = ("--sample-every", "0", "--measure-every", "0", "--overwrite")
    if cli.main(["train", program, *options, "--output", str(folder), *quietly]):
        raise ConfigError(f"{folder}: the training failed.")
    return path, round((time.perf_counter() - began) / 60, 2)


def images_of(base: Base, prompts: Sequence[str], first_seed: int = 0, **settings: Any) -> Tensor:
    """An image of each prompt, the seeds from `first_seed` on: (n, 3, 64, 64) uint8. settings: as of `draw`."""
    return to_tensors(draw(base, prompts, range(first_seed, first_seed + len(prompts)), **settings))


def shown(verdict: Verdict, concepts: Tensor) -> dict[str, float]:
    """The shares of images in which the judge finds their concept first, and among the first five."""
    return {
        "concept_top1": round(verdict.concept_accuracy(concepts), 4),
        "concept_top5": round(verdict.concept_accuracy(concepts, 5), 4),
    }


def places_of(pictures: Pictures, things: Sequence[str]) -> Tensor:
    """The things' places among the concepts."""
    return torch.tensor([pictures.concepts.index(thing) for thing in things])
