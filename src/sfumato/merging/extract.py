"""An adapter out of two models, and a smaller adapter out of a larger one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.errors import AdapterError
from sfumato.files.changes import LoraModule
from sfumato.files.kohya import Target
from sfumato.merging.factors import Budget, factorise, from_module, to_module, truncate

if TYPE_CHECKING:
    from sfumato.merging.stored import Parameter


@dataclass(frozen=True)
class Extracted:
    """What of a change an adapter holds, as shares of its energy (squared norm).

    share: of all that changed. modules: of each module's change. left_out: the energy of changed tensors that a LoRA
    cannot hold (biases, norms, embeddings), as shares of the whole.
    """

    share: float
    modules: Mapping[Target, float]
    left_out: Mapping[Parameter, float]

    def __str__(self) -> str:
        text = f"keeps {self.share:.2%} of the energy"
        if self.left_out:
            text += f"; {sum(self.left_out.values()):.2%} are in {len(self.left_out)} tensors that no LoRA can hold"
        return text


def extract(
    pairs: Iterable[tuple[Parameter, Tensor, Tensor]], budget: Budget
) -> tuple[dict[Target, LoraModule], Extracted]:
    """The difference of two models as a LoRA, and how much of it that holds.

    pairs: (parameter, before, after) one at a time, so that two checkpoints need not fit into memory; of any float
    dtype, the difference is taken in float64. Where the second has fewer bits, it is taken of what `rounded_alike`
    leaves of the first. What did not change gets no module. Weights named `....weight` of two or
    four dimensions are taken, embeddings are not.
    Raises AdapterError for tensors of different models, and where nothing changed.
    """
    modules: dict[Target, LoraModule] = {}
    shares: dict[Target, float] = {}
    energies: dict[Target, float] = {}
    left_out: dict[Parameter, float] = {}
    for parameter, old, new in pairs:
        if old.shape != new.shape:
            raise AdapterError(
                f"{'/'.join(parameter)} is {list(old.shape)} before and {list(new.shape)} after: these are different "
                "models. Name the base that it was trained from."
            )
        delta = new.detach().cpu().double() - rounded_alike(old.detach().cpu(), new).double()
        energy = float(delta.square().sum())
        if energy == 0:
            continue
        part, name = parameter
        if not name.endswith(".weight") or delta.ndim not in (2, 4) or name.endswith("_embedding.weight"):
            left_out[parameter] = energy
            continue
        target = part, name.removesuffix(".weight")
        draws = randomness.generator(0, f"extract/{'/'.join(target)}")
        factors, shares[target] = factorise(delta.reshape(delta.shape[0], -1), budget, draws)
        modules[target], energies[target] = to_module(factors, delta.shape), energy
    total = sum(energies.values()) + sum(left_out.values())
    if not modules:
        raise AdapterError(
            "no weight of a linear layer or a convolution differs, so there is no adapter to extract. Name the "
            "fine-tuned model first, and with --base what it was trained from."
        )
    share = sum(shares[target] * energy for target, energy in energies.items()) / total
    return modules, Extracted(share, shares, {parameter: energy / total for parameter, energy in left_out.items()})


def rounded_alike(before: Tensor, after: Tensor) -> Tensor:
    """The tensor as it would have been saved beside `after`, where that has fewer bits: a model that was saved in half
    precision differs in every weight from a base that was not, and of that nothing was learned."""
    if not (before.is_floating_point() and after.is_floating_point()):  # places of tokens, which some files hold
        return before
    fewer = torch.finfo(after.dtype).bits < torch.finfo(before.dtype).bits
    return before.to(after.dtype) if fewer else before


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
