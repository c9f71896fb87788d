"""AUTOMATIC1111's web UI: its Lora extension, on layers under the names that the tool gives them."""

import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.clients.client import Client, changed, stand_in, zeroed
from sfumato.files.module_names import unet_name


def a1111(checkout: Path) -> Client:
    """extensions-builtin/Lora/networks.py: load_network and network_apply_weights, on modules by the tool's names."""
    modules = stand_in("modules")
    modules.__path__ = []
    shared = stand_in(
        "modules.shared",
        opts=SimpleNamespace(lora_functional=False),
        cmd_opts=SimpleNamespace(lora_dir=tempfile.gettempdir(), lyco_dir_backcompat=""),
        walk_files=lambda *_, **__: [],
    )
    cpu = torch.device("cpu")
    modules.shared = shared
    modules.devices = stand_in("modules.devices", cpu=cpu, device=cpu, dtype=torch.float32)
    modules.sd_models = stand_in("modules.sd_models", read_state_dict=load_file)
    for name in ("textual_inversion", "models", "models.sd3"):
        stand_in(f"modules.{name}").__path__ = []
    modules.models = sys.modules["modules.models"]
    modules.models.sd3 = sys.modules["modules.models.sd3"]
    modules.models.sd3.mmdit = stand_in("modules.models.sd3.mmdit", QkvLinear=type("QkvLinear", (nn.Module,), {}))
    modules.textual_inversion = sys.modules["modules.textual_inversion"]
    modules.textual_inversion.textual_inversion = stand_in("modules.textual_inversion.textual_inversion")
    stand_in("gradio")
    stand_in("lora_logger", logger=logging.getLogger("a1111"))
    sys.path.insert(0, str(checkout / "extensions-builtin/Lora"))
    import networks

    networks.extra_network_lora = SimpleNamespace(errors={})

    def client(family: str, parts: Mapping[str, nn.Module], file: Path) -> dict[str, Tensor]:
        models = zeroed(parts)
        config: Any = parts["unet"].config
        unet = _tree(
            {
                unet_name(f"{path}.weight", config).removesuffix(".weight"): layer
                for path, layer in _with_weights(models["unet"])
            }
        )
        encoders = [
            _open_clip(models[part]) if part == "text_encoder_2" or family == "sd2" else _clip(models[part])
            for part in ("text_encoder", "text_encoder_2")
            if part in models
        ]
        holder = nn.Module()
        holder.diffusion_model = unet
        wrapped = [SimpleNamespace(wrapped=encoder) for encoder in encoders]
        shared.sd_model = SimpleNamespace(
            is_sdxl=family == "sdxl",
            model=holder,
            cond_stage_model=wrapped[0],
            conditioner=SimpleNamespace(embedders=wrapped),
        )
        network = networks.load_network("a", SimpleNamespace(filename=str(file)))
        network.dyn_dim = None
        networks.loaded_networks[:] = [network]
        networks.extra_network_lora.errors.clear()
        for layer in [layer for model in (unet, *encoders) for layer in model.modules()]:
            if type(layer) in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention):
                networks.network_apply_weights(layer)
        assert not networks.extra_network_lora.errors
        for encoder in encoders:
            _unpack(encoder)
        return changed(family, models)

    return client


def _with_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers with weights of their own, by their paths."""
    return ((path, layer) for path, layer in model.named_modules() if getattr(layer, "weight", None) is not None)


def _tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A module that holds the layers under these paths."""
    root = nn.Module()
    for path, layer in layers.items():
        *above, last = path.split(".")
        place = root
        for name in above:
            if name not in place._modules:
                place.add_module(name, nn.Module())
            place = place._modules[name]  # type: ignore[assignment]
        place.add_module(last, layer)
    return root


def _clip(encoder: nn.Module) -> nn.Module:
    """FrozenCLIPEmbedder: transformer.text_model...."""
    return _tree({f"transformer.text_model.{p.removeprefix('text_model.')}": m for p, m in _with_weights(encoder)})


def _open_clip(encoder: nn.Module) -> nn.Module:
    """FrozenOpenCLIPEmbedder: model.transformer.resblocks.N, whose attention has q, k and v in one matrix."""
    sources: list[tuple[nn.Module, nn.Module]] = []
    layers: dict[str, nn.Module] = {}
    for path, layer in encoder.named_modules():
        path = path.removeprefix("text_model.")
        block = path.replace("encoder.layers.", "model.transformer.resblocks.")
        if path.endswith("self_attn"):
            attention = nn.MultiheadAttention(layer.embed_dim, 1)
            nn.init.zeros_(attention.in_proj_weight)
            nn.init.zeros_(attention.out_proj.weight)
            layers[block.replace("self_attn", "attn")] = attention
            sources.append((attention, layer))
        names = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
        for ours, theirs in names.items():
            if path.endswith(ours) and path.startswith("encoder.layers."):
                layers[block.replace(ours, theirs)] = layer
    root = _tree(layers)
    root.sources = sources  # type: ignore[assignment]
    return root


def _unpack(encoder: nn.Module) -> None:
    """What was added to open_clip's attention, put where transformers has it."""
    for attention, layer in getattr(encoder, "sources", ()):
        for name, weight in zip("qkv", attention.in_proj_weight.chunk(3), strict=True):
            getattr(layer, f"{name}_proj").weight.data.copy_(weight)
        layer.out_proj.weight.data.copy_(attention.out_proj.weight)
