"""What is trained, where it attaches, and its change of a weight; weights by block; new words. Importing this loads
no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.adapters.adapter_model import Attached, attach
    from sfumato.adapters.kinds import ALGOS, Kind
    from sfumato.adapters.layers import UpdateLayer
    from sfumato.adapters.targets import TARGETS, ByLayer, select, target_layers
    from sfumato.adapters.tuners.lora import LoraLayer

_HOME = {
    "ALGOS": "kinds",
    "TARGETS": "targets",
    "Attached": "adapter_model",
    "ByLayer": "targets",
    "Kind": "kinds",
    "LoraLayer": "tuners.lora",
    "UpdateLayer": "layers",
    "attach": "adapter_model",
    "select": "targets",
    "target_layers": "targets",
}

__all__ = [
    "ALGOS",
    "TARGETS",
    "Attached",
    "ByLayer",
    "Kind",
    "LoraLayer",
    "UpdateLayer",
    "attach",
    "select",
    "target_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato.adapters' has no attribute {name!r}")
    value = getattr(import_module(f"sfumato.adapters.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
