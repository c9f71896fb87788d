"""Tensors from a checked safetensors file, memory-mapped."""

from __future__ import annotations

import ctypes
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from sfumato.errors import FileError
from sfumato.files.header import Header, checked_path, read_header

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "U16": torch.uint16,
        "I16": torch.int16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "F32": torch.float32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F64": torch.float64,
    }
)
"""torch's dtype for each dtype that `sfumato.files.header` accepts."""


def read_tensors(
    path: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    header: Header | None = None,
    allow_nonfinite: bool = False,
) -> dict[str, Tensor]:
    """Read the named tensors of a safetensors file (by default all), on the CPU in the file's dtypes.

    They are views of the mapped file: reading takes no memory until a value is used. The file must not be overwritten
    while they are in use (replace it by a rename, as `atomic_path` does).

    header: the file's header if the caller has read it already; the file must not have changed since. Raises FileError
    for a file that fails the header checks, for a name that is not in it, and for a tensor with NaN or Inf unless
    `allow_nonfinite`.
    """
    path = checked_path(path)
    header = header or read_header(path)
    tensors = _mapped(path, header, header.tensors if names is None else names)
    if not allow_nonfinite and not _all_finite(tensors.values()):
        _refuse_nonfinite(path, [name for name, tensor in tensors.items() if not is_finite(tensor)], len(tensors))
    return tensors


Stamp = tuple[int, int]


def stamp(status: os.stat_result) -> Stamp:
    """(mtime in ns, bytes), to detect that a file has changed. Inode numbers are left out: mounts may change them."""
    return status.st_mtime_ns, status.st_size


def check_stamp(path: Path, found: Stamp, wanted: Stamp) -> None:
    """Raise FileError if the stamp of a file in use has changed."""
    if found != wanted:
        raise FileError(
            f"{path.name}: the file was replaced or written over while it was in use. Leave the files of a base as "
            "they are during a run, and start again."
        )


def read_copies(
    header: Header, names: Iterable[str], dtype: torch.dtype, *, wanted_stamp: Stamp | None = None
) -> dict[str, Tensor]:
    """Copy the named tensors into memory, floating-point ones in `dtype`; the file is not mapped.

    So no page of the file counts as the process's memory besides the copies, and at most one tensor at a time exists in
    two dtypes. Raises FileError as `read_tensors` does, and for a file whose stamp is not `wanted_stamp`, if that is
    given: two fine-tunes of one architecture may have the same header.
    """
    path, wanted = header.path, set(names)
    tensors: dict[str, Tensor] = {}
    broken: list[str] = []
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if wanted_stamp is not None:
                check_stamp(path, stamp(status), wanted_stamp)
            _check_unchanged(header, status.st_size, file.read(header.data_start))
            for name, info in header.tensors.items():  # in the order of their bytes
                if name not in wanted:
                    continue
                tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
                file.seek(info.start)
                if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                    raise OSError("it is shorter than it was")
                if not is_finite(tensor):
                    broken.append(name)
                tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"{path.name}: the file could not be read ({reason}). Download it again.") from None
    _refuse_nonfinite(path, broken, len(tensors))
    return tensors


def _refuse_nonfinite(path: Path, broken: list[str], count: int) -> None:
    if broken:
        raise FileError(
            f"{path.name}: {len(broken)} of {count} tensors hold NaN or Inf, first {broken[0]}. "
            "The training that wrote it diverged; use an earlier save."
        )


def _check_unchanged(header: Header, size: int, start: bytes | memoryview) -> None:
    """start: the file's bytes before its tensors, as they are now."""
    if size != header.size or zlib.crc32(start) != header.checksum:
        raise FileError(f"{header.path.name}: the file changed while it was read. Try again.")


def _mapped(path: Path, header: Header, names: Iterable[str]) -> dict[str, Tensor]:
    """Views of the file. Every offset was checked with the header, which must be the file's still."""
    try:
        memory = torch.UntypedStorage.from_file(str(path), False, header.size)
        memory.data_ptr()  # raises where Windows had no memory to map it, which torch does not look at
        size = path.stat().st_size
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        is_full = "1455" in reason or "invalid python storage" in reason
        advice = "Close other programs, or enlarge Windows' page file" if is_full else "Download it again"
        raise FileError(f"{path.name}: the file could not be mapped ({reason}). {advice}.") from None
    start = torch.empty(0, dtype=torch.uint8).set_(memory[: header.data_start])
    _check_unchanged(header, size, start.numpy().data)
    tensors = {}
    for name in names:
        if (info := header.tensors.get(name)) is None:
            raise FileError(f"{path.name}: there is no tensor {name!r:.80} in it; read_header tells which there are.")
        tensors[name] = torch.empty(0, dtype=DTYPES[info.dtype]).set_(memory[info.start : info.end]).view(info.shape)
    return tensors


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every value of these views of a mapped file is finite.

    Tensors that lie side by side are looked at in one go: of an adapter's hundreds the calls cost more than the bytes.
    """
    runs: list[tuple[int, int, torch.dtype]] = []
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        if not tensor.numel():  # which lies nowhere
            continue
        start, dtype = tensor.data_ptr(), tensor.dtype
        if dtype.itemsize == 1 or not dtype.is_floating_point:  # the 8-bit floats are widened, each by itself
            if not is_finite(tensor):
                return False
            continue
        begun = runs.pop() if runs and runs[-1][1:] == (start, dtype) else (start, start, dtype)
        runs.append((begun[0], start + tensor.nbytes, dtype))
    return all(
        is_finite(torch.frombuffer((ctypes.c_char * (end - start)).from_address(start), dtype=dtype))
        for start, end, dtype in runs
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite, without a mask of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # the 8-bit floats have no minimum of their own
        tensor = tensor.float()
    # NaN spreads into both, which come from a GPU in one go.
    return all(map(math.isfinite, torch.stack(torch.aminmax(tensor)).tolist()))
