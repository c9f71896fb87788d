"""kohya's sd-scripts: a network made from a file and merged into the tool's own U-Nets."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.clients.client import Client, stand_in, with_level
from bench.clients.models import CHANNELS


def sd_scripts(checkout: Path) -> Client:
    """networks/lora.py: create_network_from_weights and merge_to, on the tool's own U-Nets."""
    stand_in("library.utils", setup_logging=lambda *_, **__: None)
    stand_in("library.device_utils", init_ipex=lambda: None)
    sys.path.insert(0, str(checkout))
    from library import original_unet, sdxl_original_unet
    from networks import lora

    original_unet.BLOCK_OUT_CHANNELS = tuple(CHANNELS["sd1"])
    original_unet.TIMESTEP_INPUT_DIM, original_unet.TIME_EMBED_DIM = CHANNELS["sd1"][0], 4 * CHANNELS["sd1"][0]
    sdxl_original_unet.MODEL_CHANNELS, sdxl_original_unet.TIME_EMBED_DIM = CHANNELS["sdxl"][0], 4 * CHANNELS["sdxl"][0]

    def client(family: str, parts: Mapping[str, nn.Module], file: Path) -> dict[str, Tensor]:
        config: Any = parts["unet"].config
        if family == "sdxl":
            unet = sdxl_original_unet.SdxlUNet2DConditionModel()
        else:
            heads = config.attention_head_dim
            unet = original_unet.UNet2DConditionModel(
                8, heads, config.cross_attention_dim, bool(config.use_linear_projection)
            )
        encoders = [with_level(parts[name]) for name in ("text_encoder", "text_encoder_2") if name in parts]
        network, tensors = lora.create_network_from_weights(
            1.0, str(file), None, encoders if family == "sdxl" else encoders[0], unet, for_inference=True
        )
        placed = network.text_encoder_loras + network.unet_loras
        for module in placed:
            nn.init.zeros_(module.org_module.weight)
        network.merge_to(encoders, unet, tensors, torch.float32, "cpu")
        return {module.lora_name: module.org_module.weight.detach().clone() for module in placed}

    return client
