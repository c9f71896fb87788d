"""How well the pocket base draws: its pictures, its VAE's reconstructions and the real pictures before one judge.

The judge is a CNN trained on real pictures only, never on withheld cells. Prints JSON.

    python -m bench.pocket_quality --data pocket-data --out quality.json --sheet docs/pocket-samples.png
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from bench.distances import paired_kernel_distance
from bench.judge import Judge, Verdict, cached_judge, look
from bench.judge_pictures import Pictures, read_others, read_pictures, withheld_cells
from bench.real import check_least, print_report
from bench.style_runs import to_tensors
from sfumato import cli
from sfumato.data.preparation.latents import to_float
from sfumato.errors import BaseModelError, ConfigError, DataError
from sfumato.models import FAMILIES
from sfumato.models.loading import POCKET_FOLDER
from sfumato.utils import randomness, schedulers
from sfumato.utils.atomic import atomic_path

SHEET = (
    "red apple", "crab", "cat face", "house", "rocket", "tulip", "pizza", "penguin", "guitar", "bus", "owl", "key",
    "octopus", "cactus", "crown", "whale",
)  # fmt: skip
"""The concepts on the sheet: eleven of them chosen before there was a model, none for how it is drawn."""


NEAR = 0.025
"""Mean squared difference of two drawings at 32 px, of values from 0 to 1, below which they show nearly the same, such
as a camera and one with its flash."""


@dataclass(frozen=True)
class Config:
    """Judge the pocket base on seeded pictures of every concept in every style."""

    base: Path = POCKET_FOLDER
    """Folder of a diffusers pipeline."""
    data: Path = Path("pocket-data")
    """The folder that bench/pocket_data.py built."""
    out: Path | None = None
    """File that receives the JSON besides."""
    sheet: Path | None = None
    """PNG that receives one row of drawn pictures for each style, each above the real ones."""
    cache: Path = Path(".cache/judge")
    """Folder of trained judges."""
    judge_steps: int = 1500
    """Optimizer steps of the judge."""
    pictures_per_cell: int = 1
    """Drawn pictures of each (concept, style)."""
    half: bool = False
    """Draw every other style of a concept only, and all that are withheld: over 600 pictures in half the time."""
    drawn: Path | None = None
    """Folder that keeps the drawn pictures: an interrupted run goes on, and another judge judges the same ones."""
    prompt: str = "{concept}, {style} style"
    """What is asked for, with {concept} and {style} in it."""
    sampler: str = FAMILIES["pocket"].defaults.sampler
    """Sampler, by the names of sfumato generate."""
    sampler_steps: int = FAMILIES["pocket"].defaults.sampling_steps
    """Sampler steps."""
    guidance: float = FAMILIES["pocket"].defaults.guidance
    """Scale of classifier-free guidance."""
    batch: int = 16
    """Pictures drawn at a time."""
    seed: int = 0
    """Seed of the pictures and of the judge."""


Cell = tuple[str, str, int]
"""Concept, style or "" for none, and a number that tells several pictures of both apart."""


def draw(pipeline: StableDiffusionPipeline, names: Sequence[tuple[str, str]], config: Config) -> Tensor:
    """One picture for each (concept, style), or by the concept's name alone where the style is "": (n, 3, h, w) in
    [-1, 1]; what is kept is not drawn again.

    The seed of a picture depends on its concept, its style and how often they came before, not on its batch.
    """
    came: Counter[tuple[str, str]] = Counter()
    asked: list[Cell] = []
    for name in names:
        asked.append((*name, came[name]))
        came[name] += 1
    if config.drawn is None:
        return as_floats(
            [image for chunk in batched(asked, config.batch) for image in draw_some(pipeline, chunk, config)]
        )
    folder = config.drawn / settings_of(config)
    files = {cell: folder / (cell[1] or "plain") / f"{cell[0].replace(' ', '-')}-{cell[2]}.png" for cell in asked}
    for chunk in batched([cell for cell in asked if not files[cell].exists()], config.batch):
        for cell, image in zip(chunk, draw_some(pipeline, chunk, config), strict=True):
            with atomic_path(files[cell]) as temporary:
                image.save(temporary)
    return as_floats([Image.open(files[cell]) for cell in asked])


def draw_some(pipeline: StableDiffusionPipeline, cells: Sequence[Cell], config: Config) -> list[Image.Image]:
    """One batch."""
    images: list[Image.Image] = pipeline(
        [
            config.prompt.replace("{concept}", concept).replace("{style}", style) if style else concept
            for concept, style, _ in cells
        ],
        num_inference_steps=config.sampler_steps,
        guidance_scale=config.guidance,
        generator=[randomness.generator(config.seed, f"{cell[0]}/{cell[1]}", 0, cell[2]) for cell in cells],
    ).images
    return images


def settings_of(config: Config) -> str:
    """A name for what the pictures depend on: the base's weights and configs, and the sampler's settings."""
    key = hashlib.sha256(
        json.dumps([config.seed, config.sampler, config.sampler_steps, config.guidance, config.prompt]).encode()
    )
    for path in sorted(config.base.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".txt"):
            key.update(path.read_bytes())
    return key.hexdigest()[:16]


def batched(cells: Sequence[Cell], size: int) -> list[Sequence[Cell]]:
    """The cells in batches."""
    return [cells[start : start + size] for start in range(0, len(cells), size)]


def as_floats(images: Sequence[Image.Image]) -> Tensor:
    """(n, 3, h, w) in [-1, 1]."""
    return to_float(to_tensors(images))


def reconstruct(pipeline: StableDiffusionPipeline, pictures: Pictures) -> Tensor:
    """What the VAE makes of the real pictures, (n, 3, h, w) in [-1, 1]."""
    parts = []
    with torch.no_grad():
        for chunk in pictures.pixels.split(64):
            latents = pipeline.vae.encode(to_float(chunk)).latent_dist.mode()
            parts.append(pipeline.vae.decode(latents).sample.clamp(-1, 1))
    return torch.cat(parts)


def figures(verdict: Verdict, pictures: Pictures, real: Tensor) -> dict[str, float | int]:
    """Accuracies of pictures that ought to be `pictures`, and the distance of their features from `real` ones.

    real: (n, d); with several pictures of each cell, the mean of each round's distance, which one cell alone lacks.
    """
    found = {"pictures": len(verdict.features), **verdict.accuracies(pictures)}
    if len(real) < 2:
        return found
    distances = [paired_kernel_distance(some, real) for some in verdict.features.split(len(real))]
    return {**found, "kid_x1000": round(1000 * sum(distances) / len(distances), 3)}


def every_other_style(pictures: Pictures) -> Pictures:
    """Half of the cells: all concepts and all styles in turn."""
    return pictures.cells(
        [
            name
            for name, c, s in zip(pictures.names(), pictures.concept.tolist(), pictures.style.tolist(), strict=True)
            if (c + s) % 2 == 0
        ]
    )


def apart(withheld: Pictures, *seen: Pictures) -> Pictures:
    """The withheld cells that look like no drawing of their style that was learned from: the sets draw some things
    twice, as a star and a glowing star."""
    near = torch.zeros(len(withheld.pixels), dtype=torch.bool)
    for some in seen:
        ours, theirs = ((avg_pool2d(each.pixels / 255, 2)).flatten(1) for each in (withheld, some))
        alike = torch.cdist(ours, theirs).square() / ours.shape[1] < NEAR
        near |= (alike & (withheld.style[:, None] == some.style)).any(1)
    return withheld.cells([name for name, is_near in zip(withheld.names(), near.tolist(), strict=True) if not is_near])


def judged(pipeline: StableDiffusionPipeline, judge: Judge, pictures: Pictures, config: Config) -> dict[str, Any]:
    """Drawn, reconstructed and real pictures of the same cells before the judge."""
    real = look(judge, pictures.pixels)
    asked = pictures.cells(pictures.names() * config.pictures_per_cell)
    rebuilt = reconstruct(pipeline, pictures)
    psnr = -10 * ((rebuilt - to_float(pictures.pixels)) / 2).square().mean((1, 2, 3)).log10().mean()
    report: dict[str, Any] = {
        "drawn": figures(look(judge, draw(pipeline, asked.names(), config)), asked, real.features),
        "reconstructed": figures(look(judge, rebuilt), pictures, real.features) | {"psnr_db": round(float(psnr), 2)},
        "real": figures(real, pictures, real.features),
    }
    report["real"].pop("kid_x1000", None)  # of a set from itself: no figure
    for name in ("style", "concept_top1"):
        if report["real"][name]:
            report[f"{name}_of_real"] = round(report["drawn"][name] / report["real"][name], 4)
    return report


def judged_plain(
    pipeline: StableDiffusionPipeline, judge: Judge, concepts: Sequence[str], config: Config
) -> dict[str, Any]:
    """Pictures that were asked for by name alone: how many show the concept, and which style they have."""
    drawn = look(judge, draw(pipeline, [(concept, "") for concept in concepts], config))
    concept = torch.arange(len(concepts))
    taken = drawn.style_logits.argmax(1).bincount(minlength=len(judge.styles)) / len(concepts)
    return {
        "pictures": len(concepts),
        "concept_top1": round(drawn.concept_accuracy(concept), 4),
        "concept_top5": round(drawn.concept_accuracy(concept, 5), 4),
        "taken_for": {style: round(float(share), 4) for style, share in zip(judge.styles, taken, strict=True)},
    }


def draw_sheet(pipeline: StableDiffusionPipeline, pictures: Pictures, config: Config, path: Path) -> None:
    """For each style a row drawn and below it the real pictures, the columns SHEET."""
    chosen = [concept for concept in SHEET if concept in pictures.concepts] or pictures.concepts[: len(SHEET)]
    rows = []
    for style in pictures.styles:
        row = pictures.cells([(concept, style) for concept in chosen])
        drawn = ((draw(pipeline, row.names(), config) + 1) * 127.5).round().byte()
        if drawn.shape[1:] != row.pixels.shape[1:]:
            raise DataError(
                f"--sheet: the base draws {drawn.shape[-1]} px, the pictures are {row.pixels.shape[-1]}; build them so "
                "with python -m bench.pocket_data --size-px."
            )
        rows += [torch.cat(list(drawn), 2), torch.cat(list(row.pixels), 2)]
    with atomic_path(path) as temporary:
        Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save(temporary, optimize=True)


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    check_least(config, "judge_steps", "pictures_per_cell", "sampler_steps", "batch")
    if not all(place in config.prompt for place in ("{concept}", "{style}")):
        raise ConfigError(f"--prompt {config.prompt!r}: wanted {{concept}} and {{style}} in it.")
    if not (config.base / "model_index.json").is_file():
        raise BaseModelError(f"--base {config.base}: no folder of a diffusers pipeline; give one, such as RUN/model.")
    pictures = read_pictures(config.data)
    seen, withheld = pictures.apart(withheld_cells(config.data))
    others = read_others(config.data, pictures.styles)
    judge = cached_judge(seen, cache=config.cache, steps=config.judge_steps, seed=config.seed, others=others)
    pipeline = StableDiffusionPipeline.from_pretrained(config.base, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = schedulers.make_scheduler(config.sampler, pipeline.scheduler.config)
    one = [(seen.concepts[0], seen.styles[0], 0)]
    draw_some(pipeline, one, config)
    began = time.perf_counter()
    draw_some(pipeline, one, config)
    report = {
        "prompt": config.prompt,
        "sampler": config.sampler,
        "sampler_steps": config.sampler_steps,
        "guidance": config.guidance,
        "seconds_a_picture": round(time.perf_counter() - began, 3),
        "seen": judged(pipeline, judge, every_other_style(seen) if config.half else seen, config),
        **{
            name: judged(pipeline, judge, cells, config)
            for name, cells in {"withheld": withheld, "withheld_apart": apart(withheld, seen, others)}.items()
            if len(cells.pixels)
        },
        "plain": judged_plain(pipeline, judge, seen.concepts, config),
    }
    if config.sheet is not None:
        draw_sheet(pipeline, pictures, config, config.sheet)
    return report


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.pocket_quality")


if __name__ == "__main__":
    cli.run(main)
