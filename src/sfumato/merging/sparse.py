"""Methods that drop entries of the deltas before summing them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.limits import checked_density
from sfumato.merging.arithmetic import linear


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """The delta with all but the share `density` of its entries of largest magnitude set to zero.

    int(density * n) entries stay, as in peft and in TIES' own code, but at least one.
    """
    if checked_density(density) == 1:
        return delta
    count = max(1, int(density * delta.numel()))
    flat = delta.reshape(-1)
    kept = torch.topk(flat.abs(), count, sorted=False).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view(delta.shape)


def drop_and_rescale(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with the probability `density`, then divided by it, so that the mean stays.

    DARE, Yu et al. 2024 (arXiv 2311.03099), section 3.2, with their drop rate p = 1 - density.
    """
    if checked_density(density) == 1:
        return delta
    mask = torch.bernoulli(torch.full(delta.shape, density), generator=generator).to(delta)
    return delta * mask / density


def magnitude(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """The weighted sum of the deltas' largest entries; peft calls it magnitude_prune."""
    return linear([keep_largest(delta, density) for delta in deltas], weights)


def dare(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, generator: torch.Generator) -> Tensor:
    """The weighted sum of randomly thinned deltas (DARE with task arithmetic); peft calls it dare_linear."""
    return linear([drop_and_rescale(delta, density, generator) for delta in deltas], weights)
