"""A base's parts in main memory, of which each is on the GPU only while it computes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn


class Offload:
    """Parts that take turns on a device: what computes moves there, and stays until another one of them does.

    As diffusers' `enable_model_cpu_offload`, but in whatever order the parts are called. It is for one thread: another
    one's turn would move away what computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._there: nn.Module | None = None

    def add(self, part: nn.Module) -> None:
        """Let a part that is in main memory take its turns from now on; again, after its weights were read anew."""
        if not isinstance(getattr(part, "_hf_hook", None), _Turn):
            add_hook_to_module(part, _Turn(self))
        if self._there is part:
            self._there = None

    def turn(self, part: nn.Module) -> None:
        """Move the part to the device, after the one that is there has left it. What does not fit is off it again."""
        if self._there is part:
            return
        there, self._there = self._there, None
        if there is not None:
            _move_to_cpu(there)
        try:
            # Not `part.to`: diffusers overrides it to warn of what is in half precision on a CPU.
            nn.Module.to(part, self.device)
        except BaseException:
            _move_to_cpu(part)
            raise
        self._there = part


def _move_to_cpu(part: nn.Module) -> None:
    if all(weight.device.type != "meta" for weight in part.parameters()):  # else it has given its memory back
        nn.Module.to(part, "cpu")
        torch.cuda.empty_cache()


class _Turn(ModelHook):  # type: ignore[misc]
    """accelerate's hook around a part's calls; diffusers' VAE runs it before `encode` and `decode`, too."""

    def __init__(self, offload: Offload) -> None:
        self.offload = offload
        self.execution_device = offload.device  # where diffusers' pipelines compute

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.offload.turn(module)
        return args, kwargs
