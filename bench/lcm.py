"""What drawing in few steps keeps, and what it costs: the base, and the base with an LCM-LoRA, before one judge.

    python -m bench.lcm --data pocket-data --out lcm.json

The adapter is trained by the shipped config, with no image. Then things that the base knows are drawn in its styles,
the same seeds everywhere: by the base as it is used, by the base in few steps, and with the adapter. For a mix a style
is trained by the shipped config on 16 pictures of one of the judge's styles, and prompts that name no style are drawn
with it, alone and beside the adapter. The judge has learned from real pictures only. Seconds are of one image at a
time, all ways in turns. Prints JSON.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.judge import look
from bench.judge_pictures import read_pictures
from bench.pocket_runs import every_nth, images_of, judge_of, learn, places_of, shown
from bench.real import cells_of, print_report
from bench.style_runs import CONFIGS
from sfumato import Adapter, cli, compose
from sfumato.compose import adapter_guidance
from sfumato.generation.draw import draw
from sfumato.models import Base, load_base
from sfumato.utils.formatting import pluralize

RECIPE, POCKET = CONFIGS / "lcm-pocket.toml", ("--base", "pocket")
Verdict = dict[str, float]
"""The judge's shares of images: in the style, the thing found first, and among the first five."""
OF_BASE: Mapping[str, Mapping[str, Any]] = {
    "by default": {},
    **{f"{pluralize(steps, 'step')} of ddim": {"steps": steps, "sampler": "ddim"} for steps in (25, 8, 4, 1)},
    "4 steps of dpm++ 2m": {"steps": 4, "sampler": "dpm++ 2m"},
    "4 steps of euler": {"steps": 4, "sampler": "euler"},
    "4 steps of lcm without an adapter": {"steps": 4, "sampler": "lcm", "guidance": 1.0},
}
"""Ways to draw with the base alone; what is not said is the base's own: 12 steps of dpm++ at guidance 2.5."""
FEW = (1, 2, 4, 8)
"""Steps with the adapter."""
OF_ADAPTER: Mapping[str, Mapping[str, Any]] = {
    f"{pluralize(steps, 'step')} of {sampler}": {"steps": steps, "sampler": sampler, "guidance": 1.0}
    for sampler in ("lcm", "tcd")
    for steps in FEW
}
"""Ways to draw with the adapter."""
TAUGHT = 16
"""Pictures of the style, of things that are not drawn."""
STYLE_WEIGHTS, MIXED = (1.0, 2.0), ("1 step of lcm", "4 steps of lcm")
"""At guidance 1 there is no adapter guidance, which doubles the recipe's style."""


@dataclass(frozen=True)
class Config:
    """Judge an LCM-LoRA of the pocket base."""

    data: Path = Path("pocket-data")
    """The folder that bench/pocket_data.py built."""
    adapter: Path | None = None
    """An LCM-LoRA to judge. Unset: one is trained by the shipped config."""
    style: str = "blob"
    """Style of the data that is trained, and mixed with the adapter."""
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


def learn_style(folder: Path, config: Config, things: Sequence[str]) -> Path:
    """A LoRA of the style, from its pictures of these things."""
    images = folder / "images"
    images.mkdir(parents=True)
    cells = cells_of(config.data, [config.style])
    for thing in things:
        shutil.copy(cells[thing, config.style], images / f"{thing}.png")
    return learn("lora", folder / "style", str(CONFIGS / "lora-style.toml"), *POCKET, "--images", str(images))[0]


def seconds(ways: Mapping[str, tuple[Base, Mapping[str, Any]]], rounds: int) -> dict[str, float]:
    """The median time of an image by each way, the ways in turns, after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (base, settings) in ways.items():
            began = time.perf_counter()
            draw(base, "a crab", number, **settings)
            taken[name] += [time.perf_counter() - began] if number else []
    return {name: round(statistics.median(each), 3) for name, each in taken.items()}


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    pictures = read_pictures(config.data)
    judge = judge_of(pictures, config.data, cache=config.cache, steps=config.judge_steps)

    def judged(source: Base, things: Sequence[str], styles: Sequence[str], named: bool, **settings: Any) -> Verdict:
        prompts = [f"{thing}, {style} style" if named else thing for thing, style in zip(things, styles, strict=True)]
        verdict = look(judge, images_of(source, prompts, **settings))
        style = torch.tensor([pictures.styles.index(each) for each in styles])
        return {"style": round(verdict.style_accuracy(style), 4), **shown(verdict, places_of(pictures, things))}

    things = every_nth(pictures.concepts, config.things)
    in_turns = [pictures.styles[place % len(pictures.styles)] for place in range(len(things))]
    base, fast_base = load_base("pocket"), load_base("pocket")
    with tempfile.TemporaryDirectory() as name:
        fast, minutes = config.adapter, None
        if fast is None:
            seeded = ("--seed", str(config.train_seed))
            fast, minutes = learn("lcm", Path(name) / "fast", str(RECIPE), *POCKET, *seeded)
        of_base = {way: judged(base, things, in_turns, True, **settings) for way, settings in OF_BASE.items()}
        with compose(fast_base, Adapter(fast)):
            with_adapter = {way: judged(fast_base, things, in_turns, True, **to) for way, to in OF_ADAPTER.items()}
            ways = {way: (base, settings) for way, settings in OF_BASE.items()}
            ways |= {f"adapter, {way}": (fast_base, settings) for way, settings in OF_ADAPTER.items()}
            taken = seconds(ways, config.rounds)
        undrawn = [thing for thing in pictures.concepts if thing not in things]
        style = learn_style(Path(name), config, every_nth(undrawn, TAUGHT))
        in_style = [config.style] * len(things)
        mixed = {"no adapter, by default": judged(base, things, in_style, False)}
        guidance = base.defaults.guidance
        with compose(base, Adapter(style)) as mix, adapter_guidance(mix, guidance=guidance):
            mixed["style 1, by default"] = judged(base, things, in_style, False)
        for weight in STYLE_WEIGHTS:
            with compose(base, Adapter(style, weight), Adapter(fast)):
                for way in MIXED:
                    found = judged(base, things, in_style, False, **OF_ADAPTER[way])
                    mixed[f"style {weight:g} and adapter 1, {way}"] = found
    return {
        "things": len(things), "minutes": minutes, "base": of_base, "adapter": with_adapter, "seconds": taken,
        "ratio": round(taken["adapter, 4 steps of lcm"] / taken["by default"], 3),
        "mix": {"style": config.style, **mixed},
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.lcm")


if __name__ == "__main__":
    cli.run(main)
