"""Forge: what it has of ComfyUI, in its own package `backend`."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.clients.client import Client, stand_in
from bench.clients.comfy_like import comfy_like


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
