"""The weighted sum of deltas: what several adapters on one base are by definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.merging.factors import Factors, concatenate


def linear(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum of w_i delta_i (task arithmetic, Ilharco et al. 2023, section 2). All of one shape."""
    return torch.stack([weight * delta for delta, weight in zip(deltas, weights, strict=True)]).sum(0)


def linear_factors(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The same as factors, exactly: the ranks add up.

    peft's add_weighted_adapter(combination_type="linear") sums ups and downs apart instead, with the roots of the
    weights, which adds every up_i down_j to the result.
    """
    return concatenate([Factors(weight * term.up, term.down) for term, weight in zip(terms, weights, strict=True)])
