"""ComfyUI: its reader of LoRA files and its patches of weights."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.clients.client import Client, stand_in
from bench.clients.comfy_like import comfy_like


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
