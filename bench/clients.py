"""What other tools make of our files, by their own functions, from a checkout of each.

    python bench/clients.py a1111|comfyui|forge|invokeai|sd-scripts CHECKOUT [--families sd1 sd2 sdxl]

Models have each family's real structure and few channels, so that every key is a real one. The files: LoRA of every
layer and of attention alone, each other kind baked into a LoRA, each kind as differences of weights (not for
sd-scripts, which has none), and differences of norms and biases. Prints JSON: modules in the file, modules that the
client applied, the largest relative error of a module's delta, and what was left out. Exits with 1 where a module is
missing that is not named in EXPECTED, or an error is above 1e-5 (fp32) or 1e-3 (fp16).
Nothing of a client is imported by the package or kept; their modules for drawing and memory are stood in for.
"""

import argparse
import copy
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
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
from sfumato.files.changes import Change, LoraModule
from sfumato.files.changes.boft import OutputBoft
from sfumato.files.changes.difference import Difference
from sfumato.files.changes.dora import Dora
from sfumato.files.changes.glora import Glora
from sfumato.files.changes.ia3 import Ia3
from sfumato.files.changes.loha import Loha
from sfumato.files.changes.lokr import Factor, Lokr
from sfumato.files.changes.oft import OutputOft
from sfumato.files.kohya import Target, kohya_name
from sfumato.files.write import write_lora
from sfumato.files.write_difference import write_difference
from sfumato.merging.convert import as_difference, as_lora
from sfumato.merging.factors import Budget
from sfumato.merging.merge import Source
from sfumato.randomness import generator

CHANNELS = {"sd1": [32, 64, 128, 128], "sd2": [32, 64, 128, 128], "sdxl": [32, 64, 128]}
HEADS: dict[str, object] = {"sd1": 8, "sd2": [1, 1, 2, 2], "sdxl": [1, 1, 2]}
TEXT_WIDTHS = {"sd1": (64,), "sd2": (64,), "sdxl": (64, 128)}
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3}
RANK = 4
TENTH = 0.1
EXPECTED = {
    "a1111": ("unet conv_norm_out", "text_encoder*layer_norm*"),
    "comfyui": ("text_encoder*layer_norm*",),
    "forge": ("text_encoder*layer_norm*",),
    "sd-scripts": ("unet conv_in", "unet conv_out", "unet time_embedding*", "unet add_embedding*"),
}
"""Modules that a client has no place for, whoever wrote the file, as patterns of "part path"."""


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


def matrix(draws: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draws) * TENTH


def _lora(weight: Tensor, draws: torch.Generator) -> LoraModule:
    inner = weight.shape[1:]
    up = matrix(draws, weight.shape[0], RANK, *(1 for _ in inner[1:]))
    return LoraModule(matrix(draws, RANK, *inner), up, 2.0)


def _tucker(weight: Tensor, draws: torch.Generator) -> LoraModule:
    if weight.ndim == 2 or weight.shape[2:].numel() == 1:
        return _lora(weight, draws)
    out, inner, *kernel = weight.shape
    down, up = matrix(draws, RANK, inner, 1, 1), matrix(draws, out, RANK, 1, 1)
    return LoraModule(down, up, 2.0, matrix(draws, RANK, RANK, *kernel))


