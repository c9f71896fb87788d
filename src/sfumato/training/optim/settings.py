"""Settings of optimizers by the names of their papers: what they are by default, and what `--optimizer-args` says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from sfumato.errors import ConfigError, did_you_mean

OptimizerName = Literal["adamw", "muon", "adamw8bit", "adafactor", "prodigy", "lion"]

Setting = bool | float | tuple[float, float]
_Range = tuple[Callable[[float], bool], str]

_MOMENTS: Mapping[str, Setting] = MappingProxyType({"betas": (0.9, 0.99), "eps": 1e-8})
DEFAULTS: Mapping[OptimizerName, Mapping[str, Setting]] = MappingProxyType(
    {
        "adamw": _MOMENTS,
        "adamw8bit": _MOMENTS,
        "prodigy": {
            **_MOMENTS, "d0": 1e-6, "d_coef": 1.0, "growth_rate": math.inf, "safeguard_warmup": True,
            "use_bias_correction": True,
        },
        "lion": {"betas": (0.9, 0.99)},
        # Steps no larger for larger weights: an adapter begins at zeros.
        "adafactor": {"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "scale_parameter": False},
        "muon": {"momentum": 0.9},
    }
)  # fmt: skip
"""What `--optimizer-args` may change, and its value otherwise. Not what would change the size of the state."""
_ALWAYS: Mapping[str, Mapping[str, Setting]] = MappingProxyType(
    {
        "adamw": {"amsgrad": False},
        "adamw8bit": {"amsgrad": False},
        "prodigy": {"decouple": True},
        "adafactor": {"relative_step": False, "warmup_init": False},
    }
)
"""What recipes for other tools state, and is always so."""
_POSITIVE: _Range = (lambda number: 0 < number < math.inf, "above 0")
_SHARE: _Range = (lambda number: 0 <= number < 1, "at least 0 and below 1")
_RANGES: Mapping[str, _Range] = MappingProxyType(
    {
        "betas": _SHARE,
        "momentum": _SHARE,
        "decay_rate": (lambda number: -math.inf < number < 0, "below 0"),
        "growth_rate": (lambda number: number > 1, "above 1"),
    }
)
_OPTIONS: Mapping[str, str] = MappingProxyType({"lr": "--learning-rate", "weight_decay": "--weight-decay"})


def settings(name: OptimizerName, given: Sequence[str] = ()) -> dict[str, Setting]:
    """The settings of the optimizer called `name`, those in `given` (each NAME=VALUE) in place of its defaults.

    Raises ConfigError for what it does not have, and for values that it cannot have.
    """
    defaults, fixed = DEFAULTS[name], _ALWAYS.get(name, {})
    found: dict[str, Setting] = {}
    for text in given:
        key, _, written = (part.strip() for part in text.partition("="))
        if key in _OPTIONS:
            raise ConfigError(f"--optimizer-args {text!r:.60}: that is an option here, {_OPTIONS[key]} {written}.")
        if key in found:
            raise ConfigError(f"--optimizer-args: {key} is given twice; leave one of them.")
        if key not in defaults and key not in fixed:
            raise ConfigError(
                f"--optimizer-args {text!r:.60}: {name} has no such setting; {did_you_mean(key, defaults)}"
            )
        found[key] = _value(key, written, {**defaults, **fixed}[key])
        if found[key] != fixed.get(key, found[key]):
            raise ConfigError(f"--optimizer-args {text!r:.60}: {key} is always {fixed[key]} here; leave it out.")
    return {**defaults, **{key: value for key, value in found.items() if key in defaults}}


def _value(key: str, written: str, usual: Setting) -> Setting:
    """The written value, of the type of the usual one."""
    if isinstance(usual, bool):
        if written.lower() in ("true", "false"):
            return written.lower() == "true"
        wanted = "true or false"
    else:
        is_good, within = _RANGES.get(key, _POSITIVE)
        numbers = _numbers(written)
        if isinstance(usual, tuple):
            if len(numbers) == 2 and all(map(is_good, numbers)):
                return numbers[0], numbers[1]
            wanted = f"two numbers {within}, such as {key}={usual[0]:g},{usual[1]:g}"
        else:
            if len(numbers) == 1 and is_good(numbers[0]):
                return numbers[0]
            wanted = f"a number {within}, such as {key}={usual:g}"
    raise ConfigError(f"--optimizer-args '{key}={written:.60}': wanted {wanted}.")


def _numbers(written: str) -> list[float]:
    """The numbers between commas, in brackets or not; none where something else is among them."""
    try:
        return [float(part) for part in written.strip("()[]").split(",")]
    except ValueError:
        return []
