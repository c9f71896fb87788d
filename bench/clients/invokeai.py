"""InvokeAI: its conversions of LoRA files and its patcher, on diffusers' models."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.clients.client import Client, changed, stand_in, with_level, zeroed


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
                    model=models[part] if part == "unet" else with_level(models[part]),
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
