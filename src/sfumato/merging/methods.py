"""The merging methods by name, for the terms of one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.merging import arithmetic, joint, projection, sign, sparse
from sfumato.merging.factors import Factors

Dense = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
LowRank = Callable[[Sequence[Factors], Sequence[float]], Factors]


@dataclass(frozen=True)
class Settings:
    """What the methods can be told; each takes what it knows.

    density: share of the entries kept by ties, dare, dare-ties, magnitude, and by `inside`. inside: the method that
    knots and core-space use in the joint basis. null_energy, null_strength: of np-lora.
    """

    density: float = 0.5
    inside: str = "ties"
    null_energy: float = 0.99
    null_strength: float | None = None


TAKEN_BY: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "density": frozenset({"ties", "dare", "dare-ties", "magnitude", "knots", "core-space"}),
        "inside": frozenset({"knots", "core-space"}),
        "null_energy": frozenset({"np-lora"}),
        "null_strength": frozenset({"np-lora"}),
        "seed": frozenset({"dare", "dare-ties", "knots", "core-space"}),
    }
)
"""The methods that have a use for each setting."""

DENSE: Mapping[str, Callable[[Settings, torch.Generator], Dense]] = MappingProxyType(
    {
        "ties": lambda to, _: partial(sign.ties, density=to.density),
        "dare": lambda to, draws: partial(sparse.dare, density=to.density, generator=draws),
        "dare-ties": lambda to, draws: partial(sign.dare_ties, density=to.density, generator=draws),
        "magnitude": lambda to, _: partial(sparse.magnitude, density=to.density),
    }
)
"""Methods on dense deltas, whose result has no low rank."""

LOW_RANK: Mapping[str, Callable[[Settings, torch.Generator], LowRank]] = MappingProxyType(
    {
        "linear": lambda to, _: arithmetic.linear_factors,
        "knots": lambda to, draws: partial(joint.knots, inner=_inner(to, draws)),
        "core-space": lambda to, draws: partial(joint.core_space, inner=_inner(to, draws)),
        "np-lora": lambda to, _: partial(projection.np_lora, keep_energy=to.null_energy, strength=to.null_strength),
    }
)
"""Methods on factors, whose result has at most the sum of the ranks."""

METHODS = (*LOW_RANK, *DENSE)
INSIDE = ("linear", *DENSE)


def check_method(method: str) -> None:
    """Raises AdapterError for what is no name of `METHODS`."""
    if method not in METHODS:
        raise AdapterError(f"there is no method {method!r}; known are {', '.join(METHODS)}.")


def _inner(settings: Settings, draws: torch.Generator) -> Dense:
    if settings.inside == "linear":
        return arithmetic.linear
    if settings.inside not in DENSE:
        raise AdapterError(f"inside {settings.inside!r}: wanted one of {', '.join(INSIDE)}.")
    return DENSE[settings.inside](settings, draws)
