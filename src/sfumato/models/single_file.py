"""A base from one .safetensors checkpoint of SD 1.x, SD 2.x or SDXL, without a network.

The family is told by the names of the weights, sizes by their shapes; the rest comes from the published configs that
travel with the package.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sfumato.errors import BaseModelError
from sfumato.files.header import Header
from sfumato.files.module_names import clip_name, open_clip_name, unet_name, vae_name
from sfumato.models.family import (
    CLIP,
    OPEN_CLIP,
    TEXT_PREFIXES,
    UNET,
    VAE,
    XL_CLIP,
    XL_OPEN_CLIP,
    Family,
    resolve_prediction_type,
)
from sfumato.models.weights import LazyModel, StoredWeight, text_skeleton, unet_skeleton, vae_skeleton

CONFIGS = Path(__file__).parent / "configs"
UNUSED_KEYS = ("position_ids", "logit_scale", "text_projection", "text_projection.weight")
"""Ends of names that CLIP checkpoints hold and no diffusers model asks for (text_projection only where one asks)."""
VAE_WEIGHTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""A VAE's own weights; some files also hold its discriminator (loss.) or a moving average."""
# The last timestep, pure noise, has to be the first that is drawn.
ZERO_TERMINAL_SNR: Mapping[str, Any] = MappingProxyType(
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
)
"""What a scheduler's config says of a base that ends in pure noise (Lin et al. 2023)."""
HEAD_DIM = 64
"""Width of an attention head wherever the number of heads grows with the width: SD 2's and SDXL's U-Net, every CLIP."""


def packaged_config(family: str, part: str) -> dict[str, Any]:
    """A config of the package, such as shipped("sd1", "unet/config.json")."""
    found: dict[str, Any] = json.loads((CONFIGS / family / part).read_text(encoding="utf-8"))
    return found


def scheduler_config(family: Family, header: Header, prediction_type: str | None) -> dict[str, Any]:
    """The family's scheduler, with the prediction type and zero terminal SNR that the file states, or the
    user.

    Files mark zero terminal SNR by a tensor `ztsnr`.
    """
    config = packaged_config(family.name, "scheduler/scheduler_config.json")
    config["prediction_type"] = resolve_prediction_type(header, family.name, prediction_type)
    if "ztsnr" in header.tensors:
        config.update(ZERO_TERMINAL_SNR)
    return config


