"""The adapters of a merge out of their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import AdapterError
from sfumato.files.adapter_file import read_adapter
from sfumato.files.header import read_header
from sfumato.files.kohya import Target
from sfumato.files.metadata import data_sha256, joint_hash, short_hash
from sfumato.files.peft_folder import adapter_sources
from sfumato.files.read import Stamp, stamp
from sfumato.merging.lineage import Parent
from sfumato.merging.merge import MergeSource
from sfumato.merging.whole_model import files_of_parts, is_whole_model, read_mixable
from sfumato.weighting.adapter import Adapter, public_name
from sfumato.weighting.blocks import Blocks
from sfumato.weighting.modules import select_modules

if TYPE_CHECKING:
    from sfumato.merging.stored import StoredBase


def read_source(
    adapter: Adapter, *, partial: bool = False, words: bool = False, models: bool = False
) -> tuple[MergeSource, Parent]:
    """What an adapter changes, and what a file made of it will say of it.

    words: whether the caller hands on the textual inversions bundled with it, or loses nothing without them. models:
    whether a whole model is an adapter, too.
    Raises AdapterError, or FileError; also for textual inversions that would be lost, unless `partial` accepts that.
    """
    file = (read_mixable if models else read_adapter)(adapter.path, partial=partial)
    if file.embeddings and not partial and not words:
        tokens = ", ".join(map(repr, file.embeddings))
        raise AdapterError(
            f"{file.path.name}: has textual inversions bundled with it ({tokens}), which would be lost. "
            "Accept that with partial=True (--partial)."
        )
    source = MergeSource(adapter.label, file.changes, adapter.weight, file.embeddings, file.skipped)
    name, digest = public_name(adapter.path), adapter_hash(Path(adapter.path))
    return source, Parent(name, digest, file.metadata, file.family, adapter.weight)


def read_sources(
    adapters: Sequence[Adapter], *, partial: bool = False, words: bool = False
) -> tuple[list[MergeSource], list[Parent]]:
    """The same of several adapters, and of whole models."""
    found = [read_source(adapter, partial=partial, words=words, models=True) for adapter in adapters]
    return [source for source, _ in found], [parent for _, parent in found]


def stored_if_named(base: str | None) -> StoredBase | None:
    """The parameters of the base, as `stored_base` has them; None where none is named."""
    if base is None:
        return None
    from sfumato.merging.stored import stored_base  # which imports diffusers, as adapters alone do not

    return stored_base(base)


def adapter_hash(path: Path) -> str:
    """The 12 hex digits by which an adapter is named; of a folder, of its weight files together.

    What was hashed is remembered for as long as the files stay as they are, since every picture tells it.
    """
    if not path.is_dir():
        return _short_hash(path, stamp(path.stat()))
    files = files_of_parts(path) if is_whole_model(path) else [source.header.path for source in adapter_sources(path)]
    return joint_hash(_data_sha256(file, stamp(file.stat())) for file in files)


# A file that was written anew has another stamp, and is hashed again.
@cache
def _short_hash(path: Path, _stamp: Stamp) -> str:
    return short_hash(path)


@cache
def _data_sha256(path: Path, _stamp: Stamp) -> str:
    return data_sha256(read_header(path))


def choose_blocks(sources: Sequence[MergeSource], rules: Sequence[str]) -> list[MergeSource]:
    """The sources with only the modules that the rules leave: WORDS for all of them, LABEL=WORDS for one.

    Words with factors (`down:0.3,up.1:1.2`, a list of the web interfaces) leave all, with so much of the weight each.
    Raises AdapterError for a label or words that name nothing, and for factors given twice.
    """
    chosen = list(sources)
    for rule in rules:
        label, equals, words = rule.rpartition("=")
        if equals and label not in {source.name for source in sources}:
            known = ", ".join(source.name for source in sources)
            raise AdapterError(f"blocks {rule!r}: no adapter is called {label!r}; there are {known}.")
        if not words.strip(" ,"):
            raise AdapterError(f"blocks {rule!r}: names no block; wanted such as up, down.1, or down:0.3,up.1:1.2.")
        for place, source in enumerate(chosen):
            if equals and source.name != label:
                continue
            if Blocks.has_factors(words):
                chosen[place] = replace(source, weight=_with_factors(source, words))
            else:
                kept: set[Target] = select_modules(source.changes, words)
                chosen[place] = replace(source, changes={t: c for t, c in source.changes.items() if t in kept})
    return chosen


def _with_factors(source: MergeSource, words: str) -> Blocks:
    if isinstance(source.weight, Blocks):
        raise AdapterError(f"blocks {words!r}: {source.name} has factors already; name them in one.")
    weight = Blocks.parse(source.weight, words)
    if unknown := weight.unnamed(list(source.changes)):
        raise AdapterError(
            f"blocks {', '.join(unknown)}: no module of {source.name} is called that. Wanted such as down, mid, up.1, "
            "te, attn2, or IN04, M00, OUT07, BASE."
        )
    return weight
