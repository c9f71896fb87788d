"""An adapter out of two models, and a smaller adapter out of a larger one.

One adapter into another grammar, or baked into a kind that the readers of that grammar know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.adapter_file import Vectors
from sfumato.files.kinds import LoraModule
from sfumato.files.kinds.ia3 import bias_change, changes_weight, may_have_bias
from sfumato.files.module_names import Target
from sfumato.files.writing.kohya import write_lora
from sfumato.files.writing.peft import write_diffusers, write_peft
from sfumato.merging.factors import Budget, factorise, from_module, to_module, truncate
from sfumato.merging.merge import Merged, MergeSource, WeightOf, merge
from sfumato.utils import randomness

if TYPE_CHECKING:
    from sfumato.merging.model_weights import Parameter


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
        delta = new.detach().cpu().double() - round_like(old.detach().cpu(), new).double()
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


def round_like(before: Tensor, after: Tensor) -> Tensor:
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


WRITERS: Mapping[str, Callable[..., Path]] = MappingProxyType(
    {"kohya": write_lora, "diffusers": write_diffusers, "peft": write_peft}
)


def as_lora(source: MergeSource, budget: Budget, base: WeightOf | None) -> Merged:
    """The adapter as LoRA modules: exact where it has that form; else its delta on the base within the budget.

    Modules that have the form are not cut down to the budget. Raises AdapterError for a delta that needs a base or a
    budget and has none, and for what a LoRA cannot hold.
    """
    modules: dict[Target, LoraModule] = {}
    rest = {}
    for target, change in source.changes.items():
        low = change.low_rank()
        if low is None:
            rest[target] = change
        else:
            modules[target] = low
    if not rest:
        return Merged(modules)
    baked = merge([MergeSource(source.name, rest)], budget=budget, base=base)
    energy = {target: from_module(module).energy() for target, module in modules.items()}
    return Merged(
        modules | dict(baked.modules), dict.fromkeys(modules, 1.0) | dict(baked.kept), energy | dict(baked.energy)
    )


class Weights(Protocol):
    """Where a base's parameters are read, such as a `StoredBase`."""

    def weight(self, target: Target, which: str = "weight") -> Tensor:
        """The weight or "bias" of a module in fp32."""
        ...


class Deltas(Mapping[Target, tuple[Tensor | None, Tensor | None]]):
    """An adapter's delta of every weight and bias that it changes, on the base; None for what stays. Exact, and large.

    Each is taken when it is asked for, so that they need not fit into memory. dtype: what the deltas, taken in fp32,
    are rounded to. Asked for one, it raises AdapterError, or BaseModelError for what the base lacks.
    """

    def __init__(self, source: MergeSource, base: Weights, dtype: torch.dtype = torch.float32) -> None:
        self._source, self._base, self._dtype = source, base, dtype

    def __getitem__(self, target: Target) -> tuple[Tensor | None, Tensor | None]:
        change = self._source.changes[target]
        bias = bias_change(change, has_bias=may_have_bias(target))
        try:
            weight = change.delta(self._base.weight(target)).to(self._dtype) if changes_weight(change) else None
            if bias is None:
                return weight, None
            return weight, bias.delta(self._base.weight(target, "bias")).to(self._dtype)
        except AdapterError as error:
            raise AdapterError(f"{self._source.name}, {'.'.join(target)}: {error}") from None

    def __iter__(self) -> Iterator[Target]:
        return iter(self._source.changes)

    def __len__(self) -> int:
        return len(self._source.changes)


def unread_by_diffusers(modules: Mapping[Target, LoraModule], to: str) -> list[str]:
    """What diffusers (0.42) does not read of these modules in the grammar `to`, one text a text encoder.

    It tells the grammar of a text encoder by single layers: kohya's by out_proj or those of the MLP, and by the latter
    it has no names for attention; its own by those of attention.
    """
    found = []
    for part in sorted({part for part, _ in modules if part != "unet"}):
        layers = [path.rpartition(".")[2] for own, path in modules if own == part]
        attention = sum(layer in ("q_proj", "k_proj", "v_proj") for layer in layers)
        if to == "diffusers" and not attention and "out_proj" not in layers:
            found.append(f"refuses a file in its own grammar that changes no attention of {part}")
        elif to == "kohya" and "out_proj" not in layers:
            if not {"fc1", "fc2"} & {*layers}:
                found.append(f"refuses a file that changes no out_proj of {part}")
            elif attention:
                found.append(f"leaves out {attention} of {len(layers)} modules of {part}, which changes no out_proj")
    return found


def diffusers_warnings(
    file: Path, modules: Mapping[Target, LoraModule], to: str = "kohya", *, way: str | None = None
) -> list[str]:
    """A line on each text encoder of which diffusers does not read these modules in the file, which is in the grammar
    `to`. way: to the other grammar; with `sfumato convert` if unset."""
    other = "diffusers" if to == "kohya" else "kohya"
    way = way or f"sfumato convert {file.name} --to {other} -o OTHER.safetensors"
    instead = "" if unread_by_diffusers(modules, other) else f"; for diffusers, {way}"
    return [f"{file.name}: diffusers {what}{instead}" for what in unread_by_diffusers(modules, to)]


def write_format(
    to: str,
    path: Path,
    modules: Mapping[Target, LoraModule],
    *,
    family: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
    words: Vectors | None = None,
) -> Path:
    """Write LoRA modules in the grammar `to`, a name of `WRITERS`; new words, which only kohya's has names for."""
    bundled = {"words": words} if words else {}
    return WRITERS[to](path, modules, family=family, metadata=metadata, dtype=dtype, **bundled)
