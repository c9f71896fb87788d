"""Whether a training's numbers are numbers, found within the step in which they stop being some."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

BAD_IN_A_ROW = 3
"""Steps with broken numbers one after another that can no longer be an accident."""


class Health:
    """Counts broken steps. broken: why the run cannot go on from here, empty while it can.

    bad: a line on each broken step since the last healthy one; a part of the run's state.
    """

    def __init__(self) -> None:
        self.bad: list[str] = []
        self.broken = ""

    def check(self, number: int, named: Mapping[str, float | Tensor]) -> str:
        """What is wrong with these numbers of step `number`, counted from 0; empty if all are finite."""
        names = not_finite(named)
        if not names:
            self.bad = []
            return ""
        self.bad.append(f"step {number + 1}: {names} not finite")
        if len(self.bad) >= BAD_IN_A_ROW:
            self.broken = f"{self.bad[-1]}, in {len(self.bad)} steps in a row"
        return self.bad[-1]

    def check_weights(self, number: int, parts: Iterable[Any]) -> None:
        """After the optimizer: weights that are no numbers any more cannot be skipped, only gone back from.

        parts: what the run keeps; the optimizers among them know the trained weights. One wait for the device.
        """
        weights = [
            p.detach()
            for part in parts
            if isinstance(part, torch.optim.Optimizer)
            for group in part.param_groups
            for p in group["params"]
        ]
        if weights and not _are_finite(weights):
            self.broken = f"step {number + 1}: the trained weights are not finite"

    def reset(self) -> str:
        """Begin to count anew; returns why the run was broken."""
        reason, self.broken, self.bad = self.broken, "", []
        return reason


def _are_finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers are; one wait for the device where they are."""
    # The greatest would say it alone, and takes a CPU five times as long: 1.5 s a step with the whole U-Net of SD 1.5.
    if math.isfinite(float(torch.stack(torch._foreach_norm(tensors)).sum())):
        return True
    return math.isfinite(float(torch.stack(torch._foreach_norm(tensors, math.inf)).amax()))  # squares can overflow


def not_finite(named: Mapping[str, float | Tensor]) -> str:
    """The names of the numbers that are not finite; one wait for the device for all of them."""
    tensors = {name: value.detach().float() for name, value in named.items() if isinstance(value, Tensor)}
    values = torch.stack(list(tensors.values())).tolist() if tensors else []
    plain = {**named, **dict(zip(tensors, values, strict=True))}
    return ", ".join(name for name, value in plain.items() if not math.isfinite(value))
