"""DoRA (Liu et al. 2024): the changed weight's rows or columns rescaled to learned lengths.

GLoRA (Chavan et al. 2023; LyCORIS): a low-rank change of the inputs besides a LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sfumato.files.kinds.base import LoraModule, ModuleTensors, WithoutLowRank, check_fits

if TYPE_CHECKING:
    from sfumato.files.kinds.base import Change


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


@dataclass(frozen=True)
class Glora(WithoutLowRank):
    """scale * (W a_up a_down + update), the first on the inputs of every place of a kernel.

    a_up: (in, rank). a_down: (rank, in). update: the LoRA of b_up (out, rank) and b_down (rank, in[, h, w]), whose
    own alpha / rank is the scale. Today's LyCORIS calls them a1, a2, b1, b2, its first version a2, a1, b2, b1; the
    shapes tell which, and today's is taken where they do not.
    """

    a_up: Tensor
    a_down: Tensor
    update: LoraModule
    bias_delta: Tensor | None = None

    kind: ClassVar[str] = "GLoRA"
    needs_weight: ClassVar[bool] = True

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> Glora:
        found = []
        for up, down in (("1", "2"), ("2", "1")):
            a_up, a_down, b_up, b_down = (parts[f"{x}{n}"] for x in "ab" for n in (up, down))
            rank = a_down.shape[0] if a_down.ndim else 0
            flat = all(t.ndim in (2, 4) and t.shape[2:].numel() == 1 for t in (a_up, a_down, b_up))
            joined = flat and b_down.ndim in (2, 4) and a_up.shape[1] == b_up.shape[1] == b_down.shape[0] == rank
            if joined and a_up.shape[0] == a_down.shape[1] == b_down.shape[1]:
                found.append((rank, a_up, a_down, b_up, b_down))
        if found:  # of a square layer both ways join, one of them by a rank that is the layer's width
            rank, a_up, a_down, b_up, b_down = min(found, key=lambda each: each[0])
            mid = parts.core("bm", rank)
            if mid is not None and b_down.shape[2:].numel() != 1:
                raise parts.shape_error("b2", "(rank, in, 1, 1) beside bm")
            update = LoraModule(b_down, b_up, parts.alpha(rank), mid)
            return cls(a_up.flatten(1), a_down.flatten(1), update, parts.vector("bias"))
        shapes = ", ".join(f"{role} {list(parts[role].shape)}" for role in ("a1", "a2", "b1", "b2"))
        raise parts.error(f"{shapes} do not fit; wanted (in, rank), (rank, in), (out, rank), (rank, in)")

    def fits(self, shape: Sequence[int]) -> bool:
        return self.update.fits(shape)

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        up, down = self.a_up.to(weight.device).float(), self.a_down.to(weight.device).float()
        mixed = torch.einsum("oi...,ir->or...", weight.float(), up * self.update.scale)
        return torch.einsum("or...,ri->oi...", mixed, down) + self.update.delta(weight)
