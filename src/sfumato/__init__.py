"""sfumato: teach a Stable Diffusion model a style or a subject from a dozen images, and mix what it learned.

Importing this package loads nothing heavy; a public name loads its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sfumato.utils.old_names import install as _install_old_names

if TYPE_CHECKING:
    from sfumato.adapters.embeddings import embedding
    from sfumato.compose import Adapter, Mix, compose
    from sfumato.errors import SfumatoError
    from sfumato.generation.draw import draw
    from sfumato.models import Base, load_base

__version__ = "0.27.0"
__all__ = ["Adapter", "Base", "Mix", "SfumatoError", "compose", "draw", "embedding", "load_base"]

_HOME = {
    "Adapter": "sfumato.compose",
    "Base": "sfumato.models",
    "Mix": "sfumato.compose",
    "SfumatoError": "sfumato.errors",
    "compose": "sfumato.compose",
    "draw": "sfumato.generation.draw",
    "embedding": "sfumato.adapters.embeddings.embedding",
    "load_base": "sfumato.models",
}


_install_old_names()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    module = import_module(_HOME[name])
    # `embedding` is a module itself, and so is `compose`, which can be called, too.
    value = module if name == "compose" else getattr(module, name, module)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
