"""The merging methods by name, for the terms of one module.

The weighted sum of deltas: what several adapters on one base are by definition.

Another method in the adapters' joint basis: what is compared entry by entry is then in common coordinates.

Both forms work on the factors alone and give factors of at most the sum of the ranks: no dense delta, no SVD of one.

Methods that take one adapter out of the directions that another one reads.

Methods that let the deltas vote on the sign of each entry.

Methods that drop entries of the deltas before summing them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.merging.factors import Budget, Factors, concatenate, factored_svd, significant_svd
from sfumato.utils.limits import checked_density


def linear(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum of w_i delta_i (task arithmetic, Ilharco et al. 2023, section 2). All of one shape."""
    return torch.stack([weight * delta for delta, weight in zip(deltas, weights, strict=True)]).sum(0)


def linear_factors(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The same as factors, exactly: the ranks add up.

    peft's add_weighted_adapter(combination_type="linear") sums ups and downs apart instead, with the roots of the
    weights, which adds every up_i down_j to the result.
    """
    return concatenate([Factors(weight * term.up, term.down) for term, weight in zip(terms, weights, strict=True)])


Inner = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""A method on dense deltas, such as `functools.partial(ties, density=0.5)`."""


def knots(terms: Sequence[Factors], weights: Sequence[float], inner: Inner) -> Factors:
    """KnOTS, Stoica et al. 2024 (arXiv 2410.19735), section 4: [delta_1 ... delta_K] = U S [V_1' ... V_K'], merge V_i.

    The result is U inner(S V_1', ..., S V_K'): the authors' code (gstoica27/KnOTS, task_merger.py) scales V before its
    entries are compared, so that those of a negligible direction do not count like those of the strongest. With a
    linear `inner` it is the weighted sum. The SVD is that of the ups' QR times the block diagonal of the downs', of the
    size of the sum of ranks.
    """
    q, r = torch.linalg.qr(torch.cat([term.up.double() for term in terms], 1))
    rights, blocks, start = [], [], 0
    for term in terms:
        right, left = torch.linalg.qr(term.down.double().T)
        blocks.append(r[:, start : start + term.rank] @ left.T)
        rights.append(right)
        start += term.rank
    u, s, vh = significant_svd(torch.cat(blocks, 1))
    components, start = [], 0
    for right in rights:
        components.append(s[:, None] * vh[:, start : start + right.shape[1]] @ right.T)
        start += right.shape[1]
    return Factors(q @ u, inner(components, weights))


def core_space(terms: Sequence[Factors], weights: Sequence[float], inner: Inner) -> Factors:
    """Core space, Panariello et al. 2025 (arXiv 2509.17786), section 3: U inner(U' delta_i V) V'.

    U and V are the orthonormal bases of all ups and of all downs, so that nothing of any delta is lost; the cores are
    at most R x R, R the sum of the ranks.
    """
    left = significant_svd(torch.cat([term.up.double() for term in terms], 1))[0]
    right = significant_svd(torch.cat([term.down.double() for term in terms]))[2]
    cores = [(left.T @ term.up.double()) @ (term.down.double() @ right.T) for term in terms]
    return Factors(left, inner(cores, weights) @ right)


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


Dense = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
LowRank = Callable[[Sequence[Factors], Sequence[float]], Factors]


@dataclass(frozen=True)
class MethodSettings:
    """What the methods can be told; each takes what it knows.

    density: share of the entries kept by ties, dare, dare-ties, magnitude, and by `inside`. inside: the method that
    knots and core-space use in the joint basis. null_energy, null_strength: of np-lora.
    """

    density: float = 0.5
    inside: str = "ties"
    null_energy: float = 0.99
    null_strength: float | None = None


METHOD_SETTINGS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "density": frozenset({"ties", "dare", "dare-ties", "magnitude", "knots", "core-space"}),
        "inside": frozenset({"knots", "core-space"}),
        "null_energy": frozenset({"np-lora"}),
        "null_strength": frozenset({"np-lora"}),
        "seed": frozenset({"dare", "dare-ties", "knots", "core-space"}),
    }
)
"""The methods that have a use for each setting."""

DENSE: Mapping[str, Callable[[MethodSettings, torch.Generator], Dense]] = MappingProxyType(
    {
        "ties": lambda to, _: partial(ties, density=to.density),
        "dare": lambda to, draws: partial(dare, density=to.density, generator=draws),
        "dare-ties": lambda to, draws: partial(dare_ties, density=to.density, generator=draws),
        "magnitude": lambda to, _: partial(magnitude, density=to.density),
    }
)
"""Methods on dense deltas, whose result has no low rank."""

LOW_RANK: Mapping[str, Callable[[MethodSettings, torch.Generator], LowRank]] = MappingProxyType(
    {
        "linear": lambda to, _: linear_factors,
        "knots": lambda to, draws: partial(knots, inner=_inner(to, draws)),
        "core-space": lambda to, draws: partial(core_space, inner=_inner(to, draws)),
        "np-lora": lambda to, _: partial(np_lora, keep_energy=to.null_energy, strength=to.null_strength),
    }
)
"""Methods on factors, whose result has at most the sum of the ranks."""

METHODS = (*LOW_RANK, *DENSE)
INSIDE = ("linear", *DENSE)


def check_method(method: str) -> None:
    """Raises AdapterError for what is no name of `METHODS`."""
    if method not in METHODS:
        raise AdapterError(f"there is no method {method!r}; known are {', '.join(METHODS)}.")


def _inner(settings: MethodSettings, draws: torch.Generator) -> Dense:
    if settings.inside == "linear":
        return linear
    if settings.inside not in DENSE:
        raise AdapterError(f"inside {settings.inside!r}: wanted one of {', '.join(INSIDE)}.")
    return DENSE[settings.inside](settings, draws)
