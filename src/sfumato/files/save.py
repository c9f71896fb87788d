"""Write safetensors files so that equal content gives equal bytes, with the usual hashes over them.

The safetensors library keeps metadata in a hash map, so that its header differs from run to run. Here tensors are in
the library's own order (wide dtypes first, then by name), because the usual hashes are defined on it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from sfumato.errors import FileError
from sfumato.files.header import MARKERS, NAME_LIMIT, checked_path
from sfumato.files.metadata import METADATA_LIMIT
from sfumato.files.read import is_finite
from sfumato.utils.atomic import atomic_folder, atomic_path

# Widest first, as the library sorts.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: i for i, dtype in enumerate(_DTYPES)}


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    durable: bool = True,
) -> Path:
    """Write a safetensors file, complete or not at all; the same tensors and metadata give the same bytes. durable: as
    of `atomic_path`.

    Raises FileError for a tensor with NaN or Inf or one that readers would refuse, before anything is written; and for
    a disk that does not take the file.
    """
    path = checked_path(path)
    _check_writable(path, tensors)
    for name, tensor in tensors.items():
        _check_finite(path, name, tensor)
    with _opened(path, durable=durable) as file:
        file.write(header_bytes(tensors, metadata or {}))
        for name in ordered(tensors):
            file.write(raw_bytes(tensors[name]))
    return path


def write_streamed(
    path: str | os.PathLike[str],
    shapes: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    hashed: bool = True,
) -> Path:
    """Write the file that `write_tensors` would write, but one tensor at a time: `make` returns each tensor by name.

    shapes: tensors of the same shapes and dtypes, perhaps on the device `meta`. hashed: put `hashes` into the metadata.
    If `make` raises, nothing is left behind.
    """
    path = checked_path(path)
    _check_writable(path, shapes)
    head = header_bytes(shapes, {**metadata, **(_hashes([], b"") if hashed else {})})  # as long as with its own hashes
    with _opened(path) as file:
        file.write(head)
        for name in ordered(shapes):
            try:
                tensor = make(name)
            except OSError as error:  # of a file that is read for it, which is not this one
                where = f"{error.filename}: " if error.filename else ""
                reason = f"{where}{error.strerror or error}"
                raise FileError(
                    f"{path.name}: what it is made of cannot be read ({reason}), so nothing was written."
                ) from None
            _check_finite(path, name, tensor)
            if (tensor.shape, tensor.dtype) != (shapes[name].shape, shapes[name].dtype):
                raise FileError(f"{path.name}: {name} is not of the shape and dtype that were announced.")
            file.write(raw_bytes(tensor))
        if hashed:
            file.flush()
            with (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as whole,
                whole[len(head) :] as data,
            ):
                found = _hashes([data], _training_header(shapes, metadata))
            file.seek(0)
            file.write(header_bytes(shapes, {**metadata, **found}))
    return path


def _check_writable(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise FileError(
                f"{path.name}: {name!r:.80} is a {type(tensor).__name__}; wanted a tensor, which torch.as_tensor makes."
            )
        is_empty = tensor.numel() == 0 and name not in MARKERS
        if tensor.dtype not in _DTYPES or is_empty or not 0 < len(name) <= NAME_LIMIT:
            raise FileError(
                f"{path.name}: {name[:80]!r} ({tensor.dtype}, {list(tensor.shape)}) cannot be written; wanted a tensor "
                "that is not empty, of a common dtype."
            )
    if not tensors:
        raise FileError(f"{path.name}: there are no tensors to write; give one or more.")


def check_dtype(path: Path, dtype: object) -> None:
    """Raise FileError for what is not a floating-point dtype, such as the name of one."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise FileError(f"{path.name}: the dtype is {dtype!r:.40}; wanted one of torch's, such as torch.float16.")


def cast(value: Tensor, dtype: torch.dtype, name: str, path: Path) -> Tensor:
    """The value in `dtype` on the CPU; the value itself if it is that already.

    Raises FileError, with its name, for a value that is not finite in `dtype`, and for what is not a dtype.
    """
    check_dtype(path, dtype)
    if not is_finite(value):
        raise FileError(
            f"{path.name}: {name} holds NaN or Inf, so the file was not written. "
            "The training diverged; use an earlier save."
        )
    cast = value.detach().to("cpu", dtype).contiguous()
    if not is_finite(cast):
        raise FileError(
            f"{path.name}: {name} overflows {str(dtype).removeprefix('torch.')} "
            f"(largest value {float(value.abs().max()):.3g}). "
            "Save in fp32 or bf16 (--save-precision of trainers, else --dtype)."
        )
    return cast


