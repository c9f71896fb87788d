"""What single-file checkpoints (CompVis' LDM, Stability's sgm, OpenCLIP) call each weight of a diffusers model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

RESNET_IN_UNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_VAE_PARTS = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
    "conv_shortcut.": "nin_shortcut.",
    "conv_norm_out.": "norm_out.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
}
_OPEN_CLIP_PARTS = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.": "token_embedding.",
    "final_layer_norm.": "ln_final.",
}


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """The LDM name, without `model.diffusion_model.`, of a weight of a UNet2DConditionModel with this config.

    LDM counts input and output blocks through all levels: a level has its resnets, then one downsampler.
    """
    layers = config["layers_per_block"]
    if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.", name):
        level, kind, layer = int(match[1]), match[2], int(match[3])
        first = 1 + level * (layers + 1)
        rest = name[match.end() :]
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + layer}." + _in_block(kind, rest)
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.", name):
        level, kind, layer = int(match[1]), match[2], int(match[3])
        first = level * (layers + 1)
        rest = name[match.end() :]
        if kind == "upsamplers":  # after the resnet, and after the attention where the level has one
            place = 2 if "CrossAttn" in config["up_block_types"][level] else 1
            return f"output_blocks.{first + layers}.{place}.{rest}"
        return f"output_blocks.{first + layer}." + _in_block(kind, rest)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.", name):
        kind, layer = match[1], int(match[2])
        inner = _in_block(kind, name[match.end() :]).split(".", 1)[1]
        return f"middle_block.{2 * layer + (kind == 'attentions')}.{inner}"
    return _replace(name, UNET_ENDS)


def _in_block(kind: str, rest: str) -> str:
    """A block is a list: its resnet is module 0, its attention module 1."""
    return "0." + _replace(rest, RESNET_IN_UNET) if kind == "resnets" else "1." + rest


def vae_name(name: str, config: Mapping[str, Any]) -> str:
    """The LDM name, without `first_stage_model.`, of a weight of an AutoencoderKL with this config.

    LDM numbers the decoder's levels by their resolution, diffusers by their order.
    """
    last = len(config["block_out_channels"]) - 1
    if match := re.match(r"encoder\.down_blocks\.(\d+)\.(resnets|downsamplers)\.(\d+)\.", name):
        name = f"encoder.down.{match[1]}." + _vae_block(match, name)
    elif match := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", name):
        name = f"decoder.up.{last - int(match[1])}." + _vae_block(match, name)
    for old, new in _VAE_PARTS.items():
        name = name.replace(old, new)
    return name


def _vae_block(match: re.Match[str], name: str) -> str:
    place = {"resnets": f"block.{match[3]}.", "downsamplers": "downsample.", "upsamplers": "upsample."}[match[2]]
    return place + name[match.end() :]


def clip_name(name: str) -> str:
    """The name of a CLIPTextModel's weight without its level `text_model.`, which transformers 5.6 dropped."""
    return name.removeprefix("text_model.")


def open_clip_name(name: str) -> tuple[str, slice | None, bool]:
    """The OpenCLIP name of a CLIP text model's weight, the rows of it to take, and whether it is stored transposed.

    The rows are thirds of the fused query, key and value: slice(0, 1), slice(1, 2) or slice(2, 3), in thirds.
    """
    name = clip_name(name)
    if name == "text_projection.weight":
        return "text_projection", None, True
    for old, new in _OPEN_CLIP_PARTS.items():
        name = name.replace(old, new)
    if match := re.search(r"self_attn\.([qkv])_proj\.(weight|bias)$", name):
        third = "qkv".index(match[1])
        return f"{name[: match.start()]}attn.in_proj_{match[2]}", slice(third, third + 1), False
    return name, None, False


def _replace(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
