"""Textual inversions in the two forms that other tools read: one key, named as the word, or SDXL's two encoders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.header import checked_path
from sfumato.files.save import cast, write_hashed

SDXL_KEYS: Mapping[str, str] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def write_embedding(
    path: str | os.PathLike[str],
    token: str,
    vectors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write one word's vectors; whole or not at all, and equal bytes for equal content.

    vectors: "text_encoder" and, for SDXL, "text_encoder_2" -> (vectors, width). With one encoder the file has one key,
    the token, which diffusers' `load_textual_inversion`, A1111 and ComfyUI read alike, and InvokeAI does not recognise;
    with two it has clip_l and clip_g, as all but diffusers read them, and the token in its metadata.
    metadata: as `sfumato.files.describe` returns; what it says of a LoRA is put right here. dtype: fp32 is exact, and a
    vector takes 3 KiB.
    Raises AdapterError for vectors that are none, FileError for values the file cannot hold.
    """
    path = checked_path(path)
    widths = {part: list(rows.shape) for part, rows in vectors.items()}
    fitting = {len(rows) for rows in vectors.values()}
    if not vectors or len(fitting) != 1 or any(rows.ndim != 2 for rows in vectors.values()):
        raise AdapterError(f"{path.name}: {token} has {widths}; wanted (vectors, width), as many for each encoder.")
    if vectors.keys() - SDXL_KEYS.keys() or "text_encoder" not in vectors:
        raise AdapterError(f"{path.name}: vectors for {', '.join(vectors)}; wanted text_encoder, or both of SDXL's.")
    names = {"text_encoder": token} if len(vectors) == 1 else SDXL_KEYS
    tensors = {names[part]: cast(rows, dtype, token, path) for part, rows in vectors.items()}
    described = {
        **_of_an_embedding(metadata or {}),
        "sfumato.token": token,
        "sfumato.vectors": str(fitting.pop()),
    }
    return write_hashed(path, tensors, described)


def bundled_tensors(path: Path, words: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of new words within an adapter's file at `path`, in fp32.

    words: by token, as `write_embedding` takes them. A1111 and ComfyUI read them under these names: ComfyUI where the
    file is among its embeddings. Forge draws without them, and diffusers refuses an adapter's file with words in it.
    Raises AdapterError for a token with a dot in it, which these names cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    for token, parts in words.items():
        if "." in token:
            raise AdapterError(
                f"{path.name}: {token} has a dot, with which it cannot be bundled. Write it into its own file."
            )
        names = {"text_encoder": "string_to_param.*"} if parts.keys() == {"text_encoder"} else SDXL_KEYS
        for part, rows in parts.items():
            tensors[f"bundle_emb.{token}.{names[part]}"] = cast(rows, torch.float32, token, path)
    return tensors


def _of_an_embedding(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without what holds of a LoRA alone."""
    of_a_lora = ("ss_network_", "sfumato.adapter_guidance", "sfumato.over_steps", "sfumato.negatives")
    kept = {key: value for key, value in metadata.items() if not key.startswith(of_a_lora)}
    if "modelspec.architecture" in kept:
        kept["modelspec.architecture"] = kept["modelspec.architecture"].replace("/lora", "/textual-inversion")
    return kept
