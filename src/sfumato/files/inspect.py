"""What an adapter file contains: family, kind, targets, ranks, alphas, norms, trigger words, hashes. Imports no
torch."""

from __future__ import annotations

import math
import mmap
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from sfumato.files.header import Header, checked_path
from sfumato.files.keys import (
    KIND_KEYS,
    SCALED,
    TRANSFORMER,
    Layout,
    ModuleKeys,
    base_kind,
    describe_foreign,
    embedding_key,
    guess_family,
    lacks_alpha,
    rank_of,
    read_layout,
    shapes_of,
)
from sfumato.files.metadata import (
    LABELS,
    Sampling,
    adapter_guidance_of,
    data_sha256,
    embedding_files_of,
    family_from_metadata,
    joint_hash,
    negatives_of,
    over_steps_of,
    sampling_of,
    short_hash,
    trigger_words,
)
from sfumato.files.module_names import Target, block_of, block_order, target_name
from sfumato.files.norms import Array, array_of, is_update, nonfinite_in, square_norm
from sfumato.files.peft import WeightFile, adapter_sources
from sfumato.utils.formatting import pluralize, to_single_line

_Settings = Callable[[int], float]
BAR_WIDTH = 24


@dataclass(frozen=True)
class Block:
    """The modules of one attention, resnet or text layer. norm: the Frobenius norm of all their updates together."""

    name: str
    modules: int
    norm: float


