"""Latents and text embeddings on disk, each in a file named by the hash of everything it depends on.

Whatever changes a result changes its name, so nothing in the folder is ever stale, several data sets, bases and runs
may share it, and it may be deleted while no run that uses it goes on. A file that is broken counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL
from torch import Tensor

from sfumato.data.buckets import Crop
from sfumato.errors import DataError, FileError
from sfumato.files.header import read_header
from sfumato.files.read import read_tensors
from sfumato.files.save import raw_bytes, write_tensors
from sfumato.models.base import public_config
from sfumato.utils.atomic import require_disk_space

FORMAT = 4
"""To be raised whenever what is computed here changes: cropping, resampling, what is stored."""
_CHECKSUM = "sfumato.crc32"


@dataclass(frozen=True)
class Entry:
    """A file of the cache. metadata: as it was written."""

    path: Path
    metadata: Mapping[str, str]

    def tensors(self) -> dict[str, Tensor]:
        """Views of the mapped file; memory is taken only for what is used, and given back."""
        try:
            return read_tensors(self.path)
        except FileError as error:
            raise DataError(
                f"{self.path}: the cache was changed while it was in use ({error}) sfumato resume goes on with the run."
            ) from None


class Cache:
    """A folder of such files. Several processes may use it at once: files appear whole, and equal names are equal."""

    def __init__(self, folder: Path):
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is a file; the cache wants a folder. Name another place with --cache.")

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether the entry is there, perhaps broken."""
        return self._path(kind, key).is_file()

    def find(self, kind: str, key: str) -> Entry | None:
        """The entry, if it is there and whole."""
        path = self._path(kind, key)
        if not path.is_file():
            return None
        try:
            header = read_header(path)
            # What is whole is finite: nothing else is written.
            tensors = read_tensors(path, header=header, allow_nonfinite=True)
        except FileError:
            return None
        described = dict(header.metadata)
        is_whole = described.pop(_CHECKSUM, None) == _checksum(tensors, described)
        return Entry(path, header.metadata) if is_whole and described.get("sfumato.cache") == key else None

    def write(
        self, kind: str, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> Entry:
        """Keep `tensors` under `key`. Raises DataError if the disk does not take them."""
        described = {**(metadata or {}), "sfumato.cache": key}
        described[_CHECKSUM] = _checksum(tensors, described)
        try:
            # Not waiting for the disk at each: what a power cut leaves broken counts as missing.
            return Entry(write_tensors(self._path(kind, key), tensors, described, durable=False), described)
        except (FileError, OSError) as error:
            raise self._unwritable(str(error)) from None

    def require_space(self, needed: int) -> None:
        """Raise DataError if the disk has no room for so many bytes more."""
        there = next(place for place in (self.folder, *self.folder.parents) if place.exists())
        try:
            require_disk_space(there, needed)
        except OSError as error:
            raise self._unwritable(f"{error.strerror}.") from None

    def _unwritable(self, reason: str) -> DataError:
        return DataError(f"{self.folder}: the cache cannot be written ({reason}) Make room, or go without.")


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """zlib's crc32 over an entry's bytes, their names, dtypes and shapes, and its other metadata, in hex."""
    described = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in sorted(tensors.items())]
    found = zlib.crc32(json.dumps([described, sorted(metadata.items())]).encode())
    for _, tensor in sorted(tensors.items()):
        found = zlib.crc32(raw_bytes(tensor), found)
    return f"{found:08x}"


def cache_key(**parts: Any) -> str:
    """The name of a result: a hash of everything that it depends on, in hex."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def decoder_versions() -> str:
    """Versions of what turns files into pixels."""
    try:
        import pillow_heif

        heif = f", pillow-heif {pillow_heif.__version__}"
    except ImportError:
        heif = ""
    return f"Pillow {PIL.__version__}{heif}"


def weights_digest(modules: Iterable[Any]) -> str:
    """sha256 over the modules' configs and weights, in their present dtype, in hex."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(public_config(module).encode())
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def crop_to_text(crop: Crop) -> str:
    """A crop as the metadata of an entry holds it."""
    return json.dumps(asdict(crop))


def crop_from_text(text: str) -> Crop:
    """The crop that `crop_to_text` wrote."""
    values = json.loads(text)
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Crop(**fields)
