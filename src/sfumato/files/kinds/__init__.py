"""The kinds of adapter and how each changes a weight. One small class for each kind, with the arithmetic of its
tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from sfumato.files.keys import base_kind, module_class
from sfumato.files.kinds.base import Change, LoraModule, ModuleTensors
from sfumato.files.kinds.dora import Dora, Glora
from sfumato.files.kinds.ia3 import Difference, Ia3
from sfumato.files.kinds.lokr import Loha, Lokr
from sfumato.files.kinds.modules import ModuleAdapter
from sfumato.files.kinds.oft import InputBoft, InputOft, OutputBoft, OutputOft

__all__ = ["KINDS", "Change", "LoraModule", "ModuleAdapter", "ModuleTensors", "read_change"]

KINDS: Mapping[str, Callable[[ModuleTensors], Change]] = MappingProxyType(
    {
        "LoRA": LoraModule.from_tensors,
        "LoHa": Loha.from_tensors,
        "LoKr": Lokr.from_tensors,
        "OFT": lambda parts: (OutputOft if "oft_blocks" in parts.names else InputOft).from_tensors(parts),
        "BOFT": lambda parts: (OutputBoft if "oft_blocks" in parts.names else InputBoft).from_tensors(parts),
        "IA3": Ia3.from_tensors,
        "GLoRA": Glora.from_tensors,
        "difference": Difference.from_tensors,
    }
)
"""The class of each kind that changes weights. `sfumato.files.keys.KIND_KEYS` has the names of its tensors, and the
classes of the kinds that change none."""

_DORA_OF = ("LoRA", "LoHa", "LoKr")


def read_change(parts: ModuleTensors) -> Change:
    """The change that a module's tensors make.

    Raises AdapterError for tensors of two kinds, or tensors that do not fit together.
    """
    if (kind := module_class(parts.kind)) is not None:
        return kind.from_tensors(parts)
    base = base_kind(parts.kind)
    if base not in KINDS or (base != parts.kind and base not in _DORA_OF):
        raise parts.error(f"its tensors are of {parts.kind}, which no tool defines; wanted those of one kind")
    change = KINDS[base](parts)
    return change if base == parts.kind else Dora.from_tensors(parts, change)
