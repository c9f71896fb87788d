"""Low-rank deltas as two factors, up (out, r) times down (r, in), and what can be done without ever multiplying them.

A convolution's delta (out, in, h, w) is the matrix (out, in * h * w), as everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.kinds import LoraModule

EXACT_SIDE = 96
"""Up to this smaller side a dense delta gets its whole SVD, which takes a few milliseconds there."""
OVERSAMPLE, POWER_STEPS = 10, 4
"""Halko et al. 2011, section 4: p and q of the randomised range finder."""


@dataclass(frozen=True)
class Factors:
    """The delta up @ down. up: (out, r), down: (r, in), any float dtype, the same for both."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """(out, in)."""
        return self.up @ self.down

    def energy(self) -> float:
        """The squared Frobenius norm of the delta: sum((up' up) * (down down')), two products of the rank's size."""
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0))


@dataclass(frozen=True)
class Budget:
    """How much of a delta to keep: at most `rank` directions, and no more than hold `keep_energy` of the energy.

    Energy is the squared Frobenius norm. With neither, everything is kept.
    """

    rank: int | None = None
    keep_energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise AdapterError(f"rank {self.rank}: wanted at least 1.")
        if self.keep_energy is not None and not 0 < self.keep_energy <= 1:
            raise AdapterError(f"keep-energy {self.keep_energy:g}: wanted a share above 0, at most 1, such as 0.99.")

    def count(self, singular: Tensor, energy: float) -> int:
        """How many of these singular values, in falling order, of a delta of this energy; at least one."""
        count = len(singular)
        if self.keep_energy is not None:
            running = singular.double().square().cumsum(0)
            # A share of 1 means all that is not rounding.
            enough = running >= self.keep_energy * energy * (1 - 1e-12)
            count = int(enough.int().argmax()) + 1 if bool(enough.any()) else count
        return max(1, count if self.rank is None else min(count, self.rank))


KEEP_ALL = Budget()


def from_module(module: LoraModule, weight: float = 1.0) -> Factors:
    """weight * alpha / rank * up down, the scale in `up`; a Tucker convolution in its plain form. float64."""
    plain = module.plain()
    up = plain.up.double().flatten(1) * (weight * plain.scale)
    return Factors(up, plain.down.double().flatten(1))


def to_module(factors: Factors, shape: Sequence[int]) -> LoraModule:
    """The factors as a module of scale 1 (alpha equal to the rank), fp32. shape: the changed weight's."""
    rank, inner = factors.rank, tuple(shape[1:])
    up = factors.up.float().reshape(shape[0], rank, *(1 for _ in inner[1:]))
    return LoraModule(factors.down.float().reshape(rank, *inner).contiguous(), up.contiguous(), float(rank))


def concatenate(terms: Sequence[Factors]) -> Factors:
    """The sum of the deltas, exactly: ranks add up. sum up_i down_i = [up_1 up_2 ...] [down_1; down_2; ...]."""
    return Factors(torch.cat([term.up for term in terms], 1), torch.cat([term.down for term in terms]))


def factored_svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """(U (out, k), S (k,), V' (k, in)) of the delta, k at most r, without forming it: the QR of both factors.

    up = Q_u R_u, down' = Q_d R_d, and the SVD of R_u R_d', r x r (Golub and Van Loan, section 5.4.4). float64.
    """
    q_up, r_up = torch.linalg.qr(factors.up.double())
    q_down, r_down = torch.linalg.qr(factors.down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ u, s, vh @ q_down.T


def truncate(factors: Factors, budget: Budget) -> tuple[Factors, float]:
    """The nearest delta of the budget's rank (Eckart and Young 1936), and the share of the energy it keeps.

    Both factors get the root of the singular values, so that neither is large where the other is small.
    """
    u, s, vh = factored_svd(factors)
    return _cut(u, s, vh, float(s.square().sum()), budget)


def _cut(u: Tensor, s: Tensor, vh: Tensor, energy: float, budget: Budget) -> tuple[Factors, float]:
    count = budget.count(s, energy)
    root = s[:count].sqrt()
    kept = float(s[:count].square().sum()) / energy if energy > 0 else 1.0
    return Factors(u[:, :count] * root, root[:, None] * vh[:count]), min(kept, 1.0)


def factorise(delta: Tensor, budget: Budget, generator: torch.Generator) -> tuple[Factors, float]:
    """Factors of a dense delta (out, in) within the budget, and the share of the energy they keep. float64.

    Small matrices get their whole SVD. Larger ones get the randomised one (Halko, Martinsson and Tropp 2011, algorithms
    4.4 and 5.1), which for a share of energy grows until it holds that share; the share is measured, not estimated.
    generator: where the randomised one draws from.
    """
    delta = delta.double()
    energy, smaller = float(delta.square().sum()), min(delta.shape)
    wanted = smaller if budget.rank is None else min(budget.rank, smaller)
    size = wanted if budget.keep_energy is None else min(wanted, 32)
    while smaller > EXACT_SIDE and size + OVERSAMPLE < smaller // 2:
        u, s, vh = randomised_svd(delta, size, generator)
        found = float(s.square().sum())
        if size == wanted or found >= (budget.keep_energy or 0) * energy:
            return _cut(u, s, vh, energy, budget)
        size = min(wanted, 2 * size)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return _cut(u, s, vh, energy, budget)


def randomised_svd(delta: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(U (out, rank), S (rank,), V' (rank, in)): the leading part of the SVD, by a randomised range finder."""
    probes = torch.randn(delta.shape[1], rank + OVERSAMPLE, generator=generator).to(delta)
    basis = torch.linalg.qr(delta @ probes).Q
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(delta.T @ basis).Q
        basis = torch.linalg.qr(delta @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]


def significant_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of a matrix without the directions that are rounding."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    count = max(1, int((s > 1e-10 * s[0]).sum()))
    return u[:, :count], s[:count], vh[:count]


def inner_product(left: Factors, right: Factors) -> float:
    """The inner product of two deltas of one shape, sum(delta_l * delta_r), from the factors."""
    return float(((left.up.double().T @ right.up.double()) * (left.down.double() @ right.down.double().T)).sum())
