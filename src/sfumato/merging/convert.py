"""One adapter into another grammar, or baked into a kind that the readers of that grammar know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.changes import LoraModule
from sfumato.files.changes.bias import bias_change, may_have_bias
from sfumato.files.changes.difference import changes_weight
from sfumato.files.embedding_file import Vectors
from sfumato.files.kohya import Target
from sfumato.files.write_kohya import write_lora
from sfumato.files.write_peft_keys import write_diffusers, write_peft
from sfumato.merging.factors import Budget, from_module
from sfumato.merging.merge import Merged, MergeSource, WeightOf, merge

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


def write(
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
