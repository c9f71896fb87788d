"""LoHa (Hyeon-Woo et al. 2022, FedPara; LyCORIS): the Hadamard product of two low-rank products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.files.changes.change import WithoutLowRank, check_fits
from sfumato.files.changes.module_tensors import ModuleTensors


@dataclass(frozen=True)
class Loha(WithoutLowRank):
    """scale * (w1_a w1_b) * (w2_a w2_b), or with Tucker cores t1, t2: each half einsum("ijhw,ip,jr->prhw", t, a, b).

    Without cores a: (out, rank), b: (rank, in * height * width); with them a: (rank, out), b: (rank, in),
    t: (rank, rank, height, width). scale: alpha / rank.
    """

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    scale: float
    cores: tuple[Tensor, Tensor] | None = None
    bias_delta: Tensor | None = None

    kind: ClassVar[str] = "LoHa"
    needs_weight: ClassVar[bool] = False

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> Loha:
        halves = [(parts.matrix(f"hada_w{n}_a"), parts.matrix(f"hada_w{n}_b")) for n in (1, 2)]
        rank = halves[0][1].shape[0]
        first, second = (parts.core(f"hada_t{n}", b.shape[0]) for n, (_, b) in zip((1, 2), halves, strict=True))
        if (first is None) != (second is None) or (
            first is not None and second is not None and first.shape[2:] != second.shape[2:]
        ):
            raise parts.error("hada_t1 and hada_t2 do not go together; wanted both, with one kernel, or neither")
        inner = 0 if first is not None else 1  # where the rank is in a
        sizes = {(a.shape[1 - inner], b.shape[1]) for a, b in halves}
        if any(a.shape[inner] != b.shape[0] for a, b in halves) or len(sizes) > 1:
            shapes = ", ".join(f"{list(a.shape)} and {list(b.shape)}" for a, b in halves)
            raise parts.error(f"the factors of LoHa do not fit ({shapes}); wanted (out, rank) and (rank, in) twice")
        cores = None if first is None or second is None else (first, second)
        return cls(halves[0], halves[1], parts.alpha(rank) / rank, cores, parts.vector("bias"))

    @property
    def shape(self) -> tuple[int, ...]:
        """The update's shape; a convolution without cores has its kernel within the columns."""
        a, b = self.first
        return (a.shape[0], b.shape[1]) if self.cores is None else (a.shape[1], b.shape[1], *self.cores[0].shape[2:])

    def fits(self, shape: Sequence[int]) -> bool:
        if self.cores is None:
            return len(shape) > 1 and self.shape == (shape[0], prod(shape[1:]))
        return self.shape == tuple(shape)

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        device, halves = weight.device, []
        for n, pair in enumerate((self.first, self.second)):
            a, b = (factor.to(device).float() for factor in pair)
            if self.cores is None:
                halves.append((a @ b).view(weight.shape))
            else:
                core = self.cores[n].to(device).float()
                halves.append(torch.einsum("prhw,po->rohw", core, a).permute(1, 2, 3, 0) @ b)  # (out, h, w, in)
        product = halves[0].mul_(halves[1]).mul_(self.scale)
        return product if self.cores is None else product.permute(0, 3, 1, 2).contiguous()
