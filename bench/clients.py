"""What other tools make of our files, by their own functions, from a checkout of each.

    python bench/clients.py sd-scripts|comfyui|forge CHECKOUT [--families sd1 sd2 sdxl]

Models have each family's real structure and few channels, so that every key is a real one. Prints JSON: modules in the
file, modules that the client applied, the largest relative error of a module's delta, and what was left out. Exits with
1 where a module is missing that is not named in EXPECTED, or an error is above 1e-5 (fp32) or 1e-3 (fp16).
Nothing of a client is imported by the package or kept; their modules for drawing and memory are stood in for.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sfumato.bases.names import unet_name
from sfumato.bases.single_file import shipped
from sfumato.files.changes import LoraModule
from sfumato.files.kohya import Target, kohya_name
from sfumato.files.write import write_lora
from sfumato.randomness import generator

CHANNELS = {"sd1": [32, 64, 128, 128], "sd2": [32, 64, 128, 128], "sdxl": [32, 64, 128]}
HEADS: dict[str, object] = {"sd1": 8, "sd2": [1, 1, 2, 2], "sdxl": [1, 1, 2]}
TEXT_WIDTHS = {"sd1": (64,), "sd2": (64,), "sdxl": (64, 128)}
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3}
EXPECTED = {"sd-scripts": ("conv_in", "conv_out", "time_embedding", "add_embedding")}
"""Modules that a client has no place for, whoever wrote the file."""


def build(family: str) -> dict[str, nn.Module]:
    """The parts of the family with few channels."""
    changes = {"block_out_channels": CHANNELS[family], "attention_head_dim": HEADS[family], "sample_size": 8}
    unet = diffusers.UNet2DConditionModel.from_config(shipped(family, "unet/config.json") | changes)
    parts: dict[str, nn.Module] = {"unet": unet}
    for number, width in enumerate(TEXT_WIDTHS[family]):
        folder = "text_encoder_2" if number else "text_encoder"
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 1, "projection_dim": 64}
        config = CLIPTextConfig(**(shipped(family, f"{folder}/config.json") | sizes | {"vocab_size": 8}))
        parts[folder] = (CLIPTextModelWithProjection if number else CLIPTextModel)(config)
    return parts


def random_lora(parts: Mapping[str, nn.Module], only: str) -> dict[Target, LoraModule]:
    """A LoRA of mixed ranks and alphas on every layer whose name holds `only`."""
    modules = {}
    for part, model in parts.items():
        for path, layer in model.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d) or path == "text_projection" or only not in path:
                continue
            draws, inner = generator(0, f"{part}/{path}"), layer.weight.shape[1:]
            rank = 2 + len(modules) % 3
            down = torch.randn(rank, *inner, generator=draws) / inner.numel() ** 0.5
            up = torch.randn(layer.weight.shape[0], rank, *(1 for _ in inner[1:]), generator=draws) * 0.1
            modules[part, path] = LoraModule(down, up, (2.0, 5.0, 1.5)[len(modules) % 3])
    return modules


def stand_in(name: str, **content: Any) -> ModuleType:
    """A module of that name with this content, and a class of its own for anything else that is asked of it."""
    module = ModuleType(name)
    module.__dict__.update(content)

    def anything(attribute: str) -> type:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return type(attribute, (), {})

    module.__getattr__ = anything  # type: ignore[method-assign]
    sys.modules[name] = module
    return module


Client = Callable[[str, Mapping[str, nn.Module], Path], dict[str, Tensor]]
"""(family, parts, file) -> the delta of each module that was applied, by kohya's name."""


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
            if name.endswith(".weight"):
                target = ("unet", name.removesuffix(".weight"))
                weights["diffusion_model." + unet_name(name, config)] = _named(family, target), value
        first = "clip_h" if family == "sd2" else "clip_l"
        for part, prefix in (("text_encoder", first), ("text_encoder_2", "clip_g")):
            for name, value in parts[part].state_dict().items() if part in parts else ():
                key = f"{prefix}.transformer.text_model.{name.removeprefix('text_model.')}"
                if name.endswith("proj.weight") or ".mlp." in name:
                    weights[key] = _named(family, (part, name.rsplit(".", 1)[0])), value
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


def _named(family: str, target: Target) -> str:
    try:
        return kohya_name(family, *target)
    except Exception:
        return ".".join(target)


