"""The weight of another model in the place of one: what a whole model is as an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sfumato.files.changes.change import WithoutLowRank, check_fits, trim


def lora_command(change: object) -> str:
    """The command that makes a LoRA of what is none."""
    if isinstance(change, Replacement):
        return "sfumato extract MODEL --base BASE --rank 32"
    return "sfumato convert FILE --bake lora"


@dataclass(frozen=True)
class Replacement(WithoutLowRank):
    """W' - W, so that a mix is W + w (W' - W), which web interfaces call the weighted sum of two checkpoints.

    value: W', of the weight's shape. bias: the other model's bias, (out,).
    """

    value: Tensor
    bias: Tensor | None = None

    kind: ClassVar[str] = "whole model"
    needs_weight: ClassVar[bool] = True
    bias_delta: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        return trim(self.value.shape) == trim(shape)

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        return self.value.to(weight.device).float().reshape(weight.shape) - weight.float()
