"""What a training's checkpoints hold of it: modules, optimizers, and all else that has a state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import RunError


class CheckpointedParts:
    """parts: by name, each with `state_dict` and `load_state_dict`."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """The state of each part, by its name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def bytes_to_come(self) -> int:
        """What the states will hold after the first step and do not hold yet: the moments of optimizers."""
        optimizers = [part for part in self.parts.values() if isinstance(part, torch.optim.Optimizer)]
        return sum(
            getattr(each, "state_bytes", _two_moments)(p.shape)
            for each in optimizers
            if not each.state
            for group in each.param_groups
            for p in group["params"]
        )

    def load(self, states: Mapping[str, Any], step: int) -> None:
        """Give the parts what `state` gave of them after `step`. Raises RunError for states of other parts."""
        if lacking := self.parts.keys() ^ states.keys():
            raise RunError(
                f"the checkpoint of step {step} has other parts than this training ({', '.join(sorted(lacking))}); "
                "resume it with the program that wrote it."
            )
        for name, part in self.parts.items():
            try:
                _load(part, states[name])
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise RunError(
                    f"the checkpoint of step {step} does not fit: {name}: {' '.join(str(error).split())[:200]}. "
                    "Resume with the settings, the program and the version that wrote it."
                ) from None


def _load(part: Any, state: Any) -> None:
    """Give a part its state; an optimizer keeps the settings it was built with, which --force may have changed.

    A gradient scaler takes none from where nothing was scaled, in bf16 or fp32, and finds its scale anew.
    """
    if isinstance(part, torch.amp.GradScaler) and not state:
        return
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(state)
        return
    names = getattr(part, "given", ("weight_decay",))
    own = [{name: group[name] for name in names if name in group} for group in part.param_groups]
    part.state.clear()  # a run that goes back has moments already, and two of each would be in memory at once
    part.load_state_dict(state)
    for group, settings in zip(part.param_groups, own, strict=True):
        group.update(settings)
    # A checkpoint holds numbers in the order of their places, and fused optimizers take those of a moment and of its
    # weight, which may be channels_last, as they lie in memory.
    for parameter, moments in part.state.items():
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape and moment.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype, device=moment.device).copy_(moment)


def _two_moments(shape: Sequence[int]) -> int:
    """Bytes of AdamW's moments of a weight."""
    return 8 * math.prod(shape)
