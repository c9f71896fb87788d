"""The only place that opens weight files: safe reading, other tools' formats, metadata, writing.

Importing this package, or a module of it that needs no torch (`header`, `keys`, `metadata`, `inspect`), loads no torch.
A name below loads its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.files.adapter_file import AdapterFile, read_adapter
    from sfumato.files.changes import Change, LoraModule
    from sfumato.files.embedding_file import EmbeddingFile, read_embedding
    from sfumato.files.header import Header, read_header
    from sfumato.files.inspect import Inspection, inspect_file
    from sfumato.files.lora_file import LoraFile, read_lora
    from sfumato.files.metadata import Description, Sampling, describe, short_hash
    from sfumato.files.read import read_tensors
    from sfumato.files.save import write_tensors
    from sfumato.files.write_kohya import write_lora
    from sfumato.files.write_peft_keys import write_diffusers, write_peft

_HOME = {
    "AdapterFile": "adapter_file",
    "Change": "changes",
    "Description": "metadata",
    "EmbeddingFile": "embedding_file",
    "Header": "header",
    "Inspection": "inspect",
    "LoraFile": "lora_file",
    "LoraModule": "changes",
    "Sampling": "metadata",
    "describe": "metadata",
    "inspect_file": "inspect",
    "read_adapter": "adapter_file",
    "read_embedding": "embedding_file",
    "read_header": "header",
    "read_lora": "lora_file",
    "read_tensors": "read",
    "short_hash": "metadata",
    "write_diffusers": "write_peft_keys",
    "write_lora": "write_kohya",
    "write_peft": "write_peft_keys",
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