@dataclass(frozen=True)
class Inspection:
    """What `sfumato inspect` prints. Counts are by value: {"16": 128} is rank 16 in 128 modules.

    without_alpha: whether the file says none of any module, so that `alphas` are the ranks.
    says: the family in the metadata, if it differs from `family`, which is found by the shapes. nonfinite: tensors with
    NaN or Inf. stored: kinds whose norm is that of the stored tensors, because their update depends on the base model's
    weight, or because they change no weight. embeddings: number of vectors of each token that is bundled in the file.
    hash: the first 12 digits of the sha256 by which A1111 names the file; for a folder, the digits by which our images
    name it. hash_holds: whether the sha256 that the file states is right; None if it states none.
    """

    file: str
    bytes: int
    tensors: int
    dtypes: dict[str, int]
    kind: str
    family: str | None
    says: str | None
    spelling: list[str]
    modules: int
    targets: dict[str, int]
    ranks: dict[str, int]
    alphas: dict[str, int]
    norm: float | None
    stored: list[str]
    blocks: list[Block]
    trigger: list[str]
    adapter_guidance: float
    over_steps: tuple[float, float] | None
    negatives: list[str]
    sampling: Sampling | None
    base: str | None
    hash: str
    hash_holds: bool | None
    nonfinite: list[str]
    embeddings: dict[str, int]
    unknown: list[str]
    incomplete: list[str]
    metadata: dict[str, str]
    without_alpha: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON, with None for NaN and Inf."""
        found = asdict(self)
        for each in (found, *found["blocks"]):
            each["norm"] = each["norm"] if each["norm"] is None or math.isfinite(each["norm"]) else None
        return found


def inspect_file(path: str | os.PathLike[str]) -> Inspection:
    """Look into a weight file, or a folder of peft. What cannot be applied is reported, not refused.

    Raises FileError for what is not a safetensors file.
    """
    path = checked_path(path)
    sources = adapter_sources(path)
    parts = {source.part or "": _in_one_file(source) for source in sources}
    found = next(iter(parts.values())) if len(parts) == 1 else _merge_parts(path.name, parts)
    return replace(found, hash=joint_hash(data_sha256(s.header) for s in sources)) if path.is_dir() else found


def _merge_parts(name: str, parts: Mapping[str, Inspection]) -> Inspection:
    """What the files of one adapter hold, one a part of the pipeline, as if they were one file; without its hash."""
    some = list(parts.values())

    def named(field: str) -> list[str]:
        return [f"{part}/{name}" for part, found in parts.items() for name in getattr(found, field)]

    def union(field: str) -> list[str]:
        return list(dict.fromkeys(value for found in some for value in getattr(found, field)))

    def summed(field: str) -> dict[str, int]:
        return _sort_counts(sum((Counter(getattr(found, field)) for found in some), Counter()))

    metadata = {key: text for found in some for key, text in found.metadata.items()}
    family = next((found.family for found in some if found.family), None)
    norms = [found.norm for found in some if found.norm is not None]
    holds = [found.hash_holds for found in some if found.hash_holds is not None]
    return Inspection(
        file=name,
        bytes=sum(found.bytes for found in some),
        tensors=sum(found.tensors for found in some),
        dtypes=summed("dtypes"),
        kind=" + ".join(dict.fromkeys(found.kind for found in some)),
        family=family,
        spelling=sorted(union("spelling")),
        modules=sum(found.modules for found in some),
        targets=summed("targets"),
        ranks=summed("ranks"),
        alphas=summed("alphas"),
        norm=math.hypot(*norms) if norms else None,
        stored=union("stored"),
        blocks=sorted((block for found in some for block in found.blocks), key=lambda block: block_order(block.name)),
        trigger=union("trigger"),
        hash="",
        hash_holds=all(holds) if holds else None,
        nonfinite=named("nonfinite"),
        embeddings={token: count for found in some for token, count in found.embeddings.items()},
        unknown=named("unknown"),
        incomplete=union("incomplete"),
        without_alpha=all(found.without_alpha for found in some),
        **_from_metadata(metadata, family),
    )


def _from_metadata(metadata: Mapping[str, str], family: str | None) -> dict[str, Any]:
    """The fields that the metadata alone decides. family: by the shapes."""
    by_words = family_from_metadata(metadata)
    return {
        "says": by_words if by_words != family else None,
        "adapter_guidance": adapter_guidance_of(metadata),
        "over_steps": over_steps_of(metadata),
        "negatives": list(negatives_of(metadata)),
        "sampling": sampling_of(metadata),
        "base": metadata.get("ss_sd_model_name") or None,
        "metadata": dict(sorted(metadata.items())),
    }


def _in_one_file(source: WeightFile) -> Inspection:
    header = source.header
    layout = read_layout(header, source.part)
    foreign = describe_foreign(layout.unknown if layout.modules else header.tensors)
    if header.metadata.get("sfumato.token") in header.tensors:
        foreign = "a textual inversion"
    elif layout.modules and foreign != TRANSFORMER:  # whose files may change CLIP as well, which SD has, too
        foreign = None
    alphas, squares = _alphas_and_norms(layout, source)
    stated = header.metadata.get("sshs_model_hash")
    family = guess_family(layout, header)
    return Inspection(
        file=header.path.name,
        bytes=header.size,
        tensors=len(header.tensors),
        dtypes=_counts(info.dtype for info in header.tensors.values()),
        kind=foreign or " + ".join(layout.kinds) or "no adapter that is known",
        family=family,
        spelling=list(layout.spellings),
        modules=len(layout.modules),
        targets=_counts(target_name(target) for target in layout.modules),
        ranks=_counts(rank_of(shapes_of(keys, header)) for keys in layout.modules.values()),
        alphas=_counts(None if alpha is None else f"{alpha:g}" for alpha in alphas.values()),
        norm=float(np.sqrt(sum(squares.values()))) if squares else None,
        stored=[kind for kind in layout.kinds if not is_update(kind)],
        blocks=_blocks(squares),
        trigger=trigger_words(header.metadata),
        hash=short_hash(header),
        hash_holds=None if stated is None else stated == data_sha256(header),
        nonfinite=nonfinite_in(header),
        embeddings=_tokens(layout, header),
        unknown=list(layout.unknown) if layout.modules else [],
        incomplete=[".".join(target) for target in layout.incomplete],
        without_alpha=lacks_alpha(layout, source.settings),
        **_from_metadata(header.metadata, family),
    )


def _alphas_and_norms(layout: Layout, source: WeightFile) -> tuple[dict[Target, float | None], dict[Target, float]]:
    """(alphas, squared norms) of the modules; of a module that cannot be measured there is no norm."""
    header = source.header
    alphas: dict[Target, float | None] = {}
    squares: dict[Target, float] = {}
    with header.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:

        def value(name: str) -> Array | None:
            return array_of(mapped, header.tensors[name])

        for target, keys in layout.modules.items():
            alphas[target] = _alpha(keys, header, value, partial(source.settings.alpha, target))
            arrays = {role: array for role, name in keys.names.items() if (array := value(name)) is not None}
            square = square_norm(keys.kind, arrays, alphas[target])
            if square is not None:
                squares[target] = square
    return alphas, squares


def _counts(values: Any) -> dict[str, int]:
    """How often each value occurs, the most frequent first; None is not counted."""
    return _sort_counts(Counter(str(value) for value in values if value is not None))


def _sort_counts(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _alpha(keys: ModuleKeys, header: Header, value: Callable[[str], Array | None], settings: _Settings) -> float | None:
    """The module's own alpha, else the one of peft's config, else its rank; None where neither is said."""
    if "alpha" in keys.names:
        alpha = value(keys.names["alpha"])
        return None if alpha is None or alpha.size != 1 else float(alpha.reshape(-1)[0])
    rank = rank_of(shapes_of(keys, header))
    return None if rank is None or base_kind(keys.kind) not in SCALED else settings(rank)


def _tokens(layout: Layout, header: Header) -> dict[str, int]:
    """The number of vectors of each token that the file brings along, or of a textual inversion's own."""
    keys = dict(layout.embeddings)
    token = header.metadata.get("sfumato.token")
    if not layout.modules and (token in header.tensors or describe_foreign(header.tensors) == "a textual inversion"):
        keys = {name: key for name in header.tensors if (key := embedding_key(name, bundled=False, token=token))}
    unnamed = token or header.path.stem
    return {
        key.token or unnamed: math.prod(header.tensors[name].shape[:-1])
        for name, key in keys.items()
        if key.part is not None
    }


