"""The header of a safetensors file, read and checked before any library sees the file. Imports no torch.

A safetensors file is 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets}, "__metadata__":
{str: str}}, then the tensors' bytes. The library accepts duplicate names (the last wins, so that a scanner and a loader
can see different tensors), zero-size tensors of huge dimensions and headers that take seconds and gigabytes; we do not.

What a file really is, told from its first bytes: the suffix is only somebody's word for it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from sfumato.errors import FileError, web_address_error

HEAD_BYTES = 512

_PICTURES = {
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
}
_ARCHIVES = {
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
}
_OTHER_WEIGHTS = {
    b"GGUF": "a GGUF file",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}
_PICKLE_ADVICE = (
    "a pickle can run programs, so it was not opened. Take the .safetensors version of it, or convert it on a machine "
    "you can throw away."
)
_PICTURE_ADVICE = ", not a weight file. Name the .safetensors file it belongs to."
_BY_MAGIC = (
    (_PICTURES, _PICTURE_ADVICE),
    (_ARCHIVES, ", not a weight file. Unpack it and name the .safetensors file in it."),
    (_OTHER_WEIGHTS, "; only safetensors files are read. Take the .safetensors version of it."),
)
_DOWNLOAD_ADVICE = "Download the file itself again."

# Protocol 0 and 1 have no magic: GLOBAL "cmodule\nname\n", or MARK followed by a container and a memo.
_OLD_PICKLE = re.compile(rb"c[\w.]+\n[\w.]+\n|\((?:dp|lp|i)\d*|\}q|\]q|\(c[\w.]+\n")


def describe_unknown_file(head: bytes) -> str:
    """One sentence on a file that is not safetensors: what it is and what to do, to follow "NAME: ".

    head: its first HEAD_BYTES bytes, or all of a shorter file.
    """
    if not head:
        return f"the file is empty (0 bytes). {_DOWNLOAD_ADVICE}"
    if head.startswith(b"version https://git-lfs"):
        return (
            "this is a Git-LFS pointer, the real file was not downloaded. Run `git lfs pull`, or download the file "
            "from its page."
        )
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        if re.search(rb"\.pkl|\.data/|/version", head):
            return f"this is a PyTorch .ckpt/.pt file, a zip with a pickle in it; {_PICKLE_ADVICE}"
        return "this is a zip archive, not a weight file. Unpack it and name the .safetensors file in it."
    if re.match(rb"\x80[\x02-\x05]", head) or _OLD_PICKLE.match(head):
        return f"this is a pickle file (.ckpt/.pt/.bin); {_PICKLE_ADVICE}"
    if head[257:262] == b"ustar":
        return f"this is a tar archive, as early PyTorch wrote with a pickle in it; {_PICKLE_ADVICE}"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return f"this is a WebP image{_PICTURE_ADVICE}"
    for kinds, advice in _BY_MAGIC:
        for magic, kind in kinds.items():
            if head.startswith(magic):
                return f"this is {kind}{advice}"
    if not head.strip(b"\0"):
        return f"the file begins with {len(head)} zero bytes, as a broken-off download leaves it. {_DOWNLOAD_ADVICE}"
    return _text(head)


def _text(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype|html|head|body|\?xml|!--)", start, re.IGNORECASE):
        return (
            "this is a web page saved under a weight file's name (a log-in, a licence or an error page). Open its "
            "address in a browser and download the file itself."
        )
    if start[:1] in (b"{", b"[") and _is_text(head):
        return f"this is JSON text, perhaps a server's error message, not a weight file. {_DOWNLOAD_ADVICE}"
    if _is_text(head):
        return f"this is a text file, not a weight file. {_DOWNLOAD_ADVICE}"
    return "this is no safetensors file (the first 8 bytes do not tell the length of a JSON header). Name another file."


def _is_text(head: bytes) -> bool:
    try:
        text = head[: max(len(head) - 3, 1)].decode("utf-8")  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter in "\t\r\n" for letter in text)


HEADER_LIMIT = 8_000_000
"""Bytes of JSON. A full SDXL checkpoint has 0.4 MB, the largest LyCORIS files with a thumbnail about 1 MB."""
TENSOR_LIMIT = 20_000
"""Tensors. A full SDXL checkpoint has 2,515, a LoRA of every layer with alphas about 3,200."""
PART_LIMIT = 250_000
"""Keys, objects and lists, what stands within texts left out. A file of 20,000 tensors has 140,000; what has more would
take the parser long."""
NAME_LIMIT = 512
RANK_LIMIT = 8
DIM_LIMIT = 2**31

MARKERS = frozenset({"v_pred", "ztsnr"})
"""Tensors that say by being there how a checkpoint was trained: v-prediction, zero terminal SNR. ComfyUI leaves them
empty."""

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
    | {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
)
"""Bytes an element of each dtype that weight files of this field use."""
FLOATS = frozenset({"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file: its dtype as the format writes it, its shape, its bytes [start, end) within the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a weight file. `tensors` is in the order of their bytes; `data_start` is where they begin.

    checksum: zlib's crc32 of the bytes before `data_start`; it shows later whether the file was replaced.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    size: int
    checksum: int = 0


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path of a file to read or write. Raises FileError for what is not a path, such as None."""
    if not isinstance(path, str | os.PathLike):
        raise FileError(f"a file is named by its path, a text, got a {type(path).__name__}.")
    return Path(path)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the safetensors file at `path`, whatever its suffix.

    Raises FileError, one line, for anything that is not a complete and unambiguous safetensors file.
    """
    path = checked_path(path)
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(HEAD_BYTES)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 9 or head[8:9] != b"{" or length >> 40:
            raise FileError(f"{path.name}: {describe_unknown_file(head)}")
        if length > HEADER_LIMIT:
            raise FileError(
                f"{path.name}: the header is {length:,} bytes long, at most {HEADER_LIMIT:,} are read. "
                "No weight file needs that; do not trust this one."
            )
        if 8 + length > size:
            raise FileError(
                f"{path.name}: the file ends after {size:,} bytes, inside its header of {length:,}. "
                "The download was cut off; download it again."
            )
        file.seek(8)
        text = file.read(length)
    start = 8 + length
    found, metadata = _parse(text, path.name)
    tensors = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_offsets(tensors, path.name, size - start)
    placed = {
        name: TensorInfo(info.dtype, info.shape, info.start + start, info.end + start) for name, info in tensors.items()
    }
    checksum = zlib.crc32(text, zlib.crc32(head[:8]))
    return Header(path, MappingProxyType(placed), MappingProxyType(metadata), start, size, checksum)


def _open(path: Path) -> BinaryIO:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            inside = sorted(entry.name for entry in path.glob("*.safetensors"))
            hint = f" It holds {', '.join(inside[:3])}." if inside else ""
            raise FileError(f"{path.name or path}: this is a folder. Name the .safetensors file in it.{hint}")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise FileError(f"{path.name}: this is a device or a pipe, not a file. Name a .safetensors file.")
        return path.open("rb")
    except FileNotFoundError:
        there, whole = _neighbours(path), f"{path.name}.safetensors"
        near = [whole] if whole in there else difflib.get_close_matches(path.name, there, n=1)
        hint = f"Did you mean {path.with_name(near[0])}?" if near else "Check the name and the folder."
        raise FileError(web_address_error(str(path)) or f"{path}: there is no such file. {hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{path.name!r}: the file cannot be read ({reason}). Check its name and permissions.") from None


def _neighbours(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.glob("*.safetensors")]
    except OSError:
        return []


class _DuplicateKeyError(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        raise _DuplicateKeyError(next(key for key in times if times[key] > 1))
    return found


def _parse(text: bytes, file: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors, offsets counted from the data's start, and the metadata."""
    if text.count(b'"data_offsets"') > TENSOR_LIMIT:  # before the parser pays for them
        raise _too_many(file, text.count(b'"data_offsets"'))
    parts = _parts(text)
    if parts > PART_LIMIT:  # some may stand within a text, such as the tags that kohya counts
        # A stretch at a time: what lies between half a million texts would take 30 times their size.
        parts = sum(_parts(_TEXT.sub(b"", stretch[0])) for stretch in _STRETCH.finditer(text))
    if parts > PART_LIMIT:
        raise FileError(
            f"{file}: the header has {parts:,} parts, at most {PART_LIMIT:,} are read. Do not trust this file."
        )
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except _DuplicateKeyError as error:
        raise FileError(
            f"{file}: {_quote(str(error))} is listed twice in the header, so what it means depends on the reader. "
            "Do not trust this file."
        ) from None
    except RecursionError:
        raise FileError(f"{file}: the header is nested too deep. Do not trust this file.") from None
    except ValueError as error:  # bad UTF-8, bad JSON, a number of thousands of digits
        reason = " ".join(str(error).split())[:80]
        raise FileError(f"{file}: the header is not readable as JSON ({reason}). Download the file again.") from None
    metadata = _metadata(content.pop("__metadata__", {}), file)
    if len(content) > TENSOR_LIMIT:
        raise _too_many(file, len(content))
    if not content:
        raise FileError(f"{file}: the file holds no tensors. Download it again, or ask its author.")
    return {name: _tensor(name, value, file) for name, value in content.items()}, metadata


