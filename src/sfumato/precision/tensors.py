"""The tensor behind a module's weight or bias, wherever offloading and quantisation have put it."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from sfumato.precision.quantized import Quantized


def stored(module: nn.Module, name: str) -> Tensor | None:
    """The module's tensor of this name, to be read and written; None if it has none.

    Where accelerate has switched on sequential offload, the module itself is empty (on the device `meta`) between its
    calls, and each call takes the weight from a map in main memory: then that one is meant.
    """
    if name == "weight" and isinstance(module, Quantized):
        return module.held[0]  # what it gives as its weight is nobody's to write into
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        return None
    if tensor.device.type != "meta":
        return tensor
    for hook in _hooks(getattr(module, "_hf_hook", None)):
        weights = getattr(hook, "weights_map", None)
        try:
            found = None if weights is None else weights[name]
        except KeyError:
            continue
        if isinstance(found, Tensor) and found.device.type != "meta":
            return found
    return tensor


def _hooks(hook: Any) -> tuple[Any, ...]:
    return tuple(getattr(hook, "hooks", (hook,)))


def group_offloading(part: nn.Module) -> set[str]:
    """How diffusers' `enable_group_offload` keeps the tensors between calls: "disk" where they are in files alone,
    "stream" where they come back from copies that it holds; empty otherwise."""
    found = set()
    for module in part.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for group in (getattr(hook, "group", None) for hook in hooks.values()):
            if getattr(group, "offload_to_disk_path", None) is not None:
                found.add("disk")
            elif getattr(group, "stream", None) is not None:
                found.add("stream")
    return found


def is_plain(tensor: Tensor | None) -> bool:
    """Whether the tensor holds its numbers in a float dtype of 16 bits or more, so that it can be summed into."""
    return _holds_numbers(tensor) and tensor.dtype.itemsize > 1


def is_narrowed(module: nn.Module, weight: Tensor | None) -> bool:
    """Whether torch's own layer keeps its weight in 8 bits and widens it to compute, as diffusers' layerwise casting
    has it. In a layer of another class the numbers may have a scale beside them."""
    return type(module) in (nn.Linear, nn.Conv2d) and _holds_numbers(weight) and weight.dtype.itemsize == 1


def _holds_numbers(tensor: Tensor | None) -> TypeGuard[Tensor]:
    # A quantised weight of torchao and the like says it were bf16; it is a class of its own.
    return tensor is not None and tensor.is_floating_point() and type(tensor) in (Tensor, nn.Parameter)


def shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the module's weight as a change sees it, also where quantisation packs it into another."""
    if isinstance(getattr(module, "in_features", None), int):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without the library's: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
