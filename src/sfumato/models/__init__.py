"""Base models: load one, find its family, encode text and pixels with it. Importing this loads no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sfumato.models.family import FAMILIES, Family

if TYPE_CHECKING:
    from sfumato.models.base import Base
    from sfumato.models.loading import load_base
    from sfumato.models.text import TextEmbedding

__all__ = ["FAMILIES", "Base", "Family", "TextEmbedding", "load_base"]

_HOME = {
    "Base": "sfumato.models.base",
    "TextEmbedding": "sfumato.models.text",
    "load_base": "sfumato.models.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato.models' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
