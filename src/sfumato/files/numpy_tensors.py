"""The numbers of a weight file through numpy alone, and whether they are some. Imports no torch."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from sfumato.files.header import Header, TensorInfo

Array = NDArray[np.float32]

_NUMBERS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
"""numpy's dtype for each of a file's; kohya's svd_merge_lora.py writes alphas as whole numbers."""
_NOT_FINITE = {
    **{"F8_E4M3": (1, 0x7F), "F8_E5M2": (1, 0x7C), "BF16": (2, 0x7F80), "F16": (2, 0x7C00)},
    **{"F32": (4, 0x7F800000), "F64": (8, 0x7FF0000000000000)},
}
"""The bytes of a number, and the bits that are all set in NaN and Inf, and in no other."""


def _e4m3() -> Array:
    """What each byte is in the fp8 of Micikevicius et al. 2022: a sign, four bits of exponent, three of mantissa, no
    Inf."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    positive = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    positive[-1] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


_E4M3 = _e4m3()


def array_of(mapped: mmap.mmap, info: TensorInfo) -> Array | None:
    """A tensor's values in fp32, None for dtypes that numpy has no numbers for."""
    raw = mapped[info.start : info.end]
    if info.dtype == "BF16":  # the upper half of an fp32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(info.shape)
    if info.dtype == "F8_E5M2":  # the upper half of an fp16
        halves = (np.frombuffer(raw, "u1").astype(np.uint16) << 8).view(np.float16)
        return halves.astype(np.float32).reshape(info.shape)
    if info.dtype == "F8_E4M3":
        values: Array = _E4M3[np.frombuffer(raw, "u1")]
        return values.reshape(info.shape)
    kind = _NUMBERS.get(info.dtype)
    return None if kind is None else np.frombuffer(raw, kind).astype(np.float32).reshape(info.shape)


def nonfinite_in(header: Header) -> list[str]:
    """The tensors of the file with NaN or Inf."""
    with header.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return [name for name, info in header.tensors.items() if not _is_finite(mapped, info)]


def _is_finite(mapped: mmap.mmap, info: TensorInfo) -> bool:
    """Whether no value is NaN or Inf. Read piece by piece, so that a whole checkpoint costs no memory."""
    if info.dtype not in _NOT_FINITE:
        return True
    width, exponent = _NOT_FINITE[info.dtype]
    for start in range(info.start, info.end, 1 << 24):
        bits = np.frombuffer(mapped[start : min(start + (1 << 24), info.end)], f"<u{width}")
        mask = bits.dtype.type(exponent)
        if bool(((bits & mask) == mask).any()):
            return False
    return True
