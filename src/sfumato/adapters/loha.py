"""LoHa for training: W' = W + scale (w1_a w1_b) * (w2_a w2_b), two low-rank products number by number.

FedPara (Hyeon-Woo et al. 2022, section 2), as LyCORIS has it without Tucker cores: of two products of rank r the result
has up to r^2 directions, for the numbers of a LoRA of rank 2 r.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.adapters.layer import UpdateLayer
from sfumato.adapters.whole import Host
from sfumato.errors import AdapterError
from sfumato.files.changes import Change
from sfumato.files.changes.loha import Loha


class LohaLayer(UpdateLayer):
    """w1_a, w2_a: (out, rank). w1_b, w2_b: (rank, in), of a convolution (rank, in * height * width)."""

    kind = "LoHa"

    def __init__(self, host: Host, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        out, inner = len(host.weight), host.weight[0].numel()
        # LyCORIS's start: three factors are normal, the fourth is zero, so that the start is a no-op.
        self.w1_a = nn.Parameter(torch.randn(out, rank, generator=generator) * 0.1)
        self.w1_b = nn.Parameter(torch.randn(rank, inner, generator=generator))
        self.w2_a = nn.Parameter(torch.zeros(out, rank))
        self.w2_b = nn.Parameter(torch.randn(rank, inner, generator=generator))

    def factors(self) -> tuple[Tensor, ...]:
        return self.w1_a, self.w1_b, self.w2_a, self.w2_b

    def delta(self, weight: Tensor, *factors: Tensor) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = factors
        return ((w1_a @ w1_b) * (w2_a @ w2_b) * self.scale).view(weight.shape)

    def change(self) -> Change:
        w1_a, w1_b, w2_a, w2_b = (factor.detach() for factor in self.factors())
        return Loha((w1_a, w1_b), (w2_a, w2_b), self.scale)

    def load(self, change: Change, where: str) -> None:
        assert isinstance(change, Loha)
        if change.cores is not None:
            raise AdapterError(f"{where} has Tucker cores (hada_t1), which are not trained. Take another adapter.")
        theirs = (*change.first, *change.second)
        if [factor.shape for factor in theirs] != [factor.shape for factor in self.factors()]:
            raise AdapterError(
                f"{where} has rank {theirs[1].shape[0]} and shape {tuple(change.shape)}, this run has rank {self.rank} "
                f"and shape {(len(self.w1_a), self.w1_b.shape[1])}. Give its own rank, and its own base."
            )
        with torch.no_grad():
            for own, their in zip(self.factors(), theirs, strict=True):
                own.copy_(their)
            self.w2_a.mul_(change.scale / self.scale)