def comfyui(checkout: Path) -> Client:
    """comfy/lora.py: model_lora_keys_unet, model_lora_keys_clip, load_lora, calculate_weight."""
    stand_in(
        "comfy.model_management", cast_to_device=lambda tensor, device, dtype, copy=False: tensor.to(device, dtype)
    )
    stand_in("comfy.model_base")
    stand_in("comfy.cli_args", args=type("Unset", (), {"__getattr__": lambda *_: False})())
    stand_in("comfy.checkpoint_pickle")
    sys.path.insert(0, str(checkout))
    import comfy
    from comfy import lora, lora_convert

    comfy.model_management, comfy.model_base = sys.modules["comfy.model_management"], sys.modules["comfy.model_base"]

    def load(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[Any, Any]:
        return lora.load_lora(lora_convert.convert_lora(tensors), names)

    return comfy_like(load, lora.model_lora_keys_unet, lora.model_lora_keys_clip, lora.calculate_weight)


def forge(checkout: Path) -> Client:
    """backend/patcher/lora.py: the same and merge_lora_to_weight."""
    backend = stand_in("backend")
    backend.__path__ = [str(checkout / "backend")]
    cast = stand_in(
        "backend.memory_management",
        cast_to_device=lambda tensor, device, dtype, copy=False: tensor.to(device, dtype),
    )
    backend.memory_management, backend.utils = cast, stand_in("backend.utils")
    backend.operations = stand_in("backend.operations")
    sys.path.insert(0, str(checkout))
    from backend.patcher import lora

    def load(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[Any, Any]:
        patches, _ = lora.load_lora(tensors, names)
        return patches

    return comfy_like(load, lora.model_lora_keys_unet, lora.model_lora_keys_clip, lora.merge_lora_to_weight)


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
        encoders = [_with_level(parts[name]) for name in ("text_encoder", "text_encoder_2") if name in parts]
        network, tensors = lora.create_network_from_weights(
            1.0, str(file), None, encoders if family == "sdxl" else encoders[0], unet, for_inference=True
        )
        placed = network.text_encoder_loras + network.unet_loras
        for module in placed:
            nn.init.zeros_(module.org_module.weight)
        network.merge_to(encoders, unet, tensors, torch.float32, "cpu")
        return {module.lora_name: module.org_module.weight.detach().clone() for module in placed}

    return client


def _with_level(encoder: nn.Module) -> nn.Module:
    """The encoder with the level `text_model` that transformers 5.6 took from CLIPTextModel."""
    if hasattr(encoder, "text_model"):
        return encoder
    wrapper = nn.Module()
    wrapper.text_model = encoder
    return wrapper


CLIENTS = {"comfyui": comfyui, "forge": forge, "sd-scripts": sd_scripts}


def report(name: str, client: Client, family: str, only: str, dtype: torch.dtype) -> dict[str, Any]:
    """The figures of one file. only: a part of the names of the layers that it changes; "" for all of them."""
    parts = build(family)
    modules = random_lora(parts, only)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = write_lora(Path(folder) / "a.safetensors", modules, family=family, dtype=dtype)
        found = client(family, parts, file)
    wanted = {kohya_name(family, *target): module.delta() for target, module in modules.items()}
    errors = {
        key: float((found[key].float().reshape(delta.shape) - delta).norm() / delta.norm())
        for key, delta in wanted.items()
        if key in found
    }
    missing = sorted(wanted.keys() - found.keys())
    known = {kohya_name(family, *t) for t in modules if t[1].startswith(EXPECTED.get(name, ("-",)))}
    return {
        "family": family,
        "layers": only or "all",
        "dtype": str(dtype).removeprefix("torch."),
        "modules": len(wanted),
        "applied": len(errors),
        "largest_relative_error": max(errors.values(), default=None),
        "left_out": missing,
        "extra": sorted(found.keys() - wanted.keys()),
        "holds": not (set(missing) - known) and max(errors.values(), default=1.0) <= LIMITS[dtype],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--families", nargs="+", default=["sd1", "sd2", "sdxl"], choices=list(CHANNELS))
    options = parser.parse_args()
    client = CLIENTS[options.client](options.checkout.resolve())
    rows = [
        report(options.client, client, family, only, dtype)
        for family in options.families
        for only in ("attn", "")
        for dtype in LIMITS
    ]
    print(json.dumps({"client": options.client, "files": rows}, indent=2))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
