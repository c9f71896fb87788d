"""The forward process, its targets and their weights: pure functions that are handed their noise and timesteps.

Shapes: latents and noise are (batch, channels, height/f, width/f) with f the VAE's factor; alpha_bar is (batch,), the
cumulative product of 1 - beta at each sample's timestep, in [0, 1].

A flow (Lipman et al. 2023; Liu et al. 2022) is told by the same number: it mixes z_t = (1 - s) z + s noise, which is
the discrete mixture on another scale, with sqrt(a) : sqrt(1 - a) = (1 - s) : s. So alpha_bar is 1 / (1 + 1 / SNR) in
either process, and what depends on the signal-to-noise ratio alone is the same.

What a base was trained on, told by its scheduler's config: the betas, what is predicted, and a scheduler of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BaseModelError
from sfumato.utils import randomness
from sfumato.utils.schedulers import BASE_CONFIG_KEYS, is_sigma_conditioned

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction"]
"""What a denoiser predicts, by diffusers' names; the last is the velocity of a flow, the others are discrete."""


def flow_share(alpha_bar: Tensor) -> Tensor:
    """s, the share of noise of a flow at these."""
    a = alpha_bar.view(-1, 1, 1, 1)
    return (1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt())


def flow_alpha_bar(count: int) -> Tensor:
    """(count,) fp32: alpha_bar of a flow at the shares of noise 1 / count, 2 / count, ..., 1."""
    s = torch.arange(1, count + 1, dtype=torch.float64) / count
    return ((1 - s).square() / ((1 - s).square() + s.square())).float()


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: PredictionType = "epsilon") -> Tensor:
    """z_t = sqrt(a) z + sqrt(1 - a) noise: the forward diffusion, eq. 4 of Ho et al. 2020; (1 - s) z + s noise of a
    flow."""
    if prediction_type == "flow_prediction":
        return torch.lerp(latents, noise, flow_share(alpha_bar).to(latents.dtype))
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def prediction_target(prediction_type: PredictionType, latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the denoiser is asked to predict: the noise, v = sqrt(a) noise - sqrt(1 - a) z (Salimans & Ho 2022), or the
    velocity noise - z."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "flow_prediction":
        return noise - latents
    a = alpha_bar.view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


def split_prediction(
    prediction_type: PredictionType, noisy: Tensor, prediction: Tensor, alpha_bar: Tensor
) -> tuple[Tensor, Tensor]:
    """(z, noise) of which `noisy` is the mixture, by a prediction as of `target`, whose inverse this is."""
    if prediction_type == "flow_prediction":
        s = flow_share(alpha_bar)
        return noisy - s * prediction, noisy + (1 - s) * prediction
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
    times, one in a flow's velocity is (sqrt(SNR) + 1)^2 times as large. At zero terminal SNR the weight for epsilon is
    its limit, 1.
    """
    snr = alpha_bar / (1 - alpha_bar).clamp(min=1e-12)
    capped = snr.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return capped / (snr + 1)
    if prediction_type == "flow_prediction":
        return capped / (snr.sqrt() + 1).square()
    return torch.where(snr > 0, capped / snr.clamp(min=1e-12), torch.ones_like(snr))


def debiased_weight(prediction_type: PredictionType, alpha_bar: Tensor) -> Tensor:
    """Weights (batch,) of debiased estimation, Yu et al. 2023 (arXiv:2310.08442): 1 / sqrt(SNR) for epsilon.

    An error in epsilon is SNR times one of the predicted latents, one in v is SNR + 1 times as large, so that v has
    sqrt(SNR) / (SNR + 1). The SNR is capped at 1,000, as in sd-scripts, and at a thousandth, below which the weights
    would go on without end.
    """
    snr = (alpha_bar / (1 - alpha_bar).clamp(min=1e-12)).clamp(1e-3, 1e3)
    if prediction_type == "flow_prediction":
        return snr.sqrt() / (snr.sqrt() + 1).square()
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


def weighted_loss(
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


PREDICTION_TYPES = ("epsilon", "v_prediction")
_MOST_TIMESTEPS = 100_000


def alphas_cumprod(config: Mapping[str, Any], name: str) -> torch.Tensor:
    """(T,) fp32: the cumulative product of 1 - beta that a scheduler's config describes, falling from almost 1.

    Zero terminal SNR (Lin et al. 2023, algorithm 1) makes the last one exactly 0, where epsilon says nothing about the
    picture. Raises BaseModelError for that, and for schedules without betas.
    """
    without = str(config.get("_class_name", "")).startswith("EDM") or "FlowMatch" in str(config.get("_class_name", ""))
    if without or is_sigma_conditioned(config) or "num_train_timesteps" not in config:
        raise BaseModelError(f"{name}: {config.get('_class_name')} has no betas. Name SD 1.x, SD 2.x or SDXL.")
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise BaseModelError(f"{name}: predicts {kind!r}; wanted epsilon or v_prediction. Say --prediction-type.")
    if config.get("rescale_betas_zero_snr") and kind == "epsilon":
        raise BaseModelError(
            f"{name}: zero terminal SNR, where epsilon says nothing of the image at the last timestep. "
            "Say --prediction-type v_prediction, or leave --zero-terminal-snr out."
        )
    _check_timesteps(config, name)
    from diffusers import DDPMScheduler  # not before: mixing adapters needs none of it

    settings = {key: config[key] for key in BASE_CONFIG_KEYS if key in config and key != "prediction_type"}
    try:
        values: torch.Tensor = DDPMScheduler(**settings).alphas_cumprod
    except (NotImplementedError, TypeError, ValueError) as error:
        raise BaseModelError(f"{name}: {' '.join(str(error).split()):.200}. Correct scheduler_config.json.") from None
    return values.float()


def flow_alphas_cumprod(config: Mapping[str, Any], name: str) -> torch.Tensor:
    """(T,) fp32 of a flow, by its scheduler's config: see `sfumato.models.diffusion`."""
    _check_timesteps(config, name)
    return flow_alpha_bar(int(config.get("num_train_timesteps", 1000)))


def base_scheduler(config: Mapping[str, Any], name: str) -> Any:
    """The base's own diffusers scheduler, from its config; DDIM on the same betas where that one cannot be made.

    name: of the base, for messages. Raises BaseModelError.
    """
    import diffusers

    _check_timesteps(config, name)
    class_name = str(config.get("_class_name", "DDIMScheduler"))
    found = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if found is None:
        raise BaseModelError(f"{name}: diffusers has no scheduler {class_name}. Correct scheduler_config.json.")
    settings = dict(config)
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in signature(found.__init__).parameters:
        # PNDM and others would keep the key and draw without it, also from a folder that is written.
        found = diffusers.DDIMScheduler
        settings |= {"clip_sample": False, "timestep_spacing": "trailing"}
    try:
        return found.from_config(settings)
    except Exception as error:  # the library checks each value in a way of its own, or not at all
        # The base is as good as any: what trains and draws it takes the betas alone.
        betas = {key: value for key, value in config.items() if key in BASE_CONFIG_KEYS}
        try:
            instead = diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False)
        except Exception as wrong:
            reason = " ".join(str(wrong).split())
            raise BaseModelError(f"{name}: {reason:.200}. Correct scheduler_config.json.") from None
        reason = " ".join(str(error).split())
        warnings.warn(f"{name}: {class_name} cannot be made ({reason:.120}); DDIM stands in for it", stacklevel=2)
        return instead


def _check_timesteps(config: Mapping[str, Any], name: str) -> None:
    """Raises BaseModelError for as many as no base has: each takes memory, in many a scheduler."""
    steps = config.get("num_train_timesteps", 1)
    if type(steps) is not int or not 1 <= steps <= _MOST_TIMESTEPS:
        raise BaseModelError(
            f"{name}: num_train_timesteps is {steps!r:.40}; wanted a whole number from 1 to {_MOST_TIMESTEPS:,}. "
            "Correct scheduler_config.json."
        )
