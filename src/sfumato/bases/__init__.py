"""Base models: load one, find its family, encode text and pixels with it. Importing this loads no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sfumato.bases.family import FAMILIES, Family

if TYPE_CHECKING:
    from sfumato.bases.base import Base
    from sfumato.bases.loading import load_base
    from sfumato.bases.text import TextEmbedding

__all__ = ["FAMILIES", "Base", "Family", "TextEmbedding", "load_base"]

_HOME = {
    "Base": "sfumato.bases.base",
    "TextEmbedding": "sfumato.bases.text",
    "load_base": "sfumato.bases.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato.bases' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
