"""The adapters of a merge out of their files.

What a file made of other files says of itself: its parents, their trigger words, their base. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sfumato import __version__
from sfumato.adapters.blocks import Blocks, select_modules
from sfumato.adapters.weights import Adapter, Weight, public_name
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import read_adapter
from sfumato.files.header import read_header
from sfumato.files.kinds.modules import refuse_modules
from sfumato.files.metadata import (
    LABELS,
    Description,
    adapter_guidance_of,
    clip_skip_of,
    data_sha256,
    describe,
    embedding_files_of,
    joint_hash,
    negatives_of,
    over_steps_of,
    prediction_type_of,
    sampling_of,
    short_hash,
    trigger_words,
)
from sfumato.files.module_names import Target
from sfumato.files.peft import adapter_sources
from sfumato.files.read import Stamp, stamp
from sfumato.merging.merge import MergeSource
from sfumato.merging.whole_model import files_of_parts, is_whole_model, read_adapter_or_model

if TYPE_CHECKING:
    from sfumato.merging.model_weights import StoredBase


T = TypeVar("T")


@dataclass(frozen=True)
class Parent:
    """A file that another is made of. hash: as `short_hash` gives it. weight: None where it was not weighted."""

    name: str
    hash: str
    metadata: Mapping[str, str]
    family: str | None
    weight: Weight | None = None


def prediction_type_notes(parents: Sequence[Parent], base: str = "", predicts: str = "") -> list[str]:
    """A line on each parent that was learned where the base predicts otherwise; without a base, than the first does.

    base, predicts: its name, and its prediction type where it is known.
    """
    known = [(parent.name, kind) for parent in parents if (kind := prediction_type_of(parent.metadata))]
    if known and not base:
        base, predicts = known[0]
    return [
        f"{name}: learned where the base predicts {kind}, and {base} {predicts}; together they draw something else."
        for name, kind in known
        if predicts and kind != predicts
    ]


def merged_metadata(
    parents: Sequence[Parent],
    *,
    title: str,
    family: str,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The metadata of a file made of `parents`; `write_lora` adds what it takes from the tensors.

    Trigger words, and the files of words that were learned beside them, are united in the order of the parents. Base,
    its fingerprint, clip skip, adapter guidance, steps, negative prompts and sampling are those that all parents name;
    every author and licence of theirs is named.
    """
    told = [parent.metadata for parent in parents]
    said = set(map(prediction_type_of, told))
    beside = [pair for metadata in reversed(told) for pair in embedding_files_of(metadata).items()]
    description = Description(
        title=title,
        family=family,
        base=_agreed((metadata.get("ss_sd_model_name", "") for metadata in told), ""),
        base_fingerprint=_agreed((metadata.get("sfumato.base_fingerprint", "") for metadata in told), ""),
        prediction_type="v_prediction" if "v_prediction" in said else "epsilon" if "epsilon" in said else "",
        trigger=_words(parents),
        config=config,
        adapter_guidance=_agreed(map(adapter_guidance_of, told), 0.0),
        over_steps=_agreed(map(over_steps_of, told), None),
        negatives=_agreed(map(negatives_of, told), ()),
        sampling=_agreed(map(sampling_of, told), None),
        clip_skip=_agreed(map(clip_skip_of, told), None),
        word_files={word: file for word, file in reversed(beside) if file},
        parents=[_parent(parent) for parent in parents],
        author=_all(parents, "modelspec.author"),
        license=_all(parents, "modelspec.license"),
        extra=extra or {},
    )
    return describe(description)


def _agreed(values: Iterable[T], otherwise: T) -> T:
    """The value that all are."""
    different = set(values)
    return different.pop() if len(different) == 1 else otherwise


def _words(parents: Sequence[Parent]) -> list[str]:
    """The parents' trigger words, each once."""
    return list(dict.fromkeys(word for parent in parents for word in trigger_words(parent.metadata)))


def _all(parents: Sequence[Parent], key: str) -> str:
    """What the parents say under the key, each once."""
    said = (parent.metadata.get(key, "").strip() for parent in parents)
    return ", ".join(dict.fromkeys(text for text in said if text))


