"""The numbers of a weight file through numpy alone, and whether they are some. Imports no torch."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from sfumato.files.header import Header, TensorInfo

Array = NDArray[np.float32]

_NUMBERS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
"""numpy's dtype for each of a file's; kohya's svd_merge_lora.py writes alphas as whole numbers."""


def array_of(mapped: mmap.mmap, info: TensorInfo) -> Array | None:
    """A tensor's values in fp32, None for dtypes that numpy has no numbers for."""
    raw = mapped[info.start : info.end]
    if info.dtype == "BF16":  # the upper half of an fp32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(info.shape)
    kind = _NUMBERS.get(info.dtype)
    return None if kind is None else np.frombuffer(raw, kind).astype(np.float32).reshape(info.shape)


def nonfinite_in(header: Header) -> list[str]:
    """The tensors of the file with NaN or Inf."""
    with header.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return [name for name, info in header.tensors.items() if not _is_finite(mapped, info)]


def _is_finite(mapped: mmap.mmap, info: TensorInfo) -> bool:
    """Whether no value is NaN or Inf. Read piece by piece, so that a whole checkpoint costs no memory."""
    if info.dtype not in ("BF16", "F16", "F32", "F64"):
        return True
    width = {"F32": 4, "F64": 8}.get(info.dtype, 2)
    exponent = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}[info.dtype]
    for start in range(info.start, info.end, 1 << 24):
        bits = np.frombuffer(mapped[start : min(start + (1 << 24), info.end)], f"<u{width}")
        mask = bits.dtype.type(exponent)
        if bool(((bits & mask) == mask).any()):
            return False
    return True
