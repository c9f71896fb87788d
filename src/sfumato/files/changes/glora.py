"""GLoRA (Chavan et al. 2023; LyCORIS): a low-rank change of the inputs besides a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.files.changes.change import WithoutLowRank, check_fits
from sfumato.files.changes.lora import LoraModule
from sfumato.files.changes.module_tensors import ModuleTensors


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
