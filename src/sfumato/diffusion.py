"""The forward process, its targets and their weights: pure functions that are handed their noise and timesteps.

Shapes: latents and noise are (batch, channels, height/f, width/f) with f the VAE's factor; alpha_bar is (batch,), the
cumulative product of 1 - beta at each sample's timestep, in [0, 1].
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import randomness

PredictionType = Literal["epsilon", "v_prediction"]


def noise_latents(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """z_t = sqrt(a) z + sqrt(1 - a) noise: the forward diffusion, eq. 4 of Ho et al. 2020."""
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def target(prediction_type: PredictionType, latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the U-Net is asked to predict: the noise, or v = sqrt(a) noise - sqrt(1 - a) z (Salimans & Ho 2022)."""
    if prediction_type == "epsilon":
        return noise
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


def denoised(
    prediction_type: PredictionType, noisy: Tensor, prediction: Tensor, alpha_bar: Tensor
) -> tuple[Tensor, Tensor]:
    """(z, noise) of which `noisy` is the mixture, by a prediction of the noise or of v; the inverse of `target`."""
    a = alpha_bar.view(-1, 1, 1, 1)
    if prediction_type == "epsilon":
        return (noisy - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
    return a.sqrt() * noisy - (1 - a).sqrt() * prediction, a.sqrt() * prediction + (1 - a).sqrt() * noisy


def crossing_noise(latents: Tensor, others: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise e' by which `noise_latents(latents, e')` is what `others` become by `noise`.

    With latents z, others o and noise e: sqrt(a) z + sqrt(1 - a) e' = sqrt(a) o + sqrt(1 - a) e.
    A step on it asks for `latents` where `others` are seen: the target of either prediction type is computed from e'.
    It lies off the unit normal by sqrt(a / (1 - a)) times the difference, so it is for noisy timesteps.
    """
    a = alpha_bar.view(-1, 1, 1, 1)
    return noise + (a / (1 - a)).sqrt() * (others - latents)


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Noise whose mean a picture may shift (Guttenberg 2023), so that very dark and very bright pictures are learned.

    offset: (batch, channels, 1, 1) standard normal numbers.
    """
    return noise + strength * offset


def pyramid_noise(noise: Tensor, coarser: Iterable[Tensor], discount: float) -> Tensor:
    """Noise with more of its power in large shapes (Whitaker 2023, "Multi-Resolution Noise"), each picture's of unit
    deviation.

    noise: (batch, channels, h, w). coarser: standard normal numbers (batch, channels, smaller h, smaller w), from level
    1 on; level i counts discount ** i times. sd-scripts' `multires_noise_discount` is the same number: its level 0,
    more noise in full size, makes every level count 1 / sqrt(2) as much.
    """
    for level, small in enumerate(coarser, 1):
        large = F.interpolate(small, size=noise.shape[-2:], mode="bilinear", align_corners=False)
        noise = noise + discount**level / math.sqrt(2) * large
    return noise / noise.flatten(1).std(1).view(-1, 1, 1, 1)


def huber_scale(alpha_bar: Tensor, least: float) -> Tensor:
    """(batch,): where a pseudo-Huber loss turns from squares to lines, `least` in pure noise and 1 without noise.

    sd-scripts' `huber_schedule=snr`: (1 - least) / (1 + sigma)^2 + least, with sigma^2 = 1 / SNR.
    """
    sigma = ((1 - alpha_bar) / alpha_bar.clamp(min=1e-12)).sqrt()
    return (1 - least) / (1 + sigma).square() + least


def snr_weight(prediction_type: PredictionType, alpha_bar: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma weights (batch,), Hang et al. 2023, section 3.4.

    min(SNR, gamma) weighs the error of the predicted latents; an error in epsilon is SNR times, one in v is SNR + 1
    times as large. At zero terminal SNR the weight for epsilon is its limit, 1.
    """
    snr = alpha_bar / (1 - alpha_bar).clamp(min=1e-12)
    capped = snr.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return capped / (snr + 1)
    return torch.where(snr > 0, capped / snr.clamp(min=1e-12), torch.ones_like(snr))


def debiased_weight(prediction_type: PredictionType, alpha_bar: Tensor) -> Tensor:
    """Weights (batch,) of debiased estimation, Yu et al. 2023 (arXiv:2310.08442): 1 / sqrt(SNR) for epsilon.

    An error in epsilon is SNR times one of the predicted latents, one in v is SNR + 1 times as large, so that v has
    sqrt(SNR) / (SNR + 1). The SNR is capped at 1,000, as in sd-scripts, and at a thousandth, below which the weights
    would go on without end.
    """
    snr = (alpha_bar / (1 - alpha_bar).clamp(min=1e-12)).clamp(1e-3, 1e3)
    return snr.sqrt() / (snr + 1) if prediction_type == "v_prediction" else snr.rsqrt()


def stratified_timesteps(count: int, timesteps: range, seed: int, step: int) -> Tensor:
    """(count,) of these timesteps, one from each of `count` equal slices of them, in random order.

    The loss differs more between timesteps than between pictures; a batch that covers the schedule evenly has a
    gradient of smaller variance (Kingma et al. 2021, appendix I.1).
    """
    slices = torch.tensor(randomness.permutation(count, seed, "timestep slices", step), dtype=torch.float64)
    jitter = torch.tensor([randomness.uniform(seed, "timesteps", step, i) for i in range(count)], dtype=torch.float64)
    total = len(timesteps)
    return timesteps.start + ((slices + jitter) / count * total).long().clamp(max=total - 1)


def weighted_error(
    prediction: Tensor, wanted: Tensor, weight: Tensor, mask: Tensor | None = None, huber: Tensor | None = None
) -> Tensor:
    """(batch,) mean squared errors in fp32, each times its weight.

    mask: (batch, 1, height/f, width/f) in [0, 1]; the mean is taken over the masked-in part, so that a small subject
    teaches as strongly as a large one. huber: (batch,) scales c of a pseudo-Huber loss, 2 c (sqrt(e^2 + c^2) - c) in
    the place of e^2, as sd-scripts has it: errors above c count in proportion, and not by their squares.
    """
    error = (prediction.float() - wanted.float()).square()
    if huber is not None:
        c = huber.view(-1, 1, 1, 1)
        error = 2 * c * error / ((error + c.square()).sqrt() + c)  # the same, without a difference of like numbers
    if mask is None:
        return error.mean(dim=(1, 2, 3)) * weight
    mask = mask.expand_as(error)
    return (error * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)).clamp(min=1e-6) * weight
