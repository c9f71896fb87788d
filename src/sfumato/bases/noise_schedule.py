"""What a base was trained on, told by its scheduler's config: the betas, what is predicted, and a scheduler of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from inspect import signature
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler

from sfumato.errors import BaseModelError
from sfumato.schedulers import OF_THE_BASE, is_sigma_conditioned

PREDICTION_TYPES = ("epsilon", "v_prediction")
_MOST_TIMESTEPS = 100_000


def alpha_bar(config: Mapping[str, Any], name: str) -> torch.Tensor:
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
    settings = {key: config[key] for key in OF_THE_BASE if key in config and key != "prediction_type"}
    try:
        values: torch.Tensor = DDPMScheduler(**settings).alphas_cumprod
    except (NotImplementedError, TypeError, ValueError) as error:
        raise BaseModelError(f"{name}: {' '.join(str(error).split()):.200}. Correct scheduler_config.json.") from None
    return values.float()


def base_scheduler(config: Mapping[str, Any], name: str) -> Any:
    """The base's own diffusers scheduler, from its config; DDIM on the same betas where that one cannot be made.

    name: of the base, for messages. Raises BaseModelError.
    """
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
        betas = {key: value for key, value in config.items() if key in OF_THE_BASE}
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
