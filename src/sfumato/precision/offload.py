"""A base's parts in main memory, of which each is on the GPU only while it computes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn


class Offload:
    """Parts that take turns on a device: what computes moves there, and stays until another one of them does.

    As diffusers' `enable_model_cpu_offload`, whose pipelines see these parts for offloaded ones, but in whatever order
    the parts are called.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: list[nn.Module] = []
        self._there: nn.Module | None = None

    def add(self, part: nn.Module) -> None:
        """Move the part to main memory, to take its turns from now on; again, after its weights were read anew."""
        if all(part is not other for other in self._parts):
            self._parts.append(part)
            add_hook_to_module(part, _Turn(self))
        self._away(part)
        if self._there is part:
            self._there = None

    def turn(self, part: nn.Module) -> None:
        """Move the part to the device, after the one that is there has left it."""
        if self._there is part:
            return
        if self._there is not None:
            self._away(self._there)
        nn.Module.to(part, self.device)
        self._there = part

    @staticmethod
    def _away(part: nn.Module) -> None:
        # Not `part.to`: diffusers overrides it to warn of what is in half precision on a CPU.
        nn.Module.to(part, "cpu")


class _Turn(ModelHook):  # type: ignore[misc]
    """accelerate's hook around a part's calls; diffusers' VAE runs it before `encode` and `decode`, too."""

    def __init__(self, offload: Offload) -> None:
        self.offload = offload
        self.execution_device = offload.device  # where diffusers' pipelines compute

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.offload.turn(module)
        return args, kwargs
