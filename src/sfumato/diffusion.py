"""The forward process, its targets and their weights: pure functions that are handed their noise and timesteps.

Shapes: latents and noise are (batch, channels, height/f, width/f) with f the VAE's factor; alpha_bar is (batch,), the
cumulative product of 1 - beta at each sample's timestep, in [0, 1].
"""

from typing import Literal

import torch
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


def stratified_timesteps(count: int, timesteps: range, seed: int, step: int) -> Tensor:
    """(count,) of these timesteps, one from each of `count` equal slices of them, in random order.

    The loss differs more between timesteps than between pictures; a batch that covers the schedule evenly has a
    gradient of smaller variance (Kingma et al. 2021, appendix I.1).
    """
    slices = torch.tensor(randomness.permutation(count, seed, "timestep slices", step), dtype=torch.float64)
    jitter = torch.tensor([randomness.uniform(seed, "timesteps", step, i) for i in range(count)], dtype=torch.float64)
    total = len(timesteps)
    return timesteps.start + ((slices + jitter) / count * total).long().clamp(max=total - 1)


def weighted_error(prediction: Tensor, wanted: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """(batch,) mean squared errors in fp32, each times its weight.

    mask: (batch, 1, height/f, width/f) in [0, 1]; the mean is taken over the masked-in part, so that a small subject
    teaches as strongly as a large one.
    """
    error = (prediction.float() - wanted.float()).square()
    if mask is None:
        return error.mean(dim=(1, 2, 3)) * weight
    mask = mask.expand_as(error)
    return (error * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)).clamp(min=1e-6) * weight
