"""Models of each family's real structure and few channels, so that every key is a real one."""

import diffusers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sfumato.models.single_file import packaged_config

CHANNELS = {"sd1": [32, 64, 128, 128], "sd2": [32, 64, 128, 128], "sdxl": [32, 64, 128]}
HEADS: dict[str, object] = {"sd1": 8, "sd2": [1, 1, 2, 2], "sdxl": [1, 1, 2]}
TEXT_WIDTHS = {"sd1": (64,), "sd2": (64,), "sdxl": (64, 128)}


def build(family: str) -> dict[str, nn.Module]:
    """The parts of the family with few channels."""
    changes = {"block_out_channels": CHANNELS[family], "attention_head_dim": HEADS[family], "sample_size": 8}
    unet = diffusers.UNet2DConditionModel.from_config(packaged_config(family, "unet/config.json") | changes)
    parts: dict[str, nn.Module] = {"unet": unet}
    for number, width in enumerate(TEXT_WIDTHS[family]):
        folder = "text_encoder_2" if number else "text_encoder"
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 1, "projection_dim": 64}
        config = CLIPTextConfig(**(packaged_config(family, f"{folder}/config.json") | sizes | {"vocab_size": 8}))
        parts[folder] = (CLIPTextModelWithProjection if number else CLIPTextModel)(config)
    return parts
