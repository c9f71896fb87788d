"""U-Nets and text encoders with the real structure of each family and tiny channels: every key name is a real one."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch

from sfumato.files.kinds import LoraModule
from sfumato.files.module_names import Target

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UNETS = {
    "sd1": dict(
        block_out_channels=(4, 8, 16, 16),
        down_block_types=(CROSS, CROSS, CROSS, PLAIN),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=2,
    ),
    "sd2": dict(
        block_out_channels=(4, 8, 16, 16),
        down_block_types=(CROSS, CROSS, CROSS, PLAIN),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=1024,
        attention_head_dim=2,
        use_linear_projection=True,
    ),
    "sdxl": dict(
        block_out_channels=(4, 8, 16),
        down_block_types=(PLAIN, CROSS, CROSS),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    ),
    "pocket": dict(
        block_out_channels=(4, 8, 12),
        down_block_types=(CROSS, CROSS, CROSS),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
    ),
}
TEXT_LAYERS = {"sd1": (12,), "sd2": (23,), "sdxl": (12, 32), "pocket": (3,)}


@dataclass(frozen=True)
class Tiny:
    """The parts of one family, and how many modules a LoRA of all its linear and convolution layers has."""

    family: str
    parts: dict[str, torch.nn.Module]

    def layers(self) -> dict[Target, torch.nn.Module]:
        return {
            (part, path): layer
            for part, module in self.parts.items()
            for path, layer in module.named_modules()
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and path != "text_projection"
        }

    def attention(self) -> dict[Target, torch.nn.Module]:
        return {t: layer for t, layer in self.layers().items() if t[0] == "unet" and ".attn" in t[1]}


@cache
def build(family: str) -> Tiny:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(layers: int) -> CLIPTextConfig:
        sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, projection_dim=8)
        return CLIPTextConfig(**sizes, num_hidden_layers=layers, vocab_size=10, max_position_embeddings=6)

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNETS[family], norm_num_groups=2)
    parts = {"unet": unet, "text_encoder": CLIPTextModel(config(TEXT_LAYERS[family][0]))}
    if family == "sdxl":
        parts["text_encoder_2"] = CLIPTextModelWithProjection(config(TEXT_LAYERS[family][1]))
    return Tiny(family, parts)


@pytest.fixture
def tiny():
    """tiny("sdxl") is a family's parts; they are shared, so a test copies what it changes."""
    return build


def random_lora(
    layers: dict[Target, torch.nn.Module], *, ranks=(2, 3), alphas=(2.0, 5.0, 1.5)
) -> dict[Target, LoraModule]:
    """An update of every layer, ranks and alphas taken in turn."""
    g = torch.Generator().manual_seed(1)
    modules = {}
    for i, (target, layer) in enumerate(layers.items()):
        rank = ranks[i % len(ranks)]
        out, inner = layer.weight.shape[0], layer.weight.shape[1:]
        down = torch.randn(rank, *inner, generator=g)
        up = torch.randn(out, rank, *(1 for _ in inner[1:]), generator=g)
        modules[target] = LoraModule(down, up, alphas[i % len(alphas)])
    return modules


@pytest.fixture
def lora():
    """lora(layers, ranks=, alphas=) is a random update of each layer."""
    return random_lora


@pytest.fixture
def two_modules() -> dict[Target, LoraModule]:
    """The smallest LoRA that is one: a key and a value of SD 1's first cross-attention."""
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    g = torch.Generator().manual_seed(2)
    return {
        ("unet", f"{path}.{name}"): LoraModule(
            torch.randn(2, 768, generator=g), torch.randn(4, 2, generator=g), alpha=2.0
        )
        for name in ("to_k", "to_v")
    }
