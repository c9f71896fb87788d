"""Whole adapters into one, module by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.adapters.weights import Weight, weight_at
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import Vectors
from sfumato.files.kinds import Change, LoraModule
from sfumato.files.kinds.base import weight_independent_delta
from sfumato.files.kinds.ia3 import Difference, Replacement, bias_change, extract_command, may_have_bias
from sfumato.files.kinds.modules import refuse_modules
from sfumato.files.module_names import Target
from sfumato.merging.factors import KEEP_ALL, Budget, Factors, factorise, from_module, to_module, truncate
from sfumato.merging.methods import DENSE, LOW_RANK, Dense, LowRank, MethodSettings, check_method, linear
from sfumato.utils import randomness

WeightOf = Callable[[Target], Tensor]
"""The pristine weight of a module, for the kinds of adapter whose delta depends on it."""


_CONVOLUTIONS = frozenset({"conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "proj_in", "proj_out"})
"""Last words of the paths of layers that are convolutions, in some family at least."""


@dataclass(frozen=True)
class MergeSource:
    """One adapter of a merge. name: for messages. weight: for all of it, or (U-Net, text encoders).

    words: the textual inversions bundled with it, which no weight scales. skipped: keys of its file that were left out
    because that was allowed.
    """

    name: str
    changes: Mapping[Target, Change]
    weight: Weight = 1.0
    words: Vectors = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether it changes anything; one whose weight is 0 wherever it has something is as if it were not there."""
        return any(weight_at(self.weight, *target) for target in self.changes)

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing at any weight: all its changes are low-rank ones of zero."""
        forms = [(change, change.low_rank()) for change in self.changes.values()]
        return all(form is not None and form.is_zero and change.bias_delta is None for change, form in forms)


@dataclass(frozen=True)
class Merged:
    """The result. kept: for each module the share of the energy of the wanted delta that its factors hold.

    energy: the squared norm of each wanted delta.
    """

    modules: Mapping[Target, LoraModule]
    kept: Mapping[Target, float] = field(default_factory=dict)
    energy: Mapping[Target, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of the whole energy that is kept."""
        total = sum(self.energy.values())
        return sum(self.kept[target] * energy for target, energy in self.energy.items()) / total if total else 1.0

    @property
    def error(self) -> float:
        """The relative error of the whole delta, the root of what is not kept."""
        return math.sqrt(max(0.0, 1.0 - self.share))

    @property
    def is_exact(self) -> bool:
        """Whether the factors are the wanted deltas, but for rounding."""
        return self.share > 1 - 1e-10

    def __str__(self) -> str:
        return "exact" if self.is_exact else f"keeps {self.share:.2%} of the energy, relative error {self.error:.3g}"


def merge(
    sources: Sequence[MergeSource],
    *,
    method: str = "linear",
    settings: MethodSettings = MethodSettings(),  # noqa: B008 - frozen
    budget: Budget = KEEP_ALL,
    seed: int = 0,
    base: WeightOf | None = None,
) -> Merged:
    """The sources as one LoRA.

    method: a name of `METHODS`. budget: how much of the result is kept; with none, what has a low rank is exact (ranks
    add up), and a method without one gets the sum of the ranks. base: gives the weight that DoRA, OFT and their like
    depend on. Sources of weight 0 are as if they were not there.
    Raises AdapterError for sources that do not belong together, and for what a LoRA cannot hold.
    """
    for source in sources:
        refuse_model(source.name, source.changes)
    check_method(method)
    modules: dict[Target, LoraModule] = {}
    kept: dict[Target, float] = {}
    energy: dict[Target, float] = {}
    for target in dict.fromkeys(target for source in sources for target in source.changes):
        there = [source for source in sources if target in source.changes]
        weights = [weight_at(source.weight, *target) for source in there]
        terms = [
            _Term(source.name, target, source.changes[target], weight)
            for source, weight in zip(there, weights, strict=True)
            if weight != 0
        ]
        if not terms:
            continue
        draws = randomness.generator(seed, f"merge/{'/'.join(target)}")
        found = _merge_module(terms, method, settings, budget, draws, base)
        modules[target], kept[target], energy[target] = found
    if not modules:
        raise AdapterError("nothing is left to merge: every adapter has the weight 0, or no block was chosen.")
    return Merged(modules, kept, energy)


def refuse_model(name: str, changes: Mapping[Target, Change]) -> None:
    """Raise AdapterError where these are the changes of a whole model, which no LoRA holds, or change no weight."""
    refuse_modules(name, changes)
    for change in changes.values():
        if isinstance(change, Replacement):
            raise AdapterError(
                f"{name} is a whole model, which no LoRA holds. Bake it into a base with `sfumato merge --into`, or "
                f"take a LoRA out of it first: {extract_command(change)}."
            )


@dataclass(frozen=True)
class _Term:
    source: str
    target: Target
    change: Change
    weight: float

    def low_rank(self) -> LoraModule | None:
        if bias_change(self.change, has_bias=may_have_bias(self.target)) is not None:
            raise AdapterError(
                f"{self.source}: {'.'.join(self.target)} changes a bias, which a LoRA cannot. "
                "Bake it into a checkpoint with sfumato merge --into, or leave the module out with its --blocks."
            )
        return self.change.low_rank()

    def dense(self, base: WeightOf | None) -> Tensor:
        return dense_delta(self.change, self.target, self.source, base)


