"""Tensors out of a checked safetensors file, memory-mapped."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfumato.errors import FileError
from sfumato.files.header import Header, read_header


def read_tensors(
    path: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    header: Header | None = None,
    allow_nonfinite: bool = False,
) -> dict[str, Tensor]:
    """The named tensors of a safetensors file (all of them by default), on the CPU in the file's dtypes.

    They are views of the mapped file: reading costs no memory until a value is used, and the file must not be written
    over while they live (replace it by a rename, as `atomic_path` does).

    header: the file's header if the caller has read it already; the file must not have changed since.
    Raises FileError for a file that fails the header checks or a tensor with NaN or Inf, unless `allow_nonfinite`.
    """
    path = Path(path)
    header = header or read_header(path)
    wanted = list(header.tensors) if names is None else list(names)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if file.offset_keys() != list(header.tensors) or path.stat().st_size != header.size:
                raise FileError(f"{path.name}: the file changed while it was read. Try again.")
            tensors = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise FileError(f"{path.name}: the file could not be mapped ({reason}). Download it again.") from None
    if not allow_nonfinite:
        broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
        if broken:
            raise FileError(
                f"{path.name}: {len(broken)} of {len(tensors)} tensors hold NaN or Inf, first {broken[0]}. "
                "The training that wrote it diverged; use an earlier save."
            )
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite, without a mask of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # the 8-bit floats have no minimum of their own
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)  # NaN spreads into both
    return math.isfinite(low.item()) and math.isfinite(high.item())