def _pair(weight: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    return matrix(draws, weight.shape[0], 2), matrix(draws, 2, weight[0].numel())


KINDS: dict[str, Callable[[Tensor, torch.Generator], Change]] = {
    "Tucker": _tucker,
    "DoRA": lambda w, g: Dora(_lora(w, g), torch.rand(w.shape[0], generator=g) + 1, on_input=False),
    "LoHa": lambda w, g: Loha(_pair(w, g), _pair(w, g), 0.5),
    "LoKr": lambda w, g: Lokr(
        Factor(matrix(g, 2, 2)), Factor(matrix(g, w.shape[0] // 2, w.shape[1] // 2, *w.shape[2:])), 1.0
    ),
    "IA3": lambda w, g: Ia3(matrix(g, w.shape[0]), on_input=False),
    "OFT": lambda w, g: OutputOft(matrix(g, 4, w.shape[0] // 4, w.shape[0] // 4), 0.0, kohya=False),
    "BOFT": lambda w, g: OutputBoft(matrix(g, 2, w.shape[0] // 4, 4, 4), None),
    "GLoRA": lambda w, g: Glora(matrix(g, w.shape[1], RANK), matrix(g, RANK, w.shape[1]), _lora(w, g)),
    "difference": lambda w, g: Difference(matrix(g, *w.shape), matrix(g, w.shape[0])),
}
"""An adapter of each kind for a weight."""


def random_changes(parts: Mapping[str, nn.Module], kind: str) -> dict[Target, Change]:
    """That kind on linear layers and convolutions of all parts."""
    found: dict[Target, Change] = {}
    for part, model in parts.items():
        for path, layer in model.named_modules():
            if path.endswith(("attn2.to_k", "ff.net.2", "conv1", "conv_shortcut", "mlp.fc1", "mlp.fc2")):
                change = KINDS[kind](layer.weight.detach(), generator(0, f"{part}/{path}"))
                found[part, path] = change if layer.bias is not None else without_bias(change)
    return found


def without_bias(change: Change) -> Change:
    """A LoRA cannot hold one, and some layers have none."""
    return Difference(change.value) if isinstance(change, Difference) else change


def norm_changes(parts: Mapping[str, nn.Module]) -> dict[Target, Change]:
    """Differences of the weight and bias of every norm."""
    return {
        (part, path): Difference(matrix(draws, *layer.weight.shape), matrix(draws, *layer.weight.shape))
        for part, model in parts.items()
        for path, layer in model.named_modules()
        if isinstance(layer, nn.LayerNorm | nn.GroupNorm) and (draws := generator(0, f"{part}/{path}"))
        if "pre_layrnorm" not in path
    }


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
"""(family, parts, file) -> the delta of each weight applied, by kohya's name, and of each bias, by that + ".bias"."""


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
            weights["diffusion_model." + unet_name(name, config)] = _named(family, ("unet", path), last), value
        first = "clip_h" if family == "sd2" else "clip_l"
        for part, prefix in (("text_encoder", first), ("text_encoder_2", "clip_g")):
            for name, value in parts[part].state_dict().items() if part in parts else ():
                path, _, last = name.rpartition(".")
                key = f"{prefix}.transformer.text_model.{name.removeprefix('text_model.')}"
                weights[key] = _named(family, (part, path), last), value
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


def _named(family: str, target: Target, last: str = "weight") -> str:
    """What `report` calls a weight or bias."""
    try:
        name = kohya_name(family, *target)
    except Exception:
        name = ".".join(target)
    return name if last == "weight" else f"{name}.{last}"


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


def zeroed(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of the parts with nothing but zeros, in which whatever a client adds is seen."""
    copies = {name: copy.deepcopy(part) for name, part in parts.items()}
    for part in copies.values():
        for tensor in part.parameters():
            nn.init.zeros_(tensor)
    return copies


def changed(family: str, parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What is no longer zero."""
    return {
        _named(family, (part, name.rpartition(".")[0]), name.rpartition(".")[2]): tensor.detach().clone()
        for part, model in parts.items()
        for name, tensor in model.named_parameters()
        if bool(tensor.any())
    }


def invokeai(checkout: Path) -> Client:
    """invokeai/backend/patches: what LoRALoader._load_model calls for SD and SDXL, and LayerPatcher."""
    backend = "invokeai.backend"
    for name in ("model_manager", "model_manager.load", "model_manager.load.model_cache"):
        package = stand_in(f"{backend}.{name}")
        package.__path__ = [str(checkout / backend.replace(".", "/") / name.replace(".", "/"))]
    stand_in(f"{backend}.model_manager.load.model_cache.model_cache")
    logger = logging.getLogger("invokeai")
    loggers = SimpleNamespace(get_logger=lambda _: logger)
    util = stand_in(f"{backend}.util", InvokeAILogger=loggers)
    util.__path__ = [str(checkout / "invokeai/backend/util")]
    util.logging = stand_in(f"{backend}.util.logging", warning=logger.warning, InvokeAILogger=loggers)
    stand_in(f"{backend}.util.devices", TorchDevice=SimpleNamespace(CPU_DEVICE=torch.device("cpu")))
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    sys.path.insert(0, str(checkout))
    from invokeai.backend.patches.layer_patcher import LayerPatcher
    from invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils import lora_model_from_sd_state_dict
    from invokeai.backend.patches.lora_conversions.sdxl_lora_conversion_utils import (
        convert_sdxl_keys_to_diffusers_format,
    )
    from invokeai.backend.util.original_weights_storage import OriginalWeightsStorage

    def client(family: str, parts: Mapping[str, nn.Module], file: Path) -> dict[str, Tensor]:
        tensors = load_file(file)
        if family == "sdxl":
            tensors = convert_sdxl_keys_to_diffusers_format(tensors)
        patch = lora_model_from_sd_state_dict(state_dict=tensors)
        models = zeroed(parts)
        first = "lora_te1_" if family == "sdxl" else "lora_te_"
        for part, prefix in (("unet", "lora_unet_"), ("text_encoder", first), ("text_encoder_2", "lora_te2_")):
            if part in models:
                LayerPatcher.apply_smart_model_patch(
                    model=models[part] if part == "unet" else _with_level(models[part]),
                    prefix=prefix,
                    patch=patch,
                    patch_weight=1.0,
                    original_weights=OriginalWeightsStorage(),
                    original_modules={},
                    dtype=torch.float32,
                    force_direct_patching=True,
                    force_sidecar_patching=False,
                )
        return changed(family, models)

    return client


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
                for path, layer in models["unet"].named_modules()
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


def _tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A module that holds the layers with weights of their own under these paths."""
    root = nn.Module()
    for path, layer in layers.items():
        if path and getattr(layer, "weight", None) is not None:
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
    return _tree(
        {f"transformer.text_model.{p.removeprefix('text_model.')}": m for p, m in encoder.named_modules() if p}
    )


def _open_clip(encoder: nn.Module) -> nn.Module:
    """FrozenOpenCLIPEmbedder: model.transformer.resblocks.N, whose attention has q, k and v in one matrix."""
    root = nn.Module()
    root.sources = []  # type: ignore[assignment]
    layers: dict[str, nn.Module] = {}
    for path, layer in encoder.named_modules():
        path = path.removeprefix("text_model.")
        block = path.replace("encoder.layers.", "model.transformer.resblocks.")
        if path.endswith("self_attn"):
            attention = nn.MultiheadAttention(layer.embed_dim, 1)
            nn.init.zeros_(attention.in_proj_weight)
            nn.init.zeros_(attention.out_proj.weight)
            layers[block.replace("self_attn", "attn")] = attention
            root.sources.append((attention, layer))  # type: ignore[union-attr,operator]
        names = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
        for ours, theirs in names.items():
            if path.endswith(ours) and path.startswith("encoder.layers."):
                layers[block.replace(ours, theirs)] = layer
    for path, layer in layers.items():
        place = root
        for name in path.split(".")[:-1]:
            if name not in place._modules:
                place.add_module(name, nn.Module())
            place = place._modules[name]  # type: ignore[assignment]
        place.add_module(path.split(".")[-1], layer)
    return root


def _unpack(encoder: nn.Module) -> None:
    """What was added to open_clip's attention, put where transformers has it."""
    for attention, layer in getattr(encoder, "sources", ()):
        for name, weight in zip("qkv", attention.in_proj_weight.chunk(3), strict=True):
            getattr(layer, f"{name}_proj").weight.data.copy_(weight)
        layer.out_proj.weight.data.copy_(attention.out_proj.weight)


def _with_level(encoder: nn.Module) -> nn.Module:
    """The encoder with the level `text_model` that transformers 5.6 took from CLIPTextModel."""
    if hasattr(encoder, "text_model"):
        return encoder
    wrapper = nn.Module()
    wrapper.text_model = encoder
    return wrapper


CLIENTS = {"a1111": a1111, "comfyui": comfyui, "forge": forge, "invokeai": invokeai, "sd-scripts": sd_scripts}
Wanted = dict[str, Tensor]
"""The deltas that a file says, as a client returns them."""


def lora_file(path: Path, family: str, modules: Mapping[Target, LoraModule], dtype: torch.dtype) -> Wanted:
    write_lora(path, modules, family=family, dtype=dtype)
    return {kohya_name(family, *target): module.delta() for target, module in modules.items()}


def difference_file(
    path: Path, family: str, parts: Mapping[str, nn.Module], changes: Mapping[Target, Change], dtype: torch.dtype
) -> Wanted:
    deltas = as_difference(Source("a", changes), lambda target: weight_of(parts, target))
    write_difference(path, deltas, family=family, dtype=dtype)
    found: Wanted = {}
    for target, (weight, bias) in deltas.items():
        found[kohya_name(family, *target)] = weight
        if bias is not None:
            found[kohya_name(family, *target) + ".bias"] = bias
    return found


def weight_of(parts: Mapping[str, nn.Module], target: Target) -> Tensor:
    return parts[target[0]].get_submodule(target[1]).weight.detach()


def files(
    name: str, family: str, parts: Mapping[str, nn.Module]
) -> Iterator[tuple[str, torch.dtype, Callable[[Path], Wanted], float]]:
    """(what, dtype, writer, the error of baking that is told) of each file that the client is given."""
    for only in ("attn", ""):
        modules = random_lora(parts, only)
        for dtype in LIMITS:
            yield f"LoRA of {only or 'all'}", dtype, lambda p, m=modules, d=dtype: lora_file(p, family, m, d), 0.0
    for kind in KINDS:
        changes = random_changes(parts, kind)
        made = as_lora(
            Source("a", {t: without_bias(change) for t, change in changes.items()}),
            Budget(RANK),
            lambda target: weight_of(parts, target),
        )
        yield (
            f"{kind} as LoRA",
            torch.float32,
            lambda p, m=made.modules: lora_file(p, family, m, torch.float32),
            made.error,
        )
        if name != "sd-scripts":
            yield (
                f"{kind} as differences",
                torch.float32,
                lambda p, c=changes: difference_file(p, family, parts, c, torch.float32),
                0.0,
            )
    if name != "sd-scripts":
        norms = norm_changes(parts)
        yield (
            "norms as differences",
            torch.float32,
            lambda p: difference_file(p, family, parts, norms, torch.float32),
            0.0,
        )


def report(name: str, client: Client, family: str) -> Iterator[dict[str, Any]]:
    """The figures of each file."""
    parts = build(family)
    known = {
        kohya_name(family, part, path)
        for part, model in parts.items()
        for path, layer in model.named_modules()
        if getattr(layer, "weight", None) is not None
        and any(fnmatch(f"{part} {path}", pattern) for pattern in EXPECTED.get(name, ()))
    }
    for what, dtype, write, error in files(name, family, parts):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            file = Path(folder) / "a.safetensors"
            wanted = write(file)
            found = client(family, parts, file)
        errors = {
            key: float((found[key].float().reshape(delta.shape) - delta).norm() / delta.norm())
            for key, delta in wanted.items()
            if key in found
        }
        missing = sorted(wanted.keys() - found.keys())
        largest = max(errors.values(), default=None)
        yield {
            "family": family,
            "file": what,
            "dtype": str(dtype).removeprefix("torch."),
            "modules": len(wanted),
            "applied": len(errors),
            "largest_relative_error": largest,
            "error_of_baking": round(error, 6),
            "left_out": missing,
            "extra": sorted(found.keys() - wanted.keys()),
            "holds": not ({key.removesuffix(".bias") for key in missing} - known)
            and not found.keys() - wanted.keys()
            and largest is not None
            and largest <= LIMITS[dtype],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--families", nargs="+", default=["sd1", "sd2", "sdxl"], choices=list(CHANNELS))
    options = parser.parse_args()
    stand_in("einops")  # which they import, and none of what is called here uses
    client = CLIENTS[options.client](options.checkout.resolve())
    rows = [row for family in options.families for row in report(options.client, client, family)]
    print(json.dumps({"client": options.client, "files": rows}, indent=2))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
