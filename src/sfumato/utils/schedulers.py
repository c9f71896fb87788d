"""The samplers one can draw with, by the names people know: a diffusers scheduler each, on the base's own schedule.

Importing this loads no torch, so that a misspelt name is an error before a base is read.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sfumato.errors import ConfigError

KARRAS = MappingProxyType({"use_karras_sigmas": True})


@dataclass(frozen=True)
class Sampler:
    """A sampler. label, schedule: A1111's "Sampler" and "Schedule type". settings: beside the base's own schedule.
    options: of a pipeline's call."""

    label: str
    class_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    schedule: str | None = None
    needs: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def _dpm(label: str, algorithm: str = "dpmsolver++", order: int = 2) -> Sampler:
    return Sampler(label, "DPMSolverMultistepScheduler", {"algorithm_type": algorithm, "solver_order": order})


def _karras(sampler: Sampler) -> Sampler:
    return Sampler(sampler.label, sampler.class_name, {**sampler.settings, **KARRAS}, "Karras", sampler.needs)


def _sgm(sampler: Sampler) -> Sampler:
    """From the very last timestep on, in equal steps: of few, as for Lightning and Turbo, none begins too late."""
    spaced = {**sampler.settings, "timestep_spacing": "trailing"}
    return Sampler(sampler.label, sampler.class_name, spaced, "SGM Uniform", sampler.needs)


