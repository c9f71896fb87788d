"""Mix adapters into an existing diffusers pipeline: exactly, with changeable weights, and removable without a trace.

    mix = compose(pipe, Adapter("line.safetensors", 0.8), Adapter("otter.safetensors", 0.6))
    mix.set(line=0.5)
    mix.undo()

Importing this loads no torch; the first mix does.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sfumato.adapters.weights import Adapter

if TYPE_CHECKING:
    from sfumato.compose.guidance import adapter_guidance
    from sfumato.compose.match import ApplyMode
    from sfumato.compose.mix import Mix, compose, current

__all__ = ["Adapter", "Mix", "adapter_guidance", "compose", "current"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sfumato.compose' has no attribute {name!r}")
    module = "guidance" if name == "adapter_guidance" else "mix"
    value = getattr(import_module(f"sfumato.compose.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallableModule(ModuleType):
    """`sfumato.compose(pipe, ...)` calls the module's main function, and the module has other names besides."""

    def __call__(
        self,
        pipe: Any,
        *adapters: Adapter,
        partial: bool = False,
        way: "ApplyMode" = "auto",
        verify: bool = False,
        words_known: bool = False,
    ) -> "Mix":
        """Mix the adapters into a diffusers pipeline, in place; `help(sfumato.compose)` says all of it."""
        mixed: Mix = __getattr__("compose")(
            pipe, *adapters, partial=partial, way=way, verify=verify, words_known=words_known
        )
        return mixed


sys.modules[__name__].__class__ = _CallableModule