def unet_config(header: Header, family: Family) -> dict[str, Any]:
    """The family's published U-Net config, with the sizes of this file."""
    shapes = _shapes(header, UNET)
    file = header.path.name
    if not {"input_blocks.0.0.weight", "out.2.weight"} <= shapes.keys():
        raise BaseModelError(f"{file}: the U-Net has no first or last layer. Download the file again.")
    downs = sorted(int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", name)))
    blocks = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d+)\.", name)))
    levels = len(downs) + 1
    layers = (blocks - levels) // levels  # of `blocks`, one is the first convolution and levels - 1 are downsamplers
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    try:
        channels = [shapes[f"input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts]
    except KeyError as error:
        raise BaseModelError(f"{file}: the U-Net has no {error.args[0]}. Download the file again.") from None
    attended = [f"input_blocks.{first}.1.norm.weight" in shapes for first in firsts]
    depth = [_count(shapes, f"input_blocks.{first}.1.transformer_blocks.") or 1 for first in firsts]
    config = packaged_config(family.name, "unet/config.json")
    widths = (shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    config |= {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "cross_attention_dim": next(widths, config["cross_attention_dim"]),
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attended)],
    }
    if isinstance(config["attention_head_dim"], list):  # heads a level; in SD 1 it is one number for all
        config["attention_head_dim"] = [max(1, width // HEAD_DIM) for width in channels]
    if "transformer_layers_per_block" in config:
        # A level without attention of its own has the published value, which nothing uses.
        published = config["transformer_layers_per_block"]
        config["transformer_layers_per_block"] = [
            depth[level] if attended[level] else published[min(level, len(published) - 1)] for level in range(levels)
        ]
    if "projection_class_embeddings_input_dim" in config and "label_emb.0.0.weight" in shapes:
        config["projection_class_embeddings_input_dim"] = shapes["label_emb.0.0.weight"][1]
    return config


def vae_config(header: Header, family: Family, prefix: str) -> dict[str, Any]:
    """The family's published VAE config, with the sizes of this file; the scaling factor is the family's."""
    shapes = _shapes(header, prefix)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes:
        raise BaseModelError(
            f"{header.path.name}: the VAE of a diffusers folder; its sizes are in config.json. Name the folder."
        )
    levels, layers = _count(shapes, "encoder.down."), _count(shapes, "encoder.down.0.block.")
    try:
        channels = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
        latent_channels = shapes["decoder.conv_in.weight"][1]
    except KeyError as error:
        raise BaseModelError(f"{header.path.name}: the VAE has no {error.args[0]}. Download the file again.") from None
    config = packaged_config(family.name, "vae/config.json")
    return config | {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": latent_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_config(header: Header, family: Family, index: int) -> dict[str, Any]:
    """The family's published config of text encoder `index`, with the sizes of this file."""
    prefix = TEXT_PREFIXES[family.name][index]
    shapes = {clip_name(name): shape for name, shape in _shapes(header, prefix).items()}
    config = packaged_config(family.name, f"{family.encoders[index].folder}/config.json")
    open_clip = prefix in (OPEN_CLIP, XL_OPEN_CLIP)
    embedding = "token_embedding.weight" if open_clip else "embeddings.token_embedding.weight"
    positions = "positional_embedding" if open_clip else "embeddings.position_embedding.weight"
    layer, first = ("transformer.resblocks.", "mlp.c_fc.weight") if open_clip else ("encoder.layers.", "mlp.fc1.weight")
    try:
        vocabulary, width = shapes[embedding]
        config["max_position_embeddings"] = shapes[positions][0]
        config["intermediate_size"] = shapes[f"{layer}0.{first}"][0]
    except (KeyError, ValueError):
        raise BaseModelError(
            f"{header.path.name}: the text encoder {prefix} is incomplete. Download the file again."
        ) from None
    layers = _count(shapes, layer)
    if family.name == "sd2":  # its last layer is never used; files hold it, or leave it out as diffusers' writer does
        published = config["num_hidden_layers"]
        layers = published if layers == published else layers - 1
    config |= {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers}
    config["num_attention_heads"] = max(1, width // HEAD_DIM)
    if "text_projection" in shapes and family.name == "sdxl":
        config["projection_dim"] = shapes["text_projection"][1]
    return config


def load_unet(header: Header, config: Mapping[str, Any], dtype: torch.dtype) -> LazyModel:
    """The checkpoint's U-Net, to be read in `dtype`. config: see `unet_config`."""
    model = unet_skeleton(config)
    stored = _rename(_strip_prefix(header, UNET), {name: unet_name(name, config) for name in model.state_dict()})
    return LazyModel(model, stored, dtype, f"{header.path.name}, U-Net")


def load_vae(header: Header, family: Family, dtype: torch.dtype) -> LazyModel:
    """The VAE of a checkpoint, or of a file that holds a VAE alone, to be read in `dtype`."""
    prefix = VAE if any(name.startswith(VAE) for name in header.tensors) else ""
    config = vae_config(header, family, prefix)
    model = vae_skeleton(config)
    source = {name: stored for name, stored in _strip_prefix(header, prefix).items() if name.startswith(VAE_WEIGHTS)}
    stored = _rename(source, {name: vae_name(name, config) for name in model.state_dict()})
    return LazyModel(model, stored, dtype, f"{header.path.name}, VAE")


def load_text_encoder(header: Header, family: Family, index: int, dtype: torch.dtype) -> LazyModel:
    """The checkpoint's text encoder `index`, to be read in `dtype`."""
    prefix = TEXT_PREFIXES[family.name][index]
    config = text_config(header, family, index)
    model = text_skeleton(family.encoders[index].class_name, config)
    source = {clip_name(name): stored for name, stored in _strip_prefix(header, prefix).items()}
    wanted = list(model.state_dict())
    where = f"{header.path.name}, {family.encoders[index].folder}"
    if prefix in (CLIP, XL_CLIP):
        names = {name: clip_name(name) for name in wanted}
        stored = _rename(_drop_unused(source, set(names.values()), config), names)
    else:
        names = {name: open_clip_name(name)[0] for name in wanted}
        stored = {}
        for name in wanted:
            old, third, transposed = open_clip_name(name)
            if old in source:
                stored[name] = dataclasses.replace(source[old], third=third, transposed=transposed)
        used = _drop_unused(source, set(names.values()), config)
        stored |= {old: each for old, each in used.items() if old not in names.values()}
    return LazyModel(model, stored, dtype, where)


def _drop_unused(
    source: Mapping[str, StoredWeight], wanted: set[str], config: Mapping[str, Any]
) -> dict[str, StoredWeight]:
    """The tensors of a text encoder without those that are known to have no use."""
    unused_layer = re.compile(rf"transformer\.resblocks\.{config['num_hidden_layers']}\.")
    return {
        name: stored
        for name, stored in source.items()
        if name in wanted or not (name.endswith(UNUSED_KEYS) or unused_layer.match(name))
    }


def _rename(source: Mapping[str, StoredWeight], names: Mapping[str, str]) -> dict[str, StoredWeight]:
    """{new: tensor} for names = {new: old}; a tensor no new name asks for keeps its own, to be found unknown."""
    renamed = {new: source[old] for new, old in names.items() if old in source}
    old_names = set(names.values())
    return renamed | {old: stored for old, stored in source.items() if old not in old_names}


def _strip_prefix(header: Header, prefix: str) -> dict[str, StoredWeight]:
    names = [name for name in header.tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): StoredWeight(header, name) for name in names}


def _shapes(header: Header, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): t.shape for name, t in header.tensors.items() if name.startswith(prefix)}


def _count(shapes: Mapping[str, Any], prefix: str) -> int:
    """How many numbers follow the prefix."""
    rest = (name.removeprefix(prefix) for name in shapes if name.startswith(prefix))
    return len({name.split(".", 1)[0] for name in rest})
