"""What drawing in few steps keeps, and what it costs: the base, and the base with an LCM-LoRA, before one judge.

    python -m bench.lcm --data pocket-data --out lcm.json

The adapter is trained by the shipped config, with no image. Then things that the base knows are drawn in its styles,
the same seeds everywhere: by the base as it is used, by the base in few steps, and with the adapter. The judge has
learned from real pictures only. Seconds are of one image at a time, the ways in turns. Prints JSON.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.judge import cached_judge, look
from bench.judge_pictures import read_others, read_pictures, withheld_cells
from bench.real import print_report
from bench.style_runs import CONFIGS, to_tensor
from sfumato import Adapter, cli, compose
from sfumato.bases import Base, load_base
from sfumato.data.latents import to_floats
from sfumato.drawing.pictures import draw
from sfumato.errors import ConfigError
from sfumato.numerals import pluralize

RECIPE = CONFIGS / "lcm-pocket.toml"
OF_BASE: Mapping[str, Mapping[str, Any]] = {
    "25 steps": {},
    "8 steps": {"steps": 8},
    "4 steps": {"steps": 4},
    "1 step": {"steps": 1},
    "4 steps of dpm++ 2m": {"steps": 4, "sampler": "dpm++ 2m"},
    "4 steps of euler": {"steps": 4, "sampler": "euler"},
    "4 steps of lcm without an adapter": {"steps": 4, "sampler": "lcm", "guidance": 1.0},
}
"""Ways to draw with the base alone; what is not said is the base's own: ddim at guidance 2.5."""
FEW = (1, 2, 4)
"""Steps with the adapter, at guidance 1."""


@dataclass(frozen=True)
class Config:
    """Judge an LCM-LoRA of the pocket base."""

    data: Path = Path("pocket-data")
    """The folder that bench/pocket_data.py built."""
    adapter: Path | None = None
    """An LCM-LoRA to judge. Unset: one is trained by the shipped config."""
    things: int = 100
    """How many of the base's things are drawn, in its styles in turn."""
    train_seed: int = 0
    """Seed of the training."""
    rounds: int = 5
    """Images of each way whose time is taken."""
    judge_steps: int = 800
    """Optimizer steps of the judge."""
    cache: Path = Path(".cache/judge")
    """Folder of trained judges."""
    out: Path | None = None
    """File that receives the JSON besides."""


def learn(folder: Path, config: Config) -> tuple[Path, float]:
    """The adapter by the shipped config, and its minutes."""
    began = time.perf_counter()
    words = [str(RECIPE), "--output", str(folder), "--seed", str(config.train_seed)]
    if cli.main(["train", "lcm", *words, "--sample-every", "0", "--measure-every", "0", "--overwrite"]):
        raise ConfigError(f"{folder}: the training failed.")
    return folder / f"{folder.name}.safetensors", round((time.perf_counter() - began) / 60, 2)


def seconds(base: Base, ways: Mapping[str, Mapping[str, Any]], rounds: int) -> dict[str, float]:
    """The median time of an image by each way, the ways in turns, after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, settings in ways.items():
            began = time.perf_counter()
            draw(base, "a crab", number, **settings)
            taken[name] += [time.perf_counter() - began] if number else []
    return {name: round(statistics.median(each), 3) for name, each in taken.items()}


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    pictures = read_pictures(config.data)
    seen, _ = pictures.apart(withheld_cells(config.data))
    others = read_others(config.data, pictures.styles)
    judge = cached_judge(seen, cache=config.cache, steps=config.judge_steps, others=others)
    things = pictures.concepts[:: max(1, len(pictures.concepts) // config.things)][: config.things]
    concepts = torch.tensor([pictures.concepts.index(thing) for thing in things])
    styles = torch.arange(len(things)) % len(pictures.styles)
    prompts = [f"{thing}, {pictures.styles[style]} style" for thing, style in zip(things, styles, strict=True)]
    base = load_base("pocket")

    def judged(settings: Mapping[str, Any]) -> dict[str, float]:
        drawn = draw(base, prompts, range(len(prompts)), **settings)
        verdict = look(judge, to_floats(torch.stack([to_tensor(image) for image in drawn])))
        return {
            "style": round(float((verdict.style_logits.argmax(1) == styles).float().mean()), 4),
            "concept_top1": round(verdict.concept_accuracy(concepts), 4),
            "concept_top5": round(verdict.concept_accuracy(concepts, 5), 4),
        }

    few = {
        f"{pluralize(steps, 'step')} of {sampler}": {"steps": steps, "sampler": sampler, "guidance": 1.0}
        for sampler in ("lcm", "tcd")
        for steps in FEW
    }
    of_base = {name: judged(settings) for name, settings in OF_BASE.items()}
    of_base_s = seconds(base, OF_BASE, config.rounds)
    with ExitStack() as stack:
        path, minutes = config.adapter, None
        if path is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fast"
            path, minutes = learn(folder, config)
        stack.enter_context(compose(base, Adapter(path)))
        with_adapter = {name: judged(settings) for name, settings in few.items()}
        with_adapter_s = seconds(base, few, config.rounds)
    return {
        "things": len(things), "minutes": minutes, "base": of_base, "adapter": with_adapter,
        "base_s": of_base_s, "adapter_s": with_adapter_s,
        "ratio": round(with_adapter_s["1 step of lcm"] / of_base_s["25 steps"], 3),
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.lcm")


if __name__ == "__main__":
    cli.run(main)
