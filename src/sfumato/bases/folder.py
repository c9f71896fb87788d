"""The parts of a base from a folder in diffusers' format: safetensors only, every weight accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from sfumato.bases.config_file import read_config
from sfumato.bases.family import Encoder
from sfumato.bases.vocabulary import reading_its_padding
from sfumato.bases.weights import LazyModel, StoredWeight, text_skeleton, unet_skeleton, vae_skeleton
from sfumato.errors import BaseModelError, unusable_package
from sfumato.files.header import read_header

STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = (".fp16", ".bf16")
"""Of files, where there are none without; what diffusers calls fp16 and bf16."""
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
OLD_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers before 0.18 called the projections of the VAE's attention; SD 1.5's published VAE still does."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one model: without a variant, its shards, or else those of half precision."""
    for variant in ("", *VARIANTS):
        for stem in STEMS:
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
            for index in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
                if (folder / index).is_file():
                    return _shards(folder, index)
    where = f"{folder.parent.name}/{folder.name}"
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled:
        raise BaseModelError(
            f"{where}: only pickled weights ({pickled[0]}), which can run programs and are never opened. "
            "Get the base as .safetensors."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    there = f"; it has {others[0]}. Rename it, if it is whole." if others else ". Download it again."
    raise BaseModelError(f"{where}: no {STEMS[0]}.safetensors or {STEMS[1]}.safetensors in it{there}")


def _shards(folder: Path, index: str) -> list[Path]:
    listed = read_config(folder, index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise BaseModelError(f"{folder.name}/{index}: lists no files of this folder. Download it again.")
    return [folder / name for name in sorted(set(names))]


def _stored(files: list[Path]) -> dict[str, StoredWeight]:
    headers = [read_header(file) for file in files]
    return {name: StoredWeight(header, name) for header in headers for name in header.tensors}


def load_unet(folder: Path, dtype: torch.dtype) -> LazyModel:
    """The U-Net in `folder/unet`, to be read in `dtype`."""
    files = weight_files(folder / "unet")
    model = unet_skeleton(read_config(folder, "unet/config.json"))
    return LazyModel(model, _stored(files), dtype, f"{folder.name}/unet")


def load_vae(folder: Path, dtype: torch.dtype) -> LazyModel:
    """The VAE whose config.json is in `folder`, to be read in `dtype`."""
    config = read_config(folder, "config.json")
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise BaseModelError(f"{folder.name}: a {config['_class_name']}, wanted an AutoencoderKL. Name another VAE.")
    stored = {_current_vae_name(name): tensor for name, tensor in _stored(weight_files(folder)).items()}
    return LazyModel(vae_skeleton(config), stored, dtype, folder.name)


def _current_vae_name(name: str) -> str:
    if match := re.match(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)$", name):
        return f"{match[1]}{OLD_VAE_NAMES[match[2]]}.{match[3]}"
    return name


def load_text_encoder(folder: Path, encoder: Encoder, dtype: torch.dtype) -> LazyModel:
    """One text encoder of the folder, to be read in `dtype`."""
    files = weight_files(folder / encoder.folder)
    model = text_skeleton(encoder.class_name, read_config(folder, f"{encoder.folder}/config.json"))
    stored = _as_named_here(_stored(files), set(model.state_dict()))
    return LazyModel(model, stored, dtype, f"{folder.name}/{encoder.folder}")


def _as_named_here(stored: Mapping[str, StoredWeight], wanted: set[str]) -> dict[str, StoredWeight]:
    """The tensors under the names this transformers gives them: 5.6 dropped the level `text_model` of CLIPTextModel."""
    named = {}
    for name, tensor in stored.items():
        bare = name.removeprefix("text_model.")
        if bare == "embeddings.position_ids" or (bare.startswith("text_projection") and bare not in wanted):
            continue
        named[bare if bare in wanted else f"text_model.{bare}" if f"text_model.{bare}" in wanted else name] = tensor
    return named


def load_tokenizer(folder: Path, part: str, positions: int) -> Any:
    """The tokenizer in `folder/part`. positions: tokens its text encoder takes, both ends included."""
    if not any((folder / part / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise BaseModelError(f"{folder.name}/{part}: no vocabulary in it. Download the folder again.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder / part), local_files_only=True)
    except Exception as error:  # the libraries check each value in a way of its own, or not at all
        if unusable_package(error):
            raise
        reason = " ".join(str(error).split())[:100]
        raise BaseModelError(
            f"{folder.name}/{part}: the tokenizer cannot be read ({reason}). Download it again."
        ) from None
    tokenizer.model_max_length = positions  # one number, the text encoder's, decides
    return reading_its_padding(tokenizer)
