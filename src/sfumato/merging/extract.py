"""An adapter out of two models, and a smaller adapter out of a larger one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sfumato import randomness
from sfumato.errors import AdapterError
from sfumato.files.changes import LoraModule
from sfumato.files.kohya import Target
from sfumato.merging.factors import Budget, factorise, from_module, to_module, truncate


@dataclass(frozen=True)
class Kept:
    """What of a change an adapter holds, as shares of its energy (squared norm).

    share: of all that changed. modules: of each module's change. left_out: the energy of changed tensors that a LoRA
    cannot hold (biases, norms, embeddings), by name, as shares of the whole.
    """

    share: float
    modules: Mapping[str, float]
    left_out: Mapping[str, float]

    def __str__(self) -> str:
        text = f"keeps {self.share:.2%} of the energy"
        if self.left_out:
            text += f"; {sum(self.left_out.values()):.2%} are in {len(self.left_out)} tensors that no LoRA can hold"
        return text


def extract_lora(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    rank: int | None = None,
    keep_energy: float | None = None,
    seed: int = 0,
) -> tuple[dict[str, LoraModule], Kept]:
    """The difference of two state dicts of one model as a LoRA, by module path, and how much of it that holds.

    before, after: the same names and shapes, any float dtype; the difference is taken in float64. rank, keep_energy:
    how much of each module to keep, see `Budget`; with neither, all of it. What did not change gets no module. Weights
    named `....weight` of two or four dimensions are taken, embeddings are not.
    Raises AdapterError for state dicts of different models, and where nothing changed.
    """
    return extract(
        ((name, before[name], after[name]) for name in _names(before, after)), Budget(rank, keep_energy), seed
    )


def extract(
    pairs: Iterable[tuple[str, Tensor, Tensor]], budget: Budget, seed: int = 0
) -> tuple[dict[str, LoraModule], Kept]:
    """The same from (name, before, after) one at a time, so that two checkpoints need not fit into memory."""
    modules: dict[str, LoraModule] = {}
    shares: dict[str, float] = {}
    energies: dict[str, float] = {}
    left_out: dict[str, float] = {}
    for name, old, new in pairs:
        if old.shape != new.shape:
            raise AdapterError(
                f"{name} is {list(old.shape)} before and {list(new.shape)} after: these are different models. "
                "Name the base that it was trained from."
            )
        delta = new.detach().cpu().double() - old.detach().cpu().double()
        energy = float(delta.square().sum())
        if energy == 0:
            continue
        if not name.endswith(".weight") or delta.ndim not in (2, 4) or name.endswith("_embedding.weight"):
            left_out[name] = energy
            continue
        path = name.removesuffix(".weight")
        draws = randomness.generator(seed, f"extract/{path}")
        factors, shares[path] = factorise(delta.reshape(delta.shape[0], -1), budget, draws)
        modules[path], energies[path] = to_module(factors, delta.shape), energy
    total = sum(energies.values()) + sum(left_out.values())
    if not modules:
        raise AdapterError("no weight of a linear layer or a convolution differs, so there is no adapter to extract.")
    share = sum(shares[path] * energy for path, energy in energies.items()) / total
    return modules, Kept(share, shares, {name: energy / total for name, energy in left_out.items()})


def _names(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    odd = sorted(before.keys() ^ after.keys())
    if odd:
        raise AdapterError(
            f"{len(odd)} tensors are in one of the two models only, first {odd[0]}: these are different models. "
            "Name the base that it was trained from."
        )
    return list(before)


def resize(modules: Mapping[Target, LoraModule], budget: Budget) -> tuple[dict[Target, LoraModule], float]:
    """The modules within the budget, by the SVD of their factors, and the share of the energy that they keep."""
    found: dict[Target, LoraModule] = {}
    kept = total = 0.0
    for target, module in modules.items():
        factors = from_module(module)
        smaller, share = truncate(factors, budget)
        energy = factors.energy()
        kept, total = kept + share * energy, total + energy
        found[target] = dataclasses.replace(to_module(smaller, module.shape), bias_delta=module.bias_delta)
    return found, kept / total if total else 1.0
