"""Clients that map names onto keys of their model and patch weights by key: ComfyUI, and Forge after it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.clients.client import Client, named
from sfumato.files.module_names import unet_name


def ldm_config(config: Any) -> dict[str, Any]:
    """The U-Net's config as ComfyUI and Forge have it."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    depth = config.transformer_layers_per_block
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    downs = [d if "CrossAttn" in kind else 0 for d, kind in zip(depths, config.down_block_types, strict=True)]
    return {
        "num_res_blocks": [layers] * levels,
        "channel_mult": [width // config.block_out_channels[0] for width in config.block_out_channels],
        "transformer_depth": [d for d in downs for _ in range(layers)],
        "transformer_depth_output": [d for d in downs for _ in range(layers + 1)],
        "transformer_depth_middle": depths[-1],
    }


def comfy_like(load: Callable[..., dict[Any, Any]], keys_unet: Any, keys_clip: Any, apply: Any) -> Client:
    """A client that maps names onto keys of its model and patches weights by key."""

    def client(family: str, parts: Mapping[str, nn.Module], file: Path) -> dict[str, Tensor]:
        config: Any = parts["unet"].config
        weights: dict[str, tuple[str, Tensor]] = {}
        for name, value in parts["unet"].state_dict().items():
            path, _, last = name.rpartition(".")
            weights["diffusion_model." + unet_name(name, config)] = named(family, ("unet", path), last), value
        first = "clip_h" if family == "sd2" else "clip_l"
        for part, prefix in (("text_encoder", first), ("text_encoder_2", "clip_g")):
            for name, value in parts[part].state_dict().items() if part in parts else ():
                path, _, last = name.rpartition(".")
                key = f"{prefix}.transformer.text_model.{name.removeprefix('text_model.')}"
                weights[key] = named(family, (part, path), last), value
        unet_config = ldm_config(config)
        model = SimpleNamespace(
            state_dict=lambda: {key: value for key, (_, value) in weights.items()},
            model_config=SimpleNamespace(unet_config=unet_config),
            diffusion_model=SimpleNamespace(config=unet_config),
            config=SimpleNamespace(huggingface_repo=family),
        )
        names: dict[str, str] = {}
        keys_clip(model, names)
        keys_unet(model, names)
        patches = load(load_file(file), names)
        return {
            weights[key][0]: apply([(1.0, patch, 1.0, None, None)], torch.zeros_like(weights[key][1]), key)
            for key, patch in patches.items()
        }

    return client
