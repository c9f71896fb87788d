"""The files that a client is given, and the deltas that they say."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.clients.changes import KINDS, RANK, norm_changes, random_changes, random_lora, without_bias
from sfumato.files.kinds import Change, LoraModule
from sfumato.files.module_names import Target, kohya_name
from sfumato.files.writing.kohya import write_difference, write_lora
from sfumato.merging.extract import Deltas, as_lora
from sfumato.merging.factors import Budget
from sfumato.merging.merge import MergeSource

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3}
"""The largest relative error of a module's delta, by the file's dtype."""
Wanted = dict[str, Tensor]
"""The deltas that a file says, as a client returns them."""


def lora_file(path: Path, family: str, modules: Mapping[Target, LoraModule], dtype: torch.dtype) -> Wanted:
    write_lora(path, modules, family=family, dtype=dtype)
    return {kohya_name(family, *target): module.delta() for target, module in modules.items()}


def difference_file(
    path: Path, family: str, parts: Mapping[str, nn.Module], changes: Mapping[Target, Change]
) -> Wanted:
    deltas = Deltas(MergeSource("a", changes), InMemory(parts))
    write_difference(path, deltas, family=family, dtype=torch.float32)
    found: Wanted = {}
    for target, (weight, bias) in deltas.items():
        if weight is not None:
            found[kohya_name(family, *target)] = weight
        if bias is not None:
            found[kohya_name(family, *target) + ".bias"] = bias
    return found


class InMemory:
    """What `Deltas` asks of a stored base, of modules."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.parts = parts

    def weight(self, target: Target, which: str = "weight") -> Tensor:
        return getattr(self.parts[target[0]].get_submodule(target[1]), which).detach()


def weight_of(parts: Mapping[str, nn.Module], target: Target) -> Tensor:
    return InMemory(parts).weight(target)


def files(
    name: str, family: str, parts: Mapping[str, nn.Module]
) -> Iterator[tuple[str, torch.dtype, Callable[[Path], Wanted], float]]:
    """(what, dtype, writer, the error of baking that is told) of each file that the client is given."""
    for only in ("attn", ""):
        modules = random_lora(parts, only)
        for dtype in LIMITS:
            yield f"LoRA of {only or 'all'}", dtype, lambda p, m=modules, d=dtype: lora_file(p, family, m, d), 0.0
    for kind in KINDS:
        changes = random_changes(parts, kind)
        made = as_lora(
            MergeSource("a", {t: without_bias(change) for t, change in changes.items()}),
            Budget(RANK),
            lambda target: weight_of(parts, target),
        )
        yield (
            f"{kind} as LoRA",
            torch.float32,
            lambda p, m=made.modules: lora_file(p, family, m, torch.float32),
            made.error,
        )
        if name != "sd-scripts":
            yield (
                f"{kind} as differences",
                torch.float32,
                lambda p, c=changes: difference_file(p, family, parts, c),
                0.0,
            )
    if name != "sd-scripts":
        norms = norm_changes(parts)
        yield (
            "norms as differences",
            torch.float32,
            lambda p: difference_file(p, family, parts, norms),
            0.0,
        )
