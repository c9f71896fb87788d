"""Methods that take one adapter out of the directions that another one reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.merging.factors import Budget, Factors, concatenate, factored_svd, significant_svd


def np_lora(
    terms: Sequence[Factors],
    weights: Sequence[float],
    *,
    keep_energy: float = 0.99,
    strength: float | None = None,
) -> Factors:
    """NP-LoRA, Chen et al. 2025 (arXiv 2511.11051): w_1 delta_1 + w_2 delta_2 (I - V V'), and so on.

    The first adapter (the style) is kept whole; each further one (the subject) gives up the input directions V of those
    before it: of each the leading right singular vectors that hold `keep_energy` of its energy. strength: their mu of
    the soft projection, which scales V's directions by 1 / (1 + mu) instead of 0; None is the hard one. An adapter of
    weight 0 takes no directions from others.
    """
    if strength is not None and not 0 <= strength < math.inf:
        raise AdapterError(f"projection strength {strength:g}: wanted 0 or more; leave it out for the full one.")
    share = 1.0 if strength is None else strength / (1 + strength)
    taken: list[Tensor] = []
    found: list[Factors] = []
    for term, weight in zip(terms, weights, strict=True):
        down = term.down.double()
        if taken:
            basis = significant_svd(torch.cat(taken))[2]  # of what several share, one direction
            down = down - share * (down @ basis.T) @ basis
        found.append(Factors(weight * term.up.double(), down))
        if weight == 0:
            continue
        _, s, vh = factored_svd(term)
        if (energy := float(s.square().sum())) > 0:  # where it changes nothing, its directions are of its start
            taken.append(vh[: Budget(keep_energy=keep_energy).count(s, energy)])
    return concatenate(found)
