"""How large an adapter's change of a module is, from its factors, through numpy alone. Imports no torch.

The numbers of a weight file through numpy alone, and whether they are some. Imports no torch.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from sfumato.files.header import Header, TensorInfo
from sfumato.files.keys import KIND_KEYS, base_kind

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


DENSE_LIMIT = 1 << 26
"""Values of an update that is formed, a few rows at a time, to be measured. SDXL's largest layer has 13 million."""
_ROWS = 16
_FACTORED = 64
"""A value of a formed update costs about as much as so many steps of the products of its factors."""


def is_update(kind: str) -> bool:
    """Whether `square_norm` is that of the update itself; the other kinds' update depends on the base's weight."""
    return kind in ("LoRA", "LoHa", "LoKr", "difference")


def square_norm(kind: str, values: Mapping[str, Array], alpha: float | None) -> float | None:
    """The squared Frobenius norm of a module's update, or for kinds that need the base of what the file stores.

    values: by role. alpha: the module's, None where it is not said. None for tensors that do not fit.
    A DoRA's is that of its inner update, OFT's and BOFT's that of the skew matrices, IA3's that of the gains, GLoRA's
    that of its LoRA half. A kind's that changes no weight is that of all its tensors.
    """
    row = KIND_KEYS.get(kind)
    if row is not None and row.module is not None:
        return sum(_square(value) for value in values.values())
    try:
        square = _SQUARES[base_kind(kind)](values, alpha)
    except (KeyError, ValueError, IndexError, ZeroDivisionError):  # a half pair, or shapes that do not fit
        return None
    return None if square is None else float(square)


def _lora(values: Mapping[str, Array], alpha: float | None, down: str = "down", up: str = "up") -> float | None:
    """||B A||^2 = sum((B'B) * (A A')), two products of the rank's size."""
    first, second = values[down], values[up]
    rank = first.shape[0]
    core = values.get("mid")
    a, b = _flat(first), _flat(second)
    if b.shape[1] != rank or (core is not None and core.shape[:2] != (rank, rank)):
        return None
    if core is not None:
        a = np.einsum("pqk,qi->pik", core.reshape(rank, rank, -1).astype(np.float64), a).reshape(rank, -1)
    scale = 1.0 if alpha is None else alpha / rank
    return float(scale**2 * max(np.sum((b.T @ b) * (a @ a.T)), 0.0))


def _loha(values: Mapping[str, Array], alpha: float | None) -> float | None:
    """Of the Hadamard product: as low-rank as the product of both ranks, or formed a few rows at a time."""
    halves = []
    for n in (1, 2):
        a, b = _flat(values[f"hada_w{n}_a"]), _flat(values[f"hada_w{n}_b"])
        core = values.get(f"hada_t{n}")
        if core is not None:  # (rank, out) and (rank, in)
            kernel = core.reshape(*core.shape[:2], -1).astype(np.float64)
            a, b = a.T, np.einsum("pqk,qi->pik", kernel, b).reshape(a.shape[0], -1)
        halves.append((a, b))
    (a, b), (c, d) = halves
    if (len(a), b.shape[1]) != (len(c), d.shape[1]) or (a.shape[1], c.shape[1]) != (len(b), len(d)):
        return None
    if len(a) * b.shape[1] > DENSE_LIMIT:
        return None
    scale = 1.0 if alpha is None else alpha / values["hada_w1_b"].shape[0]
    rank = len(b) * len(d)
    if rank**2 * (len(a) + b.shape[1]) < _FACTORED * len(a) * b.shape[1]:
        # (A B) * (C D) = (A . C) (B . D), whose rank counts the pairs of a column of A and one of C.
        up = (a[:, :, None] * c[:, None]).reshape(len(a), rank)
        down = (b[:, None] * d[None]).reshape(rank, b.shape[1])
        return scale**2 * float(max(np.sum((up.T @ up) * (down @ down.T)), 0.0))
    total = 0.0
    one, two = np.empty((2, _ROWS, b.shape[1]))  # fresh memory would cost as much as the products
    for start in range(0, len(a), _ROWS):
        rows = slice(start, start + _ROWS)
        count = len(a[rows])
        product = np.matmul(a[rows], b, out=one[:count])
        product *= np.matmul(c[rows], d, out=two[:count])
        total += float(np.vdot(product, product))
    return scale**2 * total


def _lokr(values: Mapping[str, Array], alpha: float | None) -> float | None:
    """||kron(A, B)|| = ||A|| ||B||; the scale is 1 where neither factor is a product."""
    total, rank = 1.0, None
    for n in (1, 2):
        if f"lokr_w{n}" in values:
            total *= _square(values[f"lokr_w{n}"])
            continue
        left, right = values[f"lokr_w{n}_a"], values[f"lokr_w{n}_b"]
        core = values.get("lokr_t2") if n == 2 else None
        factor = {"down": right, "up": left if core is None else left.T} | ({} if core is None else {"mid": core})
        square = _lora(factor, None)
        if square is None:
            return None
        total *= square
        rank = rank or right.shape[0]
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    return scale**2 * total


def _difference(values: Mapping[str, Array], alpha: float | None) -> float | None:
    if "set_weight" in values:
        return None
    return _square(values["diff"]) if "diff" in values else 0.0


def _oft(values: Mapping[str, Array], alpha: float | None) -> float | None:
    if "oft_r" in values:
        return 2 * _square(values["oft_r"])
    blocks = values["oft_blocks"] if "oft_blocks" in values else values["boft_r"]
    square = _square(blocks - np.swapaxes(blocks, -1, -2))
    return square if "oft_blocks" in values else square / 4  # peft halves them


def _ia3(values: Mapping[str, Array], alpha: float | None) -> float | None:
    return _square(values["ia3_weight"]) if "ia3_weight" in values else _square(values["ia3_l"] - 1)


def _glora(values: Mapping[str, Array], alpha: float | None) -> float | None:
    one, two = values["b1"].shape, values["b2"].shape
    old = one[0] == two[1] and (one[1] != two[0] or one[0] < one[1])  # of a square layer both ways join
    names = ("b1", "b2") if old else ("b2", "b1")
    return _lora({key: value for key, value in values.items() if key != "bm"}, alpha, *names)


_SQUARES = {
    "LoRA": _lora,
    "LoHa": _loha,
    "LoKr": _lokr,
    "OFT": _oft,
    "BOFT": _oft,
    "IA3": _ia3,
    "GLoRA": _glora,
    "difference": _difference,
}


def _flat(value: Array) -> NDArray[np.float64]:
    if value.ndim < 2:
        raise ValueError("a factor has two dimensions")
    return value.reshape(value.shape[0], prod(value.shape[1:])).astype(np.float64)


def _square(value: Array) -> float:
    return float(np.sum(np.square(value.astype(np.float64))))
