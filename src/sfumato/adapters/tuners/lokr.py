"""LoHa for training: W' = W + scale (w1_a w1_b) * (w2_a w2_b), two low-rank products number by number.

FedPara (Hyeon-Woo et al. 2022, section 2), as LyCORIS has it without Tucker cores: of two products of rank r the result
has up to r^2 directions, for the numbers of a LoRA of rank 2 r.

LoKr for training: W' = W + scale kron(w1, w2), a small and a large factor, as LyCORIS has it without Tucker cores.

w1 is whole. w2 is a low-rank product where the rank is below half of its longer side, and otherwise whole; the scale is
1 then, which is how all who read such a file take it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sfumato.adapters.layers import BaseLayer, UpdateLayer, init_uniform
from sfumato.adapters.targets import RankGroup
from sfumato.errors import AdapterError
from sfumato.files.kinds import Change
from sfumato.files.kinds.lokr import Factor, Loha, Lokr
from sfumato.utils.formatting import pluralize


class LohaLayer(UpdateLayer):
    """w1_a, w2_a: (out, rank). w1_b, w2_b: (rank, in), of a convolution (rank, in * height * width)."""

    kind = "LoHa"

    def __init__(self, host: BaseLayer, rank: int, scale: float, generator: torch.Generator) -> None:
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


def factorization(dimension: int, factor: int | None) -> tuple[int, int]:
    """The dimension as a product, the smaller first: with `factor` where that divides it, else with the largest divisor
    up to it that is at most the root; without one as square as it can be.

    LyCORIS's rule of this name, whose -1 is None here: (128, None) is (8, 16), (360, 12) is (12, 30), (250, 8) (5, 50).
    """
    if factor is not None and dimension % factor == 0:
        first, second = sorted((factor, dimension // factor))
        return first, second
    most = dimension if factor is None else factor
    small = max(d for d in range(1, int(dimension**0.5) + 1) if dimension % d == 0 and d <= most)
    return small, dimension // small


def factor_shapes(host: BaseLayer, factor: int | None) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The shapes of w1, (rows, columns), and of w2, for a convolution with its kernel."""
    out, inner, *kernel = host.weight.shape
    (rows, more_rows), (columns, more_columns) = factorization(out, factor), factorization(inner, factor)
    return (rows, columns), (more_rows, more_columns, *kernel)


def is_full_matrix(shape: Sequence[int], rank: int) -> bool:
    """Whether a second factor of this shape is whole at this rank."""
    return rank >= max(shape[:2]) / 2


class LokrLayer(UpdateLayer):
    """w1: (rows, columns). w2: one factor (out / rows, in / columns), of a convolution with its kernel after these; or
    two, (out / rows, rank) and (rank, in / columns * height * width)."""

    kind = "LoKr"

    def __init__(
        self, host: BaseLayer, rank: int, scale: float, generator: torch.Generator, factor: int | None
    ) -> None:
        super().__init__()
        first, second = factor_shapes(host, factor)
        self.rank, self.scale = rank, scale
        # LyCORIS's start: the last factor is zero, so that the start is a no-op.
        self.w1 = init_uniform(*first, generator=generator)
        if is_full_matrix(second, rank):
            self.scale = 1.0
            self.w2 = nn.ParameterList([torch.zeros(second)])
        else:
            right = torch.zeros(rank, torch.Size(second[1:]).numel())
            self.w2 = nn.ParameterList([init_uniform(second[0], rank, generator=generator), right])

    def factors(self) -> tuple[Tensor, ...]:
        return self.w1, *self.w2

    def delta(self, weight: Tensor, *factors: Tensor) -> Tensor:
        first, *second = factors
        large = second[0].flatten(1) if len(second) == 1 else second[0] @ second[1]
        return torch.kron(first * self.scale, large).view(weight.shape)

    def change(self) -> Change:
        first, *second = (factor.detach() for factor in self.factors())
        large = Factor(second[0]) if len(second) == 1 else Factor(left=second[0], right=second[1])
        return Lokr(Factor(first), large, self.scale)

    def load(self, change: Change, where: str) -> None:
        assert isinstance(change, Lokr)
        first, second = change.first, change.second
        theirs = [each for each in (first.whole, second.whole, second.left, second.right) if each is not None]
        ours = [factor.flatten(1).shape for factor in self.factors()]
        if second.core is not None or [each.flatten(1).shape for each in theirs] != ours:
            factors = ", ".join(str(tuple(each.shape)) for each in theirs)
            wanted = ", ".join(str(tuple(each.shape)) for each in self.factors())
            raise AdapterError(
                f"{where} has factors {factors}, this run {wanted}. Give its own rank and --factor, and its own base."
            )
        with torch.no_grad():
            for own, their in zip(self.factors(), theirs, strict=True):
                own.copy_(their.reshape(own.shape))
            self.factors()[1].mul_(change.scale / self.scale)


def full_matrix_notes(ranked: RankGroup, factor: int | None) -> list[str]:
    """A line on the layers whose second factor is whole."""
    seconds = [factor_shapes(host, factor)[1] for host in ranked.hosts]
    count = sum(is_full_matrix(shape, ranked.rank) for shape in seconds)
    if not count:
        return []
    return [
        f"{ranked.given}: in {count} of {pluralize(len(seconds), ranked.what)} the second factor is "
        "whole, as from half of its longer side on; its scale is 1 whatever the alpha"
    ]
