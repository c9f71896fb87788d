"""The latents that the pocket base learns from: of pictures as they are kept, of changed ones made when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.data.latents import check_finite, to_floats
from sfumato.pocket.lessons import Lesson
from sfumato.pocket.pictures import VARIANTS, Pictures, Variant
from sfumato.pocket.style_augmentation import restyle

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Latents:
    """Mean and deviation of the scaled latents of pictures in some variants.

    Latents can neither be mirrored nor recolored themselves, so each variant is encoded once; moves and hands are too
    many.
    """

    def __init__(
        self, vae: AutoencoderKL, pictures: Pictures, variants: Sequence[Variant], device: torch.device
    ) -> None:
        self.vae, self.pictures, self.device = vae, pictures, device
        self.scale: float = vae.config.scaling_factor
        caches = [encode_all(vae, pictures.varied(variant), device) for variant in variants]
        self.means, self.deviations = (torch.stack(pair) * self.scale for pair in zip(*caches, strict=True))

    def of(self, lesson: Lesson) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation of what the lesson asks for, and the mean of what it shows, (batch, 4, h/4, w/4) fp32."""
        mean, deviation = self.means[lesson.variants, lesson.asked], self.deviations[lesson.variants, lesson.asked]
        seen = self.means[lesson.variants, lesson.seen]
        if places := sorted({*lesson.moves, *lesson.hands}):
            mean[places], deviation[places] = self._changed(places, lesson.asked, lesson)
            seen[places] = mean[places]
            if crossed := [p for p in places if lesson.seen[p] != lesson.asked[p]]:
                seen[crossed], _ = self._changed(crossed, lesson.seen, lesson)
        return mean, deviation, seen

    def _changed(self, places: Sequence[int], indices: Sequence[int], lesson: Lesson) -> tuple[Tensor, Tensor]:
        """Of pictures that are moved, by another hand, or both."""
        pictures = [VARIANTS[lesson.variants[p]].of(self.pictures.pixels[indices[p]]) for p in places]
        moved = [lesson.moves[p].of(one) if p in lesson.moves else one for p, one in zip(places, pictures, strict=True)]
        pixels = to_floats(torch.stack(moved).to(self.device))
        if by_others := [row for row, p in enumerate(places) if p in lesson.hands]:
            pixels[by_others] = restyle(pixels[by_others], [lesson.hands[places[row]] for row in by_others])
        mean, deviation = encode(self.vae, pixels)
        return mean * self.scale, deviation * self.scale


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the unscaled latents of (b, 3, h, w) in [-1, 1], each (b, 4, h/4, w/4) fp32."""
    posterior = vae.encode(pixels).latent_dist
    return posterior.mean, posterior.std


def encode_all(vae: AutoencoderKL, pictures: Pictures, device: torch.device) -> tuple[Tensor, Tensor]:
    """Those of every picture, each (n, 4, h/4, w/4). Raises DataError where one is not finite."""
    means, deviations = [], []
    for chunk in torch.split(torch.arange(len(pictures.names)), 64):
        mean, deviation = encode(vae, pictures.floats(chunk).to(device))
        check_finite(mean, deviation, [" ".join(pictures.names[i]) for i in chunk.tolist()])
        means.append(mean)
        deviations.append(deviation)
    return torch.cat(means), torch.cat(deviations)
