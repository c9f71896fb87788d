"""The samplers one can draw with: a diffusers scheduler each, set up from the base's own schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import diffusers

from sfumato.errors import ConfigError


@dataclass(frozen=True)
class Sampler:
    """A sampler. label: its name in A1111's picture info."""

    label: str
    class_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": Sampler("DDIM", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
        "dpm++": Sampler("DPM++ 2M", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        "euler": Sampler("Euler", "EulerDiscreteScheduler"),
        "euler-a": Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
        "unipc": Sampler("UniPC", "UniPCMultistepScheduler"),
    }
)
_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
)
"""What a sampler takes from the base; everything else would be another sampler's setting."""


def sampler(name: str, schedule: Mapping[str, Any]) -> Any:
    """A fresh diffusers scheduler. schedule: the config of the base's own. Raises ConfigError for an unknown name."""
    if name not in SAMPLERS:
        raise ConfigError(f"--sampler {name}: unknown; wanted one of {', '.join(SAMPLERS)}.")
    chosen = SAMPLERS[name]
    shared = {key: schedule[key] for key in _SCHEDULE if key in schedule}
    if shared.get("rescale_betas_zero_snr"):
        shared["timestep_spacing"] = "trailing"  # starts at the last timestep, pure noise, as training saw it
    return getattr(diffusers, chosen.class_name).from_config(shared | dict(chosen.settings))
