"""Models from a config and tensors, with every weight accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sfumato.errors import BaseModelError

TEXT_CLASSES = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}


def unet_skeleton(config: Mapping[str, Any]) -> Any:
    """The U-Net of a config on the device `meta`: shapes without memory."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel.from_config(dict(config))


def vae_skeleton(config: Mapping[str, Any]) -> Any:
    """The VAE of a config on the device `meta`."""
    with torch.device("meta"):
        return diffusers.AutoencoderKL.from_config(dict(config))


def text_skeleton(class_name: str, config: Mapping[str, Any]) -> Any:
    """The text encoder of a config on the device `meta`; class_name is one of `TEXT_CLASSES`."""
    settings = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    with torch.device("meta"):
        return TEXT_CLASSES[class_name](CLIPTextConfig(**settings))


def fill(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> None:
    """Give a skeleton its weights, copied in `dtype`; frozen, in evaluation mode.

    tensors: one for each weight of the model, by its name. A 1x1 convolution may be stored as a matrix, and the other
    way round. Raises BaseModelError that counts what is missing, unknown or of another shape.
    """
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted]
    if missing or unknown:
        first = (missing or unknown)[0]
        raise BaseModelError(
            f"{where}: {len(missing)} of {len(wanted)} weights are missing, {len(unknown)} are unknown, first {first}. "
            "The file is incomplete or of another architecture; download it again or name another base."
        )
    values = {}
    for name, place in wanted.items():
        tensor = tensors[name]
        if tensor.squeeze().shape != place.squeeze().shape:
            raise BaseModelError(
                f"{where}: {name} has the shape {list(tensor.shape)}, its config wants {list(place.shape)}. "
                "Config and weights belong to different models; name another base."
            )
        # A copy, so that nothing depends on the mapped file any more.
        values[name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format).reshape(place.shape)
    model.load_state_dict(values, strict=True, assign=True)
    _restore_buffers(model, where)
    model.eval().requires_grad_(False)


def _restore_buffers(model: nn.Module, where: str) -> None:
    """Give the buffers that no file holds their values: CLIP's position ids are the only ones."""
    for path, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_meta:
                continue
            if name != "position_ids":
                raise BaseModelError(f"{where}: nothing is known about the buffer {path}.{name}. Report it.")
            setattr(module, name, torch.arange(buffer.shape[-1]).expand((1, -1)))
