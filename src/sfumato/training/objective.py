"""The denoising error of a batch: what every trainer of this package lowers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato import diffusion, randomness

if TYPE_CHECKING:
    from sfumato.bases import Base, TextEmbedding
    from sfumato.data import Batch


def draw_noise(batch: Batch, seed: int, step: int, first: int, *, offset: float = 0.0) -> Tensor:
    """The batch's noise in its latents' shape, each picture's a function of (seed, step, place in the global batch).

    first: the place of the batch's first picture. offset: strength of a constant per channel (Guttenberg 2023).
    """
    count, *shape = batch.latents.shape
    places = range(first, first + count)
    noise = torch.stack([randomness.normal(tuple(shape), seed, "noise", step, place) for place in places])
    if offset:
        channel = (shape[0], 1, 1)
        constant = torch.stack([randomness.normal(channel, seed, "noise offset", step, place) for place in places])
        noise = diffusion.offset_noise(noise, constant, offset)
    return noise.to(batch.latents)


def predict(base: Base, batch: Batch, noise: Tensor, timesteps: Tensor, text: TextEmbedding) -> Tensor:
    """What the base predicts of the batch's latents with this noise; arguments as of `denoising_errors`."""
    alpha_bar = base.alpha_bar.to(batch.latents.device)[timesteps]
    noisy = diffusion.noise_latents(batch.latents, noise, alpha_bar)
    return base.predict(noisy, timesteps, text, batch.added(base, text))


def denoising_errors(
    base: Base,
    batch: Batch,
    noise: Tensor,
    timesteps: Tensor,
    text: TextEmbedding,
    *,
    min_snr: float | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """(batch,): each picture's mean squared error of the base's prediction, eq. 14 of Ho et al. 2020.

    noise: as the latents. timesteps: (batch,) integers on the latents' device. text: the captions' embeddings.
    min_snr: gamma of Hang et al. 2023, 0 or None for none. target: what is to be predicted, noise or v of the latents
    if None. The batch's mask and its pictures' weights count.
    """
    prediction = predict(base, batch, noise, timesteps, text)
    alpha_bar = base.alpha_bar.to(batch.latents.device)[timesteps]
    wanted = diffusion.target(base.prediction_type, batch.latents, noise, alpha_bar) if target is None else target
    weight = torch.ones_like(alpha_bar)
    if min_snr:
        weight = diffusion.snr_weight(base.prediction_type, alpha_bar, min_snr)
    errors = diffusion.weighted_error(prediction, wanted, weight, batch.mask)
    return errors * batch.weights.to(errors.device)
