"""A base's parts in main memory, of which each is on the GPU only while it computes.

Memory that is free again: kept by this process for the next tensor, or given back to the system.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from sfumato.utils import processes


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


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: tensors come and go with each step, and fresh pages cost time.

    Arrays over 32 MB, the most that glibc allows, still go back to the system at once. Without glibc nothing happens.
    """
    mallopt = processes.libc_function("mallopt")
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


def release_freed_memory() -> None:
    """Return to the system the freed memory that `keep_freed_memory` and the GPU's allocator keep: for when a part of a
    model is released."""
    processes.trim_heap()
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def peak_process_memory() -> int | None:
    """The most bytes of main memory that this process has held at once; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_dropped_models() -> None:
    """Return to the system the memory of models that nobody uses any more. Their parts refer to each other, so that
    Python frees them only when it looks for such."""
    gc.collect()
    release_freed_memory()
