"""LoRA files of other tools and our own, read strictly into one form: {(part, path): LoraModule}."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from sfumato.errors import AdapterError
from sfumato.files.adapter_file import read_adapter
from sfumato.files.changes.lora import LoraModule
from sfumato.files.embedding_file import Vectors
from sfumato.files.kohya import Target
from sfumato.numerals import pluralize


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read from a file. modules: by (part, path), paths as in `named_modules()` of transformers >= 5.6.

    family: "sd1", "sd2", "sdxl", "pocket", or None if neither shapes nor metadata say it. text_width: the input width
    of the cross-attention's keys; None without such modules. skipped: keys left out because `partial` allowed it.
    embeddings: new words bundled with it, as in `AdapterFile`, if they were allowed.
    """

    path: Path
    modules: Mapping[Target, LoraModule]
    metadata: Mapping[str, str]
    family: str | None
    text_width: int | None
    spellings: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    embeddings: Vectors = field(default_factory=lambda: MappingProxyType({}))


def read_lora(path: str | os.PathLike[str], *, partial: bool = False, words: bool = False) -> LoraFile:
    """Read the adapter at `path` if all of it is LoRA, for work on its factors: training, resizing.

    partial: leave out keys that are not understood and modules that lack a half, and list them in `skipped`; otherwise
    they are errors. words: also accept a file with new words in it. Raises FileError for a broken file, and
    AdapterError for one that is not a LoRA or is incomplete. `read_adapter` reads every kind.
    """
    file = read_adapter(path, partial=partial)
    modules = {target: change for target, change in file.changes.items() if isinstance(change, LoraModule)}
    total = len(file.changes)
    if len(modules) < total:
        counts = ", ".join(
            f"{kind} in {pluralize(count, 'module')}" for kind, count in file.kinds.items() if kind != "LoRA"
        )
        raise AdapterError(
            f"{file.path.name}: the file holds {counts} of {total}; wanted a LoRA. Convert it to a LoRA."
        )
    biased = sum(module.bias_delta is not None for module in modules.values())
    if biased or (file.embeddings and not words):
        extra = (
            f"{pluralize(biased, 'change')} of a bias"
            if biased
            else f"the vectors of {pluralize(len(file.embeddings), 'token')}"
        )
        raise AdapterError(f"{file.path.name}: the file holds {extra} as well; wanted a LoRA alone. Take another file.")
    return LoraFile(
        file.path,
        MappingProxyType(modules),
        file.metadata,
        file.family,
        file.text_width,
        file.spellings,
        file.skipped,
        file.embeddings,
    )