def dense_delta(change: Change, target: Target, source: str, base: WeightOf | None) -> Tensor:
    """The change's delta, fp32 in the weight's shape. Raises AdapterError where it needs a base and none is given."""
    if base is not None:
        delta = change.delta(base(target))
    elif (known := weight_independent_delta(change)) is None:
        raise AdapterError(
            f"{source}: the delta of {change.kind} in {'.'.join(target)} depends on the weight that it changes. "
            "Name the base it was made for with --base."
        )
    else:
        delta, whole = known, isinstance(change, Difference)  # has the weight's own shape
        if not whole and delta.ndim == 2 and target[1].rpartition(".")[2] in _CONVOLUTIONS:
            raise AdapterError(
                f"{source}: {change.kind} in {'.'.join(target)} is {list(delta.shape)}, which does not tell the kernel "
                "of a convolution. Name the base it was made for with --base."
            )
    if delta.ndim < 2:
        raise AdapterError(
            f"{source}: {'.'.join(target)} is a vector ({change.kind}), which a LoRA cannot change. "
            "Bake it into a checkpoint with sfumato merge --into, or leave the module out with its --blocks."
        )
    return delta


def _merge_module(
    terms: Sequence[_Term],
    method: str,
    settings: MethodSettings,
    budget: Budget,
    draws: torch.Generator,
    base: WeightOf | None,
) -> tuple[LoraModule, float, float]:
    """(module, share of the energy that it keeps, that energy)."""
    low = [term.low_rank() for term in terms]
    deltas = [term.dense(base) if module is None else module for term, module in zip(terms, low, strict=True)]
    shape = _one_shape(terms, [tuple(delta.shape) for delta in deltas])
    weights = [term.weight for term in terms]
    dense = [term for term, delta in zip(terms, deltas, strict=True) if isinstance(delta, Tensor)]
    if dense and budget == KEEP_ALL:
        kinds = sorted({term.change.kind for term in dense})
        raise AdapterError(
            f"{dense[0].source}: {', '.join(kinds)} in {'.'.join(dense[0].target)} has no exact low-rank form. "
            "Say how much to keep: --rank 32 or --keep-energy 0.99."
        )
    if method in DENSE:
        factors, share, energy = _merge_dense(DENSE[method](settings, draws), deltas, weights, budget, draws)
    elif method == "linear" and dense:  # summed before anything is left out
        factors, share, energy = _merge_dense(linear, deltas, weights, budget, draws)
    else:
        factors, share, energy = _merge_factors(LOW_RANK[method](settings, draws), deltas, weights, budget, draws)
    return to_module(factors, shape), share, energy


_Delta = LoraModule | Tensor
"""A term's delta: its factors where it has any, or fp32 in the weight's shape."""


def _merge_dense(
    method: Dense,
    deltas: Sequence[_Delta],
    weights: Sequence[float],
    budget: Budget,
    draws: torch.Generator,
) -> tuple[Factors, float, float]:
    """Merge whole matrices, then factorise: (factors, share of the energy that they keep, that energy)."""
    merged = method([_flat(d) if isinstance(d, Tensor) else from_module(d).delta() for d in deltas], weights)
    if budget == KEEP_ALL:
        budget = Budget(rank=min(sum(d.rank for d in deltas if isinstance(d, LoraModule)), *merged.shape))
    energy = float(merged.square().sum())
    factors, share = factorise(merged, budget, draws)
    return factors, share, energy


def _merge_factors(
    method: LowRank,
    deltas: Sequence[_Delta],
    weights: Sequence[float],
    budget: Budget,
    draws: torch.Generator,
) -> tuple[Factors, float, float]:
    """Factorise what has none, then merge factors: (factors, share of the energy that they keep, that energy)."""
    parts = [factorise(_flat(d), budget, draws) if isinstance(d, Tensor) else (from_module(d), 1.0) for d in deltas]
    merged = method([factors for factors, _ in parts], weights)
    energy = merged.energy()
    first = min(share for _, share in parts)
    if budget == KEEP_ALL:
        return merged, first, energy
    factors, share = truncate(merged, budget)
    return factors, first * share, energy


def _flat(delta: Tensor) -> Tensor:
    return delta.double().reshape(delta.shape[0], -1)


def _one_shape(terms: Sequence[_Term], shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the weight that all terms change; a 1x1 convolution may be spelt as a matrix."""
    trimmed = [shape[:2] if shape[2:] == (1, 1) else shape for shape in shapes]
    for term, shape in zip(terms, trimmed, strict=True):
        if shape != trimmed[0]:
            raise AdapterError(
                f"{term.source}: {'.'.join(term.target)} is {list(shape)}, in {terms[0].source} it is "
                f"{list(trimmed[0])}. They were trained for different bases; merge adapters of one."
            )
    return max(shapes, key=len)
