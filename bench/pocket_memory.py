"""How much of its pictures the pocket base knows by heart: the error of its predictions on cells it has seen and not.

Real pictures are noised, the same noise for all, and the base is told what they show. Of what it knows by heart it
predicts more than it can see; of a withheld cell, and of a picture that is turned and shifted, it must go by what is
left in the noise. Prints JSON: the mean squared error of v by timestep.

    python -m bench.pocket_memory --data pocket-data
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.judge_pictures import Pictures, read_pictures, withheld_cells
from bench.real import print_report
from sfumato import cli, load_base
from sfumato.data.preparation.latents import to_float
from sfumato.errors import ConfigError, DataError
from sfumato.models import Base, diffusion
from sfumato.precision import decide
from sfumato.training.pretrain.dataset import Move
from sfumato.utils import randomness

TIMESTEPS = 1000


@dataclass(frozen=True)
class Config:
    """Measure how much better the base predicts what it has seen than what it has not."""

    base: str = "pocket"
    """The base."""
    data: Path = Path("pocket-data")
    """The folder that bench/pocket_data.py built."""
    out: Path | None = None
    """File that receives the JSON besides."""
    timesteps: tuple[int, ...] = (50, 150, 250, 350, 450, 550, 650, 750, 850)
    """How much noise, of 1,000."""
    batch: int = 28
    """Pictures in a call."""


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    if wrong := [t for t in config.timesteps if not 0 <= t < TIMESTEPS]:
        raise ConfigError(f"--timesteps {wrong[0]}: wanted numbers from 0 to {TIMESTEPS - 1}.")
    seen, withheld = read_pictures(config.data).apart(withheld_cells(config.data))
    if not len(withheld.pixels):
        raise DataError(f"{config.data}: its manifest.json withholds no cell, so there is nothing to compare with.")
    chosen = [seen.names()[i] for i in randomness.permutation(len(seen.pixels), 0, "seen")[: len(withheld.pixels)]]
    base = load_base(config.base, precision=decide("fp32"))
    report: dict[str, Any] = {"pictures": len(chosen)}
    for name, some in (("seen", seen.cells(chosen)), ("withheld", withheld)):
        for how, pixels in (("", some.pixels), ("_moved", moved(some.pixels))):
            report[name + how] = {t: error(base, some, pixels, t, config.batch) for t in config.timesteps}
    return report


def moved(pixels: Tensor) -> Tensor:
    """(n, 3, h, w) uint8, each turned and shifted by at most 12 px, always in the same way."""
    draws = torch.rand(3, len(pixels), generator=randomness.generator(0, "moved"))
    turns, (down, right) = (1 + draws[0] * 3).long(), ((draws[1:] * 2 - 1) * 12).round().long()
    steps = zip(turns.tolist(), down.tolist(), right.tolist(), strict=True)
    return torch.stack([Move(*step).of(picture) for step, picture in zip(steps, pixels, strict=True)])


@torch.no_grad()
def error(base: Base, pictures: Pictures, pixels: Tensor, timestep: int, batch: int) -> float:
    """The mean squared error of the base's prediction of v for `pixels`, told what `pictures` show."""
    errors = []
    for places in torch.split(torch.arange(len(pixels)), batch):
        latents = base.encode_pixels(to_float(pixels[places]))[0].float()
        noise = torch.stack(
            [randomness.normal(tuple(latents.shape[1:]), 0, "noise", timestep, i) for i in places.tolist()]
        )
        timesteps = torch.full((len(places),), timestep)
        alpha_bar = base.alpha_bar[timesteps]
        text = base.encode_text(
            [f"{concept}, {style} style" for concept, style in (pictures.names()[i] for i in places)]
        )
        predicted = base.unet(diffusion.add_noise(latents, noise, alpha_bar), timesteps, text.hidden).sample
        wanted = diffusion.prediction_target(base.prediction_type, latents, noise, alpha_bar)
        errors.append((predicted - wanted).square().mean((1, 2, 3)))
    return round(float(torch.cat(errors).mean()), 4)


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.pocket_memory")


if __name__ == "__main__":
    cli.run(main)