def check_metadata(described: Mapping[str, str], path: Path) -> None:
    """Raise FileError for more metadata than web pages that show models download."""
    size = sum(len(key.encode()) + len(value.encode()) for key, value in described.items())
    if size > METADATA_LIMIT:
        largest = max(described, key=lambda key: len(described[key]))
        raise FileError(
            f"{path.name}: the metadata takes {size:,} bytes, at most {METADATA_LIMIT:,} are written; "
            f"shorten {largest}."
        )


def _check_finite(path: Path, name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise FileError(f"{path.name}: {name} holds NaN or Inf, so the file was not written. Use an earlier save.")


@contextmanager
def _opened(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to be written and read, which is at `path` once the block ends well. Raises FileError for a disk that does
    not take it."""
    try:
        with atomic_path(path, durable=durable) as temporary, temporary.open("w+b") as file:
            yield file
    except OSError as error:
        # Windows denies a file's place to another while a program has it open, as one that is merged or drawn with.
        is_open = isinstance(error, PermissionError) and path.is_file()
        advice = "Close what has it open, or name another file" if is_open else "Make room or name another folder"
        raise FileError(
            f"{path.name}: the file could not be written ({error.strerror}). {advice}; an earlier file of the name is "
            "untouched."
        ) from None


@contextmanager
def atomic_model_folder(path: Path) -> Iterator[Path]:
    """A temporary folder for a library's `save_pretrained`; it replaces `path` once it is complete.

    transformers shows no progress bar meanwhile. Raises FileError for a disk that does not take it; `path` is then
    unchanged.
    """
    from transformers.utils import logging

    showed = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with atomic_folder(path) as temporary:
            yield temporary
            for written in temporary.rglob("*.safetensors"):  # since 0.8 safetensors lets their owner alone read them
                written.chmod(temporary.stat().st_mode & 0o666)
    except (OSError, SafetensorError) as error:  # a full disk is the second, while tensors are written
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(
            f"{path}: the folder could not be written ({reason}). Make room or name another place; an earlier one of "
            "the name is untouched."
        ) from None
    finally:
        if showed:
            logging.enable_progress_bar()


def ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order of the file."""
    return sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name.encode()))


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON header, padded with spaces to a multiple of 8 as the safetensors library does."""
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in ordered(tensors):
        tensor = tensors[name]
        end = start + tensor.nbytes
        content[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_hashed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """As `write_tensors`, with the `hashes` of the tensors beside the metadata. Raises FileError for too much of it."""
    described = {**metadata, **hashes(tensors, metadata)}
    check_metadata(described, path)
    return write_tensors(path, tensors, described)


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The three usual hashes, all independent of the metadata that users change.

    sshs_model_hash (kohya, read by A1111): sha256 of the bytes after the header.
    modelspec.hash_sha256 (ModelSpec 1.0.1): the same, after "0x".
    sshs_legacy_hash (A1111's first): 8 hex digits of the sha256 of 64 KiB at 1 MiB in the file as it would be with only
    the `ss_` metadata, which is how kohya saves it for this purpose.
    """
    return _hashes([raw_bytes(tensors[name]) for name in ordered(tensors)], _training_header(tensors, metadata))


def _training_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    return header_bytes(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})


def _hashes(data: Sequence[memoryview], training_header: bytes) -> dict[str, str]:
    whole = hashlib.sha256()
    for blob in data:
        whole.update(blob)
    legacy = _window([training_header, *data], 0x100000, 0x10000)
    return {
        "sshs_model_hash": whole.hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{whole.hexdigest()}",
    }


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers as a file has them, whatever its device and strides."""
    array: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return array.data


def _window(blobs: Iterable[bytes | memoryview], start: int, length: int) -> bytes:
    """The bytes [start, start + length) of the blobs' concatenation."""
    found = b""
    position = 0
    for blob in blobs:
        low, high = max(start - position, 0), min(start + length - position, len(blob))
        if low < high:
            found += bytes(blob[low:high])
        position += len(blob)
    return found
