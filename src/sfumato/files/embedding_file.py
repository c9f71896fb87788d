"""Textual inversions: the vectors of new tokens, in every form that safetensors files have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.embedding_keys import SECOND_WIDTH, EmbeddingKey, embedding_key
from sfumato.files.family import LABELS, family_from_metadata
from sfumato.files.header import Header, read_header
from sfumato.files.keys import describe_foreign
from sfumato.files.read import read_tensors

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
    embeddings = vectors(known, read_tensors(header.path, header=header), header)
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


def vectors(keys: Mapping[str, EmbeddingKey], tensors: Mapping[str, Tensor], header: Header) -> Vectors:
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
