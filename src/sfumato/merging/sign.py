"""Methods that let the deltas vote on the sign of each entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.merging.sparse import drop_and_rescale, keep_largest


def ties(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """Trim, elect sign, disjoint mean: TIES, Yadav et al. 2023 (arXiv 2306.01708), algorithm 1.

    Each delta keeps its largest entries; the sign of an entry is that of the weighted sum; the result is the mean of
    the weighted entries that have it. A delta of weight 0 neither votes nor counts, and a negative weight turns the
    vote: peft elects on the unweighted deltas, which for equal positive weights is the same.
    """
    return _elected_mean([keep_largest(delta, density) for delta in deltas], weights)


def dare_ties(
    deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, generator: torch.Generator
) -> Tensor:
    """TIES with DARE's random thinning in the place of the trimming (Yu et al. 2024, section 4.3)."""
    return _elected_mean([drop_and_rescale(delta, density, generator) for delta in deltas], weights)


def _elected_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    weighted = torch.stack([weight * delta for delta, weight in zip(deltas, weights, strict=True)])
    total = weighted.sum(0)
    elected = torch.where(total >= 0, 1.0, -1.0).to(weighted)  # peft's choice where the votes are equal
    agree = weighted.sign() == elected
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)
