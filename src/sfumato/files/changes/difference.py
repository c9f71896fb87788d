"""Full differences of weights, biases and norms, and weights to set (ComfyUI): no factors at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.files.changes.change import Change, WithoutLowRank, check_fits, trim
from sfumato.files.changes.module_tensors import ModuleTensors


@dataclass(frozen=True)
class Difference(WithoutLowRank):
    """W + value, or value in W's place where it replaces; without a value the bias alone changes.

    value: of the weight's shape, for a norm (channels,).
    """

    value: Tensor | None
    bias_delta: Tensor | None = None
    replaces: bool = False

    kind: ClassVar[str] = "difference"

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> Difference:
        difference, whole = parts.get("diff"), parts.get("set_weight")
        if difference is not None and whole is not None:
            raise parts.error("a difference and a weight to set; wanted one of them")
        if parts.get("alpha") is not None:
            raise parts.error("an alpha beside a difference, which no tool scales")
        value = difference if whole is None else whole
        return cls(value, parts.vector("bias"), whole is not None)

    @property
    def needs_weight(self) -> bool:
        return self.replaces

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The weight's; None where what is added to it is not known without it."""
        return None if self.value is None or self.replaces else tuple(self.value.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        if self.bias_delta is not None and (not shape or self.bias_delta.numel() != shape[0]):
            return False
        return self.value is None or trim(self.value.shape) == trim(shape)

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        if self.value is None:
            return torch.zeros(weight.shape, device=weight.device)
        value = self.value.to(weight.device).float().reshape(weight.shape)
        return value - weight.float() if self.replaces else value.clone()


def changes_weight(change: Change) -> bool:
    """Whether it changes the module's weight; False where it is a difference of the bias alone."""
    return not isinstance(change, Difference) or change.value is not None
