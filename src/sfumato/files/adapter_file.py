"""Adapter files of any kind and format, read strictly into one form: {(part, path): Change}.

LoRA files of other tools and our own, read strictly into one form: {(part, path): LoraModule}.

Textual inversions: the vectors of new tokens, in every form that safetensors files have.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.header import FLOATS, Header, checked_path, read_header
from sfumato.files.keys import (
    SECOND_WIDTH,
    TRANSFORMER,
    EmbeddingKey,
    Layout,
    describe_foreign,
    embedding_key,
    guess_family,
    lacks_alpha,
    read_layout,
    text_widths,
)
from sfumato.files.kinds import Change, ModuleTensors, read_change
from sfumato.files.kinds.base import LoraModule
from sfumato.files.metadata import LABELS, family_from_metadata
from sfumato.files.module_names import Target
from sfumato.files.peft import WeightFile, adapter_sources
from sfumato.files.read import Stamp, read_tensors, stamp
from sfumato.utils.formatting import pluralize

Vectors = Mapping[str, Mapping[str, Tensor]]
"""{token: {"text_encoder" | "text_encoder_2": (vectors, width)}}"""

VECTOR_LIMIT = 75
"""Largest number of vectors of a token: as many as fit into a prompt."""
WIDTH_LIMIT = 4096


@dataclass(frozen=True)
class EmbeddingFile:
    """A textual inversion as read from a file. embeddings: {token: {"text_encoder" | "text_encoder_2": (vectors,
    width)}}.

    family: "sd1", "sd2", "sdxl", "pocket", or None if neither shapes nor metadata say it.
    """

    path: Path
    embeddings: Vectors
    metadata: Mapping[str, str]
    family: str | None


def read_embedding(path: str | os.PathLike[str]) -> EmbeddingFile:
    """Read the textual inversion at `path`: a tensor under its token's name (diffusers), `emb_params` (sd-scripts,
    A1111), or `clip_l` and `clip_g` (SDXL). The last two forms do not name their token: it comes from our own metadata,
    else from the file's name, as in A1111.

    Raises FileError for a broken file, and AdapterError for one that is not a textual inversion.
    """
    header = read_header(path)
    token = header.metadata.get("sfumato.token")
    keys = {name: embedding_key(name, bundled=False, token=token) for name in header.tensors}
    known = {name: key for name, key in keys.items() if key is not None}
    unknown = [name for name in keys if name not in known]
    if unknown or not known:
        what = describe_foreign(header.tensors)
        if what is None or what == "a textual inversion":
            what = (
                f"not a textual inversion: {len(unknown)} of {len(keys):,} keys are not understood, first {unknown[0]}"
            )
        raise AdapterError(f"{header.path.name}: this is {what}. Name the .safetensors file of a textual inversion.")
    embeddings = vectors_by_token(known, read_tensors(header.path, header=header), header)
    return EmbeddingFile(header.path, embeddings, header.metadata, _family(embeddings, header))


def merge_embeddings(words: Mapping[str, Vectors]) -> Vectors:
    """The words of several adapters, by label. Raises AdapterError if two adapters have different vectors for one
    word."""
    found: dict[str, tuple[str, Mapping[str, Tensor]]] = {}
    for label, own in words.items():
        for token, parts in own.items():
            first, known = found.setdefault(token, (label, parts))
            if known.keys() != parts.keys() or not all(torch.equal(known[part], parts[part]) for part in parts):
                raise AdapterError(
                    f"{first} and {label} bring different vectors for {token!r}, and there is room for one. Leave one "
                    "of them out, or give it the weight 0."
                )
    return {token: parts for token, (_, parts) in found.items()}


def vectors_by_token(keys: Mapping[str, EmbeddingKey], tensors: Mapping[str, Tensor], header: Header) -> Vectors:
    """The tensors by token and part, each (vectors, width).

    Raises AdapterError for shapes that no token has, and if two tensors are for the same token and part.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, key in keys.items():
        if key.part is None:
            continue
        value = tensors[name]
        if value.ndim == 1:
            value = value[None]
        count, width = value.shape if value.ndim == 2 else (0, 0)
        if not value.is_floating_point() or not 1 <= count <= VECTOR_LIMIT or not 1 <= width <= WIDTH_LIMIT:
            raise AdapterError(
                f"{header.path.name}: {name} is {list(tensors[name].shape)} in {value.dtype}; wanted the vectors of a "
                f"token, at most {VECTOR_LIMIT} of at most {WIDTH_LIMIT:,} values. Take the file from its source again."
            )
        token = key.token or header.metadata.get("sfumato.token") or header.path.stem
        part = key.part or ("text_encoder_2" if width == SECOND_WIDTH else "text_encoder")
        if part in found.setdefault(token, {}):
            raise AdapterError(
                f"{header.path.name}: two tensors are vectors of {token} for {part}, the second {name}. "
                "Take the file from its source again."
            )
        found[token][part] = value
    found = {token: dict(sorted(parts.items())) for token, parts in found.items()}
    for parts in found.values():
        if len({value.shape[0] for value in parts.values()}) > 1:
            counts = " and ".join(str(value.shape[0]) for value in parts.values())
            raise AdapterError(f"{header.path.name}: a token has {counts} vectors; wanted as many for either encoder.")
    return MappingProxyType({token: MappingProxyType(parts) for token, parts in found.items()})