_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""A text of JSON, without backtracking; one that is not closed is all of the rest."""
_STRETCH = re.compile(rb'(?:[^"]++|' + _TEXT.pattern + rb"){1,20000}+", re.DOTALL)
"""Some texts, whole, and what lies between them."""


def _parts(text: bytes) -> int:
    return text.count(b":") + text.count(b"{") + text.count(b"[")


def _too_many(file: str, count: int) -> FileError:
    return FileError(
        f"{file}: the header lists {count:,} tensors, at most {TENSOR_LIMIT:,} are read. Do not trust this file."
    )


def _metadata(value: Any, file: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FileError(f"{file}: __metadata__ is {_kind(value)}, wanted an object of texts. Save the file again.")
    for key, text in value.items():
        if not isinstance(text, str):
            raise FileError(f"{file}: __metadata__ {_quote(key)} is {_kind(text)}, wanted a text. Save it again.")
        try:
            (key + text).encode("utf-8")
        except UnicodeEncodeError:
            raise FileError(f"{file}: __metadata__ {_quote(key)} holds half a character. Save it again.") from None
    return value


def _tensor(name: str, value: Any, file: str) -> TensorInfo:
    """One entry of the header, with everything about it checked that can be checked alone."""
    if not name or len(name) > NAME_LIMIT or not name.isprintable():
        raise FileError(
            f"{file}: a tensor is named {_quote(name)} ({len(name):,} characters); wanted 1 to {NAME_LIMIT} printable "
            "ones. Do not trust this file."
        )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError(
            f"{file}: tensor {_quote(name)} does not have exactly dtype, shape and data_offsets. Save it again."
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FileError(
            f"{file}: tensor {_quote(name)} has the dtype {_quote(str(dtype))}, known are {', '.join(DTYPE_BYTES)}. "
            "Save it in one of these."
        )
    if not _integers(shape) or len(shape) > RANK_LIMIT or any(dim >= DIM_LIMIT for dim in shape):
        raise FileError(
            f"{file}: tensor {_quote(name)} has a shape that no weight has; wanted at most {RANK_LIMIT} integers "
            f"below {DIM_LIMIT:,}. Do not trust this file."
        )
    if 0 in shape and (name not in MARKERS or shape != [0]):
        raise FileError(f"{file}: tensor {_quote(name)} is empty (shape {shape}). No weight is; save it again.")
    if not _integers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileError(f"{file}: tensor {_quote(name)} has no valid data_offsets. Do not trust this file.")
    wanted = prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != wanted:
        raise FileError(
            f"{file}: tensor {_quote(name)} of shape {shape} in {dtype} needs {wanted:,} bytes, its data_offsets give "
            f"{offsets[1] - offsets[0]:,}. Do not trust this file."
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _check_offsets(tensors: Mapping[str, TensorInfo], file: str, available: int) -> None:
    """Every byte after the header belongs to exactly one tensor. tensors: in the order of their bytes."""
    position, previous = 0, ""
    for name, info in tensors.items():
        if info.start < position:
            raise FileError(
                f"{file}: tensors {_quote(previous)} and {_quote(name)} share bytes. Do not trust this file."
            )
        if info.start > position:
            raise FileError(
                f"{file}: {info.start - position:,} bytes before tensor {_quote(name)} belong to no tensor. "
                "Do not trust this file."
            )
        position, previous = info.end, name
    if available < position:
        raise FileError(
            f"{file}: the tensors need {position:,} bytes, the file has {available:,} of them. "
            "The download was cut off; download it again."
        )
    if available > position:
        raise FileError(
            f"{file}: {available - position:,} bytes follow the last tensor. Something was added; download it again."
        )


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all([type(item) is int and item >= 0 for item in value])  # twice as fast as lazy


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}.get(
        type(value), "nothing" if value is None else "a number"
    )


def _quote(text: str) -> str:
    """A name from a file, made safe for one line of a terminal."""
    shown = text if len(text) <= 80 else text[:77] + "..."
    return ascii(shown) if not shown.isprintable() else f"'{shown}'"