_PLAIN = {
    "ddim": Sampler("DDIM", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": Sampler("DDPM", "DDPMScheduler", {"clip_sample": False}),
    "pndm": Sampler("PLMS", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "euler": Sampler("Euler", "EulerDiscreteScheduler"),
    "euler a": Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
    "heun": Sampler("Heun", "HeunDiscreteScheduler"),
    "lms": Sampler("LMS", "LMSDiscreteScheduler", needs="scipy"),
    "dpm2": Sampler("DPM2", "KDPM2DiscreteScheduler"),
    "dpm2 a": Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
    "dpm++ 2m": _dpm("DPM++ 2M"),
    "dpm++ 2m sde": _dpm("DPM++ 2M SDE", "sde-dpmsolver++"),
    "dpm++ 3m": _dpm("DPM++ 3M", order=3),
    "unipc": Sampler("UniPC", "UniPCMultistepScheduler"),
    "deis": Sampler("DEIS", "DEISMultistepScheduler"),
    # For models and adapters that are distilled for few steps (latent and trajectory consistency), with guidance 1.
    "lcm": Sampler("LCM", "LCMScheduler"),
    # Its eta is the paper's gamma, 0.3 there; with a pipeline's own 0 it would be DDIM, which makes no noise.
    "tcd": Sampler("TCD", "TCDScheduler", options={"eta": 0.3}),
}
_WITH_KARRAS = ("euler", "heun", "lms", "dpm2", "dpm2 a", "dpm++ 2m", "dpm++ 2m sde", "unipc", "deis")

_WITH_SGM = ("euler", "euler a", "heun", "dpm++ 2m", "dpm++ 2m sde", "unipc")
SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    _PLAIN
    | {f"{name} karras": _karras(_PLAIN[name]) for name in _WITH_KARRAS}
    | {f"{name} sgm uniform": _sgm(_PLAIN[name]) for name in _WITH_SGM}
)
_ALIASES = {name.replace(" ", ""): name for name in SAMPLERS} | {
    "dpm++": "dpm++ 2m",
    "dpmsolver++": "dpm++ 2m",
    "plms": "pndm",
    "unipcbh2": "unipc",
    # Their own timesteps are nearly these.
    "lcmsgmuniform": "lcm",
    "tcdsgmuniform": "tcd",
}
_UNSUPPORTED = frozenset({"ipndm", "ipndm v"})
"""Samplers of other programs that look like a misspelt one."""

BASE_CONFIG_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
"""What a scheduler's config says of the base, and not of how it is drawn."""
_SCHEDULE = (*BASE_CONFIG_KEYS, "timestep_spacing", "steps_offset")
"""What a sampler takes from the base's; everything else would be another sampler's setting."""


def find_sampler(name: str) -> Sampler:
    """The sampler of this name, as A1111, ComfyUI, sd-scripts or k-diffusion may spell it: capitals, spaces, "-" and
    "_" do not matter. Raises ConfigError."""
    plain = " ".join(re.split(r"[\s_-]+", name.lower())).strip().replace("dpmpp", "dpm++")
    plain = re.sub(r" ancestral\b", " a", plain.removeprefix("k ").removesuffix(" gpu"))
    known = _ALIASES.get(plain.replace(" ", ""))
    if known is None:
        near = next((other for other in SAMPLERS if _is_misspelt(plain, other)), None)
        hint = f"did you mean {near!r}?" if near else f"wanted one of {', '.join(SAMPLERS)}."
        raise ConfigError(f"--sampler {name}: unknown; {hint}")
    return SAMPLERS[known]


def _is_misspelt(name: str, known: str) -> bool:
    """Whether each word of one is nearly that of the other. Short words and those with digits tell samplers apart."""

    def near(word: str, other: str) -> bool:
        if word == other:
            return True
        if len(word) < 4 or any(letter.isdigit() for letter in word + other):
            return False
        return difflib.SequenceMatcher(None, word, other).ratio() > 0.75

    words, others = name.split(), known.split()
    return len(words) == len(others) and name not in _UNSUPPORTED and all(map(near, words, others))


def make_scheduler(name: str, schedule: Mapping[str, Any]) -> Any:
    """A fresh diffusers scheduler with the betas and the prediction type of `schedule`, a base scheduler's config.

    Raises ConfigError for an unknown name, a package that is missing, a schedule without betas, or a base that ends in
    pure noise (zero terminal SNR) where the sampler cannot begin there.
    """
    chosen = find_sampler(name)
    if is_sigma_conditioned(schedule) or not {"beta_start", "trained_betas"} & set(schedule):
        raise ConfigError(
            f"--sampler {name}: this base's schedule has no betas to draw by. Leave a pipeline its own scheduler."
        )
    if chosen.needs and importlib.util.find_spec(chosen.needs) is None:
        raise ConfigError(f"--sampler {name}: needs {chosen.needs}, which is not installed. pip install {chosen.needs}")
    import diffusers

    kind = getattr(diffusers, chosen.class_name)
    known = inspect.signature(kind.__init__).parameters
    shared = {key: schedule[key] for key in _SCHEDULE if key in schedule}
    if "timestep_spacing" in schedule.get("_use_default_values", ()):
        del shared["timestep_spacing"]  # of the base's own sampler, where its file says nothing
    if shared.get("rescale_betas_zero_snr"):
        if "rescale_betas_zero_snr" not in known:
            raise ConfigError(f"--sampler {name}: cannot draw on a base with zero terminal SNR. Take ddim or euler.")
        if chosen.settings.get("use_karras_sigmas"):
            # From a sigma of thousands Karras' steps lie so close at first that their timesteps are one and the same.
            raise ConfigError(
                f"--sampler {name}: Karras' schedule spends its steps in pure noise on a base with zero terminal SNR. "
                f"Take {re.sub(r'[ _-]*karras$', '', name, flags=re.IGNORECASE)}."
            )
        shared["timestep_spacing"] = "trailing"  # starts at the last timestep, pure noise, as training saw it
    return kind.from_config({key: value for key, value in {**shared, **chosen.settings}.items() if key in known})


def is_sigma_conditioned(schedule: Mapping[str, Any]) -> bool:
    """Whether a scheduler of this config tells the U-Net the logarithm of sigma, as EDM's do, and not a timestep."""
    continuous = schedule.get("timestep_type") == "continuous" and schedule.get("prediction_type") == "v_prediction"
    return "sigma_data" in schedule or continuous


def scheduler_label(scheduler: Any) -> tuple[str, str | None]:
    """(Sampler, Schedule type) of a diffusers scheduler for the picture's settings; its class name if it is another."""
    config = scheduler.config
    for sampler in SAMPLERS.values():
        asked = {"use_karras_sigmas": False, **sampler.settings} if "use_karras_sigmas" in config else sampler.settings
        if type(scheduler).__name__ == sampler.class_name and all(
            config.get(key) == value for key, value in asked.items() if key not in ("clip_sample", "set_alpha_to_one")
        ):
            return sampler.label, sampler.schedule
    return type(scheduler).__name__.removesuffix("Scheduler"), None