def _family(embeddings: Vectors, header: Header) -> str | None:
    if any("text_encoder_2" in parts for parts in embeddings.values()):
        return "sdxl"
    said = family_from_metadata(header.metadata)
    widths = {value.shape[1] for parts in embeddings.values() for value in parts.values()}
    by_width = [name for name, labels in LABELS.items() if widths == {labels.text_width}]
    if said == "sdxl" and by_width == ["sd1"]:  # the first encoder of SDXL is SD 1's
        return said
    return by_width[0] if by_width else said


_FLAGS = ("on_input", "oft_scaled")
_PARTIAL = "partial=True (--partial)"
_Stamp = tuple[tuple[int, int], Stamp]
"""(device and inode, `stamp`)."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from a file. changes: by (part, path), paths as in `named_modules()` of transformers >= 5.6.

    embeddings: textual inversions bundled in the file, {token: {"text_encoder" | "text_encoder_2": (vectors, width)}}.
    family: "sd1", "sd2", "sdxl", "pocket", or None if neither shapes nor metadata say it. text_width: the input width
    of the cross-attention's keys; None without such modules. skipped: keys left out because `partial` allowed it.
    without_alpha: whether the file says no alpha of any module, so that the rank was taken.
    stamps: they show whether the files that are memory-mapped, and not copied, have changed.
    """

    path: Path
    changes: Mapping[Target, Change]
    embeddings: Vectors
    metadata: Mapping[str, str]
    family: str | None
    text_width: int | None
    spellings: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    stamps: Mapping[Path, _Stamp] = field(default_factory=dict)
    without_alpha: bool = False

    def check_unwritten(self) -> None:
        """Raise AdapterError if a file was overwritten since: its changes would be different, or crash the process.

        A file that was deleted, or replaced by a rename as tools do when they save, stays readable for a process that
        has it mapped.
        """
        for path, (place, content) in self.stamps.items():
            with suppress(OSError):
                now, written = _stamp(path)
                if now == place and written != content:
                    raise AdapterError(
                        f"{path.name}: the file was written over while it is mixed in, so its weights cannot change "
                        "any more. Take it out or undo() the mix, and add it again."
                    )

    @property
    def kinds(self) -> dict[str, int]:
        """The number of modules of each kind, the most frequent first."""
        return dict(Counter(change.kind for change in self.changes.values()).most_common())


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return (status.st_dev, status.st_ino), stamp(status)


def read_adapter(path: str | os.PathLike[str], *, partial: bool = False) -> AdapterFile:
    """Read the adapter at `path`, a file of any tool or a folder of peft; every key is accounted for.

    partial: leave out keys that are not understood and incomplete modules, and list them in `skipped`; otherwise they
    are errors. Raises FileError for a broken file, and AdapterError for one that is not an adapter or is incomplete.
    """
    path = checked_path(path)
    files = [_read(source, partial) for source in adapter_sources(path)]
    changes = {target: change for file in files for target, change in file.changes.items()}
    if len(changes) < sum(len(file.changes) for file in files):
        raise AdapterError(
            f"{path.name}: its folders change the same modules, so that which is meant is not said; name one of them."
        )
    return AdapterFile(
        path,
        MappingProxyType(changes),
        MappingProxyType({token: value for file in files for token, value in file.embeddings.items()}),
        MappingProxyType({key: text for file in files for key, text in file.metadata.items()}),
        next((file.family for file in files if file.family), None),
        next((file.text_width for file in files if file.text_width), None),
        tuple(sorted({spelling for file in files for spelling in file.spellings})),
        tuple(key for file in files for key in file.skipped),
        MappingProxyType({path: stamped for file in files for path, stamped in file.stamps.items()}),
        all(file.without_alpha for file in files),
    )


