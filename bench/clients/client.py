"""What a client is, and what several of them need: modules stood in for, names, models of zeros."""

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from sfumato.files.module_names import Target, kohya_name

Client = Callable[[str, Mapping[str, nn.Module], Path], dict[str, Tensor]]
"""(family, parts, file) -> the delta of each weight applied, by kohya's name, and of each bias, by that + ".bias"."""


def stand_in(name: str, **content: Any) -> Any:
    """A module of that name with this content, and a class of its own for anything else that is asked of it."""
    module: Any = ModuleType(name)
    module.__dict__.update(content)

    def anything(attribute: str) -> type:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return type(attribute, (), {})

    module.__getattr__ = anything
    sys.modules[name] = module
    return module


def named(family: str, target: Target, last: str = "weight") -> str:
    """What `report` calls a weight or bias."""
    try:
        name = kohya_name(family, *target)
    except Exception:
        name = ".".join(target)
    return name if last == "weight" else f"{name}.{last}"


def zeroed(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of the parts with nothing but zeros, in which whatever a client adds is seen."""
    copies = {name: copy.deepcopy(part) for name, part in parts.items()}
    for part in copies.values():
        for tensor in part.parameters():
            nn.init.zeros_(tensor)
    return copies


def changed(family: str, parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What is no longer zero."""
    return {
        named(family, (part, name.rpartition(".")[0]), name.rpartition(".")[2]): tensor.detach().clone()
        for part, model in parts.items()
        for name, tensor in model.named_parameters()
        if bool(tensor.any())
    }


def with_level(encoder: nn.Module) -> nn.Module:
    """The encoder with the level `text_model` that transformers 5.6 took from CLIPTextModel."""
    if hasattr(encoder, "text_model"):
        return encoder
    wrapper = nn.Module()
    wrapper.text_model = encoder
    return wrapper
