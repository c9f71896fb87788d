"""Adapter files of any kind and format, read strictly into one form: {(part, path): Change}."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType

from sfumato.errors import AdapterError
from sfumato.files.changes import Change, ModuleTensors, read_change
from sfumato.files.embedding_file import Vectors, vectors
from sfumato.files.header import FLOATS, Header, path_of
from sfumato.files.keys import TRANSFORMER, Layout, describe_foreign, guess_family, read_layout, text_widths
from sfumato.files.kohya import Target
from sfumato.files.peft_folder import WeightFile, adapter_sources
from sfumato.files.read import Stamp, read_tensors, stamp
from sfumato.numerals import pluralize

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
    path = path_of(path)
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
        vectors(layout.embeddings, tensors, header),
        header.metadata,
        guess_family(layout, header),
        next(iter(text_widths(layout, header)), None),
        layout.spellings,
        (*layout.unknown, *left_out),
        {header.path: stamped},
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
            f"{file}: {_broken(layout)}, so nothing can be applied. Take the file from its source again."
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
            f"{file}: {_broken(layout)}. Take the file from its source again, or accept the rest with {_PARTIAL}."
        )


def _broken(layout: Layout) -> str:
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