def _read(source: WeightFile, partial: bool) -> AdapterFile:
    header = source.header
    stamped = _stamp(header.path)
    layout = read_layout(header, source.part)
    _check_layout(layout, header.path.name, len(header.tensors), partial)
    tensors = read_tensors(header.path, header=header)
    _check_dtypes(header, layout)
    changes: dict[Target, Change] = {}
    by_onetrainer = "ot_branch" in header.metadata
    for target, keys in layout.modules.items():
        if target in layout.incomplete:
            continue
        roles = {role: tensors[name] for role, name in keys.names.items()}
        changes[target] = read_change(
            ModuleTensors(header.path.name, target, keys.kind, keys.names, roles, source.settings, by_onetrainer)
        )
    left_out = [name for keys in layout.incomplete.values() for name in keys.names.values()]
    return AdapterFile(
        header.path,
        changes,
        vectors_by_token(layout.embeddings, tensors, header),
        header.metadata,
        guess_family(layout, header),
        next(iter(text_widths(layout, header)), None),
        layout.spellings,
        (*layout.unknown, *left_out),
        {header.path: stamped},
        lacks_alpha(layout, source.settings),
    )


def _check_dtypes(header: Header, layout: Layout) -> None:
    """Raise AdapterError for numbers of a module that are not floating point; a flag, and one alpha, may be whole."""
    used = [keys.names for target, keys in layout.modules.items() if target not in layout.incomplete]
    for role, name in (each for names in used for each in names.items()):
        info = header.tensors[name]
        one_alpha = role == "alpha" and prod(info.shape) == 1
        if info.dtype not in FLOATS and role not in _FLAGS and not one_alpha:
            raise AdapterError(
                f"{header.path.name}: {name} is {info.dtype}; wanted floating point. Quantised adapters are not read; "
                "take the file in half or single precision."
            )


def _check_layout(layout: Layout, file: str, total: int, partial: bool) -> None:
    """Raise AdapterError for a file that is no adapter, says a thing twice, or is not whole."""
    tensors = pluralize(total, "tensor")
    what = describe_foreign(layout.unknown) if layout.unknown else None
    if what == TRANSFORMER:  # such a file may change CLIP as well, which the base has, too
        raise AdapterError(f"{file}: this is {what}. Take one for SD 1.x, SD 2.x or SDXL.")
    if not layout.modules:
        if layout.embeddings or what == "a textual inversion":
            raise AdapterError(
                f"{file}: this is a textual inversion ({tensors}), not an adapter. It is a new word, which "
                "generate and grid take with --embedding, Python with sfumato.embedding.load(pipe, file)."
            )
        if what:
            raise AdapterError(f"{file}: this is {what} ({tensors}), not an adapter. Name an adapter's file.")
        raise AdapterError(
            f"{file}: 0 of {total:,} keys are an adapter's for SD or SDXL, first {_first(layout.unknown)}. "
            "Name an adapter's file."
        )
    if layout.repeated:
        raise AdapterError(
            f"{file}: {len(layout.repeated)} of {total:,} keys name a module that another spelling names too, first "
            f"{_first(layout.repeated)}. Which is meant is not said; take the file from its source again."
        )
    if len(layout.incomplete) == len(layout.modules):
        raise AdapterError(
            f"{file}: {_incomplete_modules(layout)}, so nothing can be applied. Take the file from its source again."
        )
    if partial:
        return
    if layout.unknown:
        raise AdapterError(
            f"{file}: {len(layout.unknown)} of {total:,} keys are not understood, first {_first(layout.unknown)}. "
            f"Accept the rest with {_PARTIAL}, or take another file."
        )
    if layout.incomplete:
        raise AdapterError(
            f"{file}: {_incomplete_modules(layout)}. Take the file from its source again, or accept the rest "
            f"with {_PARTIAL}."
        )


def _incomplete_modules(layout: Layout) -> str:
    """How many modules lack what, and the first of them by its key."""
    unusable = layout.incomplete.values()
    for half, other in (("up", "down"), ("down", "up")):
        halves = [keys for keys in unusable if other in keys.names and half not in keys.names]
        if halves:
            return (
                f"lora_{half} is missing for {len(halves)} of {len(layout.modules)} modules, first beside "
                f"{halves[0].names[other]}"
            )
    first = next(iter(unusable))
    return (
        f"{len(unusable)} of {len(layout.modules)} modules are not whole, first {next(iter(first.names.values()))}, of "
        f"whose {first.kind} {pluralize(len(first.names), 'tensor is', 'tensors are')} there"
    )


def _first(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3])


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
