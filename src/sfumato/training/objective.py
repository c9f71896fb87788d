"""The denoising error of a batch: what every trainer of this package lowers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato import diffusion, randomness

if TYPE_CHECKING:
    from sfumato.bases import Base, TextEmbedding
    from sfumato.data import Batch


def draw_noise(batch: Batch, seed: int, step: int, first: int, *, offset: float = 0.0, pyramid: float = 0.0) -> Tensor:
    """The batch's noise in its latents' shape, each picture's a function of (seed, step, place in the global batch).

    first: the place of the batch's first picture. offset: strength of a constant per channel (Guttenberg 2023).
    pyramid: discount of `diffusion.pyramid_noise`, 0 for none.
    """
    sides = batch.latents.shape[2:]
    noise = _numbers(batch, seed, "noise", step, first, *sides)
    if pyramid:
        levels = [_coarser(own, seed, step, place) for place, own in enumerate(noise, first)]
        each = zip(noise[:, None], levels, strict=True)
        noise = torch.cat([diffusion.pyramid_noise(own, coarser, pyramid) for own, coarser in each])
    if offset:
        noise = diffusion.offset_noise(noise, _numbers(batch, seed, "noise offset", step, first, 1, 1), offset)
    return noise.to(batch.latents)


def draw_perturbation(batch: Batch, seed: int, step: int, first: int) -> Tensor:
    """Further noise in the latents' shape, a function of the same as `draw_noise`'s."""
    return _numbers(batch, seed, "input perturbation", step, first, *batch.latents.shape[2:]).to(batch.latents)


def _numbers(batch: Batch, seed: int, stream: str, step: int, first: int, *sides: int) -> Tensor:
    """Standard normal numbers, (batch, channels, *sides), each picture's those of its place."""
    count, channels = batch.latents.shape[:2]
    drawn = [randomness.normal((channels, *sides), seed, stream, step, first + place) for place in range(count)]
    return torch.stack(drawn)


def _coarser(noise: Tensor, seed: int, step: int, place: int) -> list[Tensor]:
    """The levels of one picture's pyramid, level i 2^i to 4^i times as coarse as (channels, h, w), down to a pixel."""
    draw = randomness.generator(seed, "pyramid noise", step, place)
    channels, *full = noise.shape
    levels: list[Tensor] = []
    while not levels or min(levels[-1].shape[-2:]) > 1:
        ratio = 2 + 2 * float(torch.rand((), generator=draw))
        sides = [max(1, int(side / ratio ** (len(levels) + 1))) for side in full]
        levels.append(torch.randn(1, channels, *sides, generator=draw))
    return levels


def predict(base: Base, batch: Batch, noise: Tensor, timesteps: Tensor, text: TextEmbedding) -> Tensor:
    """What the base predicts of the batch's latents with this noise; arguments as of `denoising_errors`."""
    alpha_bar = base.alpha_bar.to(batch.latents.device)[timesteps]
    noisy = diffusion.noise_latents(batch.latents, noise, alpha_bar)
    return base.predict(noisy, timesteps, text, batch.added(base, text), batch.known)


def denoising_errors(
    base: Base,
    batch: Batch,
    noise: Tensor,
    timesteps: Tensor,
    text: TextEmbedding,
    *,
    min_snr: float | None = None,
    huber: float = 0.0,
    debiased: bool = False,
    target: Tensor | None = None,
) -> Tensor:
    """(batch,): each picture's mean squared error of the base's prediction, eq. 14 of Ho et al. 2020.

    noise: as the latents. timesteps: (batch,) integers on the latents' device. text: the captions' embeddings.
    min_snr: gamma of Hang et al. 2023, 0 or None for none. huber: the least scale of `diffusion.huber_scale`, 0 for
    squared errors. debiased: weigh by `diffusion.debiased_weight` instead of min_snr. target: what is to be predicted,
    noise or v of the latents if None. The batch's mask and its pictures' weights count.
    """
    prediction = predict(base, batch, noise, timesteps, text)
    alpha_bar = base.alpha_bar.to(batch.latents.device)[timesteps]
    wanted = diffusion.target(base.prediction_type, batch.latents, noise, alpha_bar) if target is None else target
    weight = torch.ones_like(alpha_bar)
    if debiased:
        weight = diffusion.debiased_weight(base.prediction_type, alpha_bar)
    elif min_snr:
        weight = diffusion.snr_weight(base.prediction_type, alpha_bar, min_snr)
    scales = diffusion.huber_scale(alpha_bar, huber) if huber else None
    errors = diffusion.weighted_error(prediction, wanted, weight, batch.mask, scales)
    return errors * batch.weights.to(errors.device)
