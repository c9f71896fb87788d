"""The only place that opens weight files: safe reading, other tools' formats, metadata, writing.

Importing this package, or a module of it that needs no torch (`header`, `keys`, `metadata`, `inspect`), loads no torch.
A name below loads its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.files.adapter_file import AdapterFile, EmbeddingFile, LoraFile, read_adapter, read_embedding, read_lora
    from sfumato.files.header import Header, read_header
    from sfumato.files.inspect import Inspection, inspect_file
    from sfumato.files.kinds import Change, LoraModule
    from sfumato.files.metadata import Description, Sampling, describe, short_hash
    from sfumato.files.read import read_tensors
    from sfumato.files.save import write_tensors
    from sfumato.files.writing.kohya import write_lora
    from sfumato.files.writing.peft import write_diffusers, write_peft

_HOME = {
    "AdapterFile": "adapter_file",
    "Change": "kinds",
    "Description": "metadata",
    "EmbeddingFile": "adapter_file",
    "Header": "header",
    "Inspection": "inspect",
    "LoraFile": "adapter_file",
    "LoraModule": "kinds",
    "Sampling": "metadata",
    "describe": "metadata",
    "inspect_file": "inspect",
    "read_adapter": "adapter_file",
    "read_embedding": "adapter_file",
    "read_header": "header",
    "read_lora": "adapter_file",
    "read_tensors": "read",
    "short_hash": "metadata",
    "write_diffusers": "writing.peft",
    "write_lora": "writing.kohya",
    "write_peft": "writing.peft",
    "write_tensors": "save",
}

__all__ = [
    "AdapterFile",
    "Change",
    "Description",
    "EmbeddingFile",
    "Header",
    "Inspection",
    "LoraFile",
    "LoraModule",
    "Sampling",
    "describe",
    "inspect_file",
    "read_adapter",
    "read_embedding",
    "read_header",
    "read_lora",
    "read_tensors",
    "short_hash",
    "write_diffusers",
    "write_lora",
    "write_peft",
    "write_tensors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato.files' has no attribute {name!r}")
    return getattr(import_module(f"sfumato.files.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
