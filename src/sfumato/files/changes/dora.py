"""DoRA (Liu et al. 2024): the changed weight's rows or columns rescaled to learned lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sfumato.files.changes.change import WithoutLowRank, check_fits
from sfumato.files.changes.module_tensors import ModuleTensors

if TYPE_CHECKING:
    from sfumato.files.changes.change import Change


@dataclass(frozen=True)
class Dora(WithoutLowRank):
    """m / ||V|| V - W with V = W + the inner change's delta; eq. 5 of the paper, norms over all axes but one.

    magnitude: (out,) or, where on_input, (in,). epsilon: added to the norms, LyCORIS's guard, 0 for peft.

    Two arithmetics, each as the tool that trained it computes it: `lora_magnitude_vector`, ai-toolkit's `magnitude`
    and a flat `dora_scale` are peft's (norms of V's rows, a convolution's [1, out, 1, 1] means out too); `dora_scale`
    of [out, 1, ...] or [1, in, ...] is LyCORIS's and OneTrainer's `weight_decompose`, wd_on_out and before it.
    """

    inner: Change
    magnitude: Tensor
    on_input: bool
    epsilon: float = 0.0

    needs_weight: ClassVar[bool] = True

    @classmethod
    def from_tensors(cls, parts: ModuleTensors, inner: Change) -> Dora:
        role = "peft_magnitude" if parts.get("peft_magnitude") is not None else "magnitude"
        magnitude, vector = parts[role], parts.vector(role)
        assert vector is not None
        if parts.get("magnitude") is not None and parts.get("peft_magnitude") is not None:
            raise parts.error("there are two magnitudes, dora_scale and lora_magnitude_vector")
        if inner.bias_delta is not None:
            raise parts.error("a DoRA with a bias, which no tool defines")
        if role == "peft_magnitude" or magnitude.ndim < 2:
            return cls(inner, vector, on_input=False)
        columns = magnitude.shape[0] == 1 and magnitude.shape[1] == magnitude.numel()
        if not columns and magnitude.shape[0] != magnitude.numel():
            raise parts.shape_error(role, "(out, 1) or (1, in)")
        return cls(inner, vector, columns, torch.finfo(torch.float32).eps)

    @property
    def kind(self) -> str:
        return "DoRA" if self.inner.kind == "LoRA" else f"DoRA of {self.inner.kind}"

    @property
    def bias_delta(self) -> Tensor | None:
        return None

    def fits(self, shape: Sequence[int]) -> bool:
        return self.inner.fits(shape) and self.magnitude.numel() == shape[1 if self.on_input else 0]

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        weight = weight.float()
        update = self.inner.delta(weight)
        kept = 1 if self.on_input else 0
        axes = [axis for axis in range(weight.ndim) if axis != kept]
        norm: Tensor = torch.linalg.vector_norm(weight + update, dim=axes, keepdim=True) + self.epsilon
        scale = self.magnitude.to(norm).view(norm.shape) / norm
        return (scale - 1) * weight + scale * update