def baked_metadata(
    parents: Sequence[Parent],
    *,
    title: str,
    base: str,
    family: str,
    predicts: str,
    told: Mapping[str, str],
    config: Mapping[str, Any],
) -> dict[str, str]:
    """The metadata that a checkpoint gets in place of or beside its own when `parents` are baked into it.

    base, family, predicts, told: its name, family, prediction type and metadata. Trigger words, authors and licences
    are its own and the parents'.
    """
    labels = LABELS[family]
    v = predicts == "v_prediction"
    architecture = (v and labels.v_architecture) or labels.architecture
    all_of_it = [Parent(base, "", told, family), *parents]
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": told.get("modelspec.architecture", architecture),  # which may say inpainting, too
        "modelspec.title": title,
        "modelspec.merged_from": ", ".join([base, *(parent.name for parent in parents)]),
        "modelspec.trigger_phrase": ", ".join(_words(all_of_it)),
        "modelspec.author": _all(all_of_it, "modelspec.author"),
        "modelspec.license": _all(all_of_it, "modelspec.license"),
        "sfumato.version": __version__,
        "sfumato.parents": json.dumps([_parent(parent) for parent in parents], ensure_ascii=False),
        "sfumato.config": json.dumps(config, ensure_ascii=False),
    }
    return {key: value for key, value in found.items() if value}


def _parent(parent: Parent) -> dict[str, Any]:
    found: dict[str, Any] = {"name": parent.name, "hash": parent.hash}
    if isinstance(parent.weight, Blocks):
        found["weight"] = str(parent.weight)
    elif parent.weight is not None:
        found["weight"] = list(parent.weight) if isinstance(parent.weight, tuple) else parent.weight
    return found


def common_family(parents: Sequence[Parent], default: str | None = None, *, said: str | None = None) -> str:
    """The family of all parents that tell one; where none does, the one that is said, else the default.

    Raises AdapterError for parents of different families, or of another than is said, and where none is known.
    """
    told = {parent.family: parent.name for parent in parents if parent.family is not None}
    if len(told) > 1:
        (first, a), (second, b) = list(told.items())[:2]
        raise AdapterError(
            f"{a} is for {LABELS[str(first)].title}, {b} for {LABELS[str(second)].title}; "
            "only adapters of one family can be merged."
        )
    for family, name in told.items():
        if said not in (None, family):
            raise AdapterError(
                f"{name}: is for {LABELS[str(family)].title}, --family says {LABELS[str(said)].title}. "
                "Leave --family out."
            )
        return str(family)
    known = default if said is None else said
    if known is None:
        raise AdapterError(
            f"{parents[0].name}: neither its shapes nor its metadata tell its family. Say --family {'|'.join(LABELS)}."
        )
    return known


def read_source(
    adapter: Adapter, *, partial: bool = False, words: bool = False, models: bool = False, modules: bool = False
) -> tuple[MergeSource, Parent]:
    """What an adapter changes, and what a file made of it will say of it.

    words: whether the caller hands on the textual inversions bundled with it, or loses nothing without them. models:
    whether a whole model is an adapter, too. modules: whether one that changes no weight is.
    Raises AdapterError, or FileError; also for textual inversions that would be lost, unless `partial` accepts that.
    """
    file = (read_adapter_or_model if models else read_adapter)(adapter.path, partial=partial)
    if file.embeddings and not partial and not words:
        tokens = ", ".join(map(repr, file.embeddings))
        raise AdapterError(
            f"{file.path.name}: has textual inversions bundled with it ({tokens}), which would be lost. "
            "Accept that with partial=True (--partial)."
        )
    if not modules:
        refuse_modules(file.path.name, file.changes)
    source = MergeSource(adapter.label, file.changes, adapter.weight, file.embeddings, file.skipped)
    name, digest = public_name(adapter.path), adapter_hash(Path(adapter.path))
    return source, Parent(name, digest, file.metadata, file.family, adapter.weight)


def read_sources(
    adapters: Sequence[Adapter], *, partial: bool = False, words: bool = False
) -> tuple[list[MergeSource], list[Parent]]:
    """The same of several adapters, and of whole models."""
    found = [read_source(adapter, partial=partial, words=words, models=True) for adapter in adapters]
    return [source for source, _ in found], [parent for _, parent in found]


def optional_stored_base(base: str | None) -> StoredBase | None:
    """The parameters of the base, as `stored_base` has them; None where none is named."""
    if base is None:
        return None
    from sfumato.merging.model_weights import stored_base  # which imports diffusers, as adapters alone do not

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