def _blocks(squares: Mapping[Target, float]) -> list[Block]:
    sums: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for target, square in squares.items():
        name = block_of(target)
        sums[name] = sums.get(name, 0.0) + square
        counts[name] += 1
    return [Block(name, counts[name], float(np.sqrt(sums[name]))) for name in sorted(sums, key=block_order)]


def render(found: Inspection) -> str:
    """The inspection as lines of text, at most about 100 wide."""
    lines = []
    for name, value in _rows(found):
        wide = name in ("targets", "ranks", "alphas", "tokens")
        folded = textwrap.wrap(value, 88, break_long_words=False, break_on_hyphens=False) if wide else [value]
        lines += [f"{name:<11}{folded[0]}", *(" " * 11 + line for line in folded[1:])]
    return "\n".join([*lines, *_bars(found.blocks)])


def _rows(found: Inspection) -> list[tuple[str, str]]:
    """(what, its value) of each line."""

    def counts(values: Mapping[str, int]) -> str:
        return ", ".join(f"{to_single_line(value)} ({count})" for value, count in values.items()) or "-"

    family = LABELS[found.family].title if found.family else "unknown"
    if found.says:
        family += f", but its metadata says {LABELS[found.says].title}"
    holds = {True: ", holds", False: ", the bytes differ from the stated one", None: ""}[found.hash_holds]
    rows = [
        ("file", f"{to_single_line(found.file)}, {found.bytes / 1e6:.2f} MB"),
        ("tensors", f"{found.tensors:,}: {counts(found.dtypes)}"),
        ("kind", found.kind),
        ("family", family),
        ("base", to_single_line(found.base or "-")),
        ("trigger", ", ".join(map(to_single_line, found.trigger)) or "-"),
    ]
    if found.adapter_guidance:
        rows.append(("guidance", f"{found.adapter_guidance:g}, of the adapter"))
    if found.over_steps:
        rows.append(("steps", "{:g} to {:g} of the way from noise to image".format(*found.over_steps)))
    if found.negatives:
        rows.append(("negative", ", ".join(map(to_single_line, found.negatives))))
    if found.sampling:
        rows.append(("sampling", str(found.sampling)))
    for word, file in embedding_files_of(found.metadata).items():
        if word not in found.embeddings:
            rows.append(("word", to_single_line(f"{word}, in {file or 'a file of its own'}")))
    rows += [
        ("spelling", ", ".join(found.spelling) or "-"),
        ("modules", str(found.modules)),
        ("targets", counts(found.targets)),
        ("ranks", counts(found.ranks)),
        ("alphas", counts(found.alphas) + (", the ranks, as the file has no alpha" if found.without_alpha else "")),
        ("hash", found.hash + holds),
    ]
    if found.norm is not None:
        modules = [kind for kind in found.stored if kind in KIND_KEYS and KIND_KEYS[kind].module]
        why = "it changes no weight" if found.stored == modules else "the update depends on the base"
        stored = f" ({', '.join(found.stored)}: of what is stored, {why})" if found.stored else ""
        measured = sum(block.modules for block in found.blocks)
        some = f", of {measured} of {pluralize(found.modules, 'module')}" if measured < found.modules else ""
        rows.append(("norm", f"{found.norm:.4g}{some}{stored}"))
    elif found.modules:
        rows.append(("norm", "cannot be told: tensors of other shapes or dtypes than this kind has"))
    if found.embeddings:
        rows.append(
            (
                "tokens",
                ", ".join(f"{to_single_line(name)} ({pluralize(n, 'vector')})" for name, n in found.embeddings.items()),
            )
        )
    for name, keys in (("NaN or Inf", found.nonfinite), ("unknown", found.unknown), ("incomplete", found.incomplete)):
        if keys:
            rows.append((name, f"{len(keys)}, first {', '.join(map(to_single_line, keys[:3]))}"))
    return rows


def _bars(blocks: Sequence[Block]) -> list[str]:
    """A table of the blocks, each with a bar as long as its share of the largest norm."""
    peak = max((block.norm for block in blocks if np.isfinite(block.norm)), default=0.0)
    width = max((len(block.name) for block in blocks), default=0)
    lines = ["", f"{'block':<{width}}  modules      norm"] if blocks else []
    for block in blocks:
        filled = round(BAR_WIDTH * block.norm / peak) if peak > 0 and np.isfinite(block.norm) else 0
        lines.append(f"{block.name:<{width}}  {block.modules:>7}  {block.norm:>8.4g}  {'#' * filled}".rstrip())
    return lines
