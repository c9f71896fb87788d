"""Whether the loss on pictures that are held out says when a training of a style is best stopped.

Styles that the base has not seen are learned by the shipped recipe, and an adapter is kept every few steps. Of each the
loss is measured on the pictures that were learned and on others of the style, on fixed noise and timesteps as in a
training's log; other concepts are drawn with it, and a judge that has learned from real pictures only says what they
show. Beside one another stand the adapter with the lowest loss on pictures held out, and the last. Prints JSON.

    python -m bench.when_to_stop --data emoji
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.distances import paired_kernel_distance
from bench.judge import Judge, cached_judge, look
from bench.judge_pictures import Pictures, chosen_tenth
from bench.real import check_least, print_report
from bench.style_fidelity import Config as StyleConfig
from bench.style_fidelity import read_real
from bench.style_runs import Workshop, reconstruct
from sfumato import Adapter, cli, compose, data, load_base
from sfumato.data import Dataset
from sfumato.errors import DataError
from sfumato.models import Base
from sfumato.precision import decide
from sfumato.training.loss.validation import Metrics
from sfumato.utils import randomness


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learn styles, and put the loss on pictures held out beside what is drawn, while they are learned."""

    data: Path
    """Folder of STYLE/CONCEPT.png, with the base's styles and others."""
    styles: tuple[str, ...] = ("openmoji", "joypixels", "glossy")
    """The styles to learn."""
    seed: int = 1
    """Of the training; it also chooses the pictures."""
    images: int = 16
    """Pictures to learn from."""
    held_out: int = 12
    """Pictures of the style that are not learned, on which the loss is measured."""
    concepts: int = 48
    """Concepts drawn with each adapter, none of them among the pictures."""
    every: int = 24
    """Steps between adapters."""
    base: str = "pocket"
    """The base that learns."""
    style_options: tuple[str, ...] = ()
    """Other settings of the recipe, such as steps=480, to try them."""
    judge_steps: int = 2400
    """Optimizer steps of the judge."""
    cache: Path = Path(".cache/judge")
    """Folder of trained judges."""
    work: Path = Path(".cache/when_to_stop")
    """Folder that keeps the adapters and their pictures; not made again, and refused if other code made them."""
    out: Path | None = None
    """File that receives the JSON besides."""


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    check_least(config, "images", "held_out", "every")
    check_least(config, "concepts", least=2)  # a distance wants two
    drawn = config.held_out + config.concepts
    pictures, others = read_real(
        StyleConfig(data=config.data, styles=config.styles, images=config.images, concepts=drawn)
    )
    if missing := [style for style in config.styles if style not in pictures.styles]:
        raise DataError(f"--styles {missing[0]}: {config.data} has {', '.join(pictures.styles)}.")
    wanted = config.images + drawn
    if len(pictures.concepts) < wanted:
        raise DataError(f"{config.data}: {len(pictures.concepts)} concepts in all of its styles; wanted {wanted}.")
    base = load_base(config.base, precision=decide("fp32"))
    workshop = Workshop(config.work, config.base, base)
    seen, _ = pictures.apart(chosen_tenth(pictures))
    judge = cached_judge(seen, cache=config.cache, steps=config.judge_steps, seed=0, others=others)
    rows = {style: of_style(config, workshop, base, judge, pictures, style) for style in config.styles}
    return {"styles": rows, **{name: chosen(rows, name) for name in ("lowest_validation", "last")}}


def of_style(
    config: Config, workshop: Workshop, base: Base, judge: Judge, pictures: Pictures, style: str
) -> list[dict[str, float]]:
    """A row for the base and for each adapter, by its step."""
    order = [pictures.concepts[i] for i in randomness.permutation(len(pictures.concepts), config.seed, "split")]
    taught, held, asked = (
        order[: config.images],
        order[config.images : config.images + config.held_out],
        order[config.images + config.held_out :][: config.concepts],
    )
    files = {concept: config.data / style / f"{concept.replace(' ', '-')}.png" for concept in (*taught, *held)}
    options = ["--seed", str(config.seed), "--save-every", str(config.every)]
    options += [f"--{option}" for option in config.style_options]
    learned = workshop.learn(
        f"{style}-{config.seed}", "lora", "lora-style.toml", {files[c].name: files[c] for c in taught}, {}, options
    )
    assert learned.adapter is not None
    kept = sorted((learned.adapter.parent / "adapters").glob("*.safetensors"))
    by_step: dict[int, Path | None] = {0: None, **{int(file.stem.rpartition("step")[2]): file for file in kept}}
    metrics = Metrics(base, data_of(base, files, taught), {}, held_out=data_of(base, files, held))
    true = pictures.cells([(concept, style) for concept in asked])
    real, rebuilt = look(judge, true.pixels), look(judge, reconstruct(base, true.pixels))
    least = paired_kernel_distance(rebuilt.features, real.features)
    rows: list[dict[str, float]] = []
    seeds = [1000 * config.seed + place for place in range(len(asked))]
    for step, file in by_step.items():
        weights: Mapping[Path, float] = {file: 1.0} if file else {}
        drawn = look(judge, workshop.drawn(f"{style}-{config.seed}-{step}", asked, seeds, weights))
        with compose(base, Adapter(file)) if file else nullcontext():
            losses = metrics.values()
        distance = paired_kernel_distance(drawn.features, real.features)
        first = rows[0]["distance"] if rows else distance
        rows.append(
            {
                "step": step,
                **{name: round(value, 4) for name, value in losses.items()},
                **drawn.accuracies(true),
                "distance": round(distance, 4),
                "distance_closed": round((first - distance) / (first - least), 3),
            }
        )
        print(json.dumps({"learned": style, **rows[-1]}), file=sys.stderr, flush=True)
    return rows


def data_of(base: Base, files: Mapping[str, Path], concepts: Sequence[str]) -> Dataset:
    """These pictures, each captioned with its concept."""
    examples = [data.Example(files[concept], concept) for concept in concepts]
    return data.prepare(examples, base, resolution=base.resolution, embed_text=False)


def chosen(rows: Mapping[str, Sequence[Mapping[str, float]]], by: str) -> dict[str, float]:
    """The means over the styles of the adapters that are chosen so: those of the lowest validation, or the last."""
    picked = [
        of_style[-1] if by == "last" else min(of_style[1:], key=lambda row: row["validation"])
        for of_style in rows.values()
    ]
    return {name: round(float(torch.tensor([float(row[name]) for row in picked]).mean()), 4) for name in picked[0]}


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.when_to_stop")


if __name__ == "__main__":
    cli.run(main)
