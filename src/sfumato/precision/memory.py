"""Memory that is free again: kept by this process for the next tensor, or given back to the system."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch

from sfumato.utils import processes


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
