"""Where the base's own bytes are kept while a mix is in its weights: its file if they are there, else a copy."""

from __future__ import annotations

import ctypes
import mmap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import SfumatoError
from sfumato.files.header import Header, read_header
from sfumato.files.read import read_tensors

Place = tuple[str, str, str]
"""(part, path of the module, "weight" or "bias")."""

_LARGE = 2 << 20
"""Bytes from which on copies have memory of their own, which goes back to the system with the last of them."""


class OriginalWeights:
    """The originals of the weights of one pipeline.

    A weight whose bytes its memory-mapped file holds takes no memory of its own; the file must stay in place while the
    mix lives, replaced by a rename if at all.
    """

    def __init__(self, parts: Mapping[str, nn.Module], files: Sequence[Path]) -> None:
        self._parts = parts
        self._files = files
        self._sources: dict[str, list[_Source]] = {}

    def of(self, places: Mapping[Place, Tensor]) -> dict[Place, Tensor | list[Tensor]]:
        """For each place a copy of its weight; or, where the base's files may hold it, their tensors of its name.

        Those are compared by `original_of` right before the weight is changed, when its bytes are wanted anyway.
        """
        found: dict[Place, Tensor | list[Tensor]] = {}
        for part in dict.fromkeys(place[0] for place in places):
            wanted = {place: weight.detach() for place, weight in places.items() if place[0] == part}
            wanted = {place: weight for place, weight in wanted.items() if _is_plain(weight)}
            if wanted:
                found |= self._mapped(part, wanted)
        rest = {place: weight.detach() for place, weight in places.items() if place not in found}
        return found | dict(zip(rest, _copies(list(rest.values())), strict=True))

    def _mapped(self, part: str, wanted: Mapping[Place, Tensor]) -> dict[Place, list[Tensor]]:
        if part not in self._sources:
            self._sources[part] = _sources(part, self._parts[part], self._files)
        found: dict[Place, list[Tensor]] = {}
        names = {f"{path}.{name}": (part, path, name) for _, path, name in wanted}
        for source in self._sources[part]:
            for name, tensor in source.read({name: wanted[place] for name, place in names.items()}).items():
                found.setdefault(names[name], []).append(tensor)
        return found


def find_original(weight: Tensor, candidates: Iterable[Tensor]) -> Tensor:
    """A tensor with the weight's bytes that nothing writes to: the candidate that has them, else a copy."""
    weight = weight.detach()
    for candidate in candidates:
        if same_bytes(candidate, weight):
            return candidate.view(weight.shape)
    return _copies([weight])[0]


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors on the CPU hold the same bytes; 0 and -0 differ, a NaN equals itself."""
    if _memcmp is not None:  # two thirds of the time of torch.equal
        size = one.nbytes
        return size == other.nbytes and _memcmp(one.data_ptr(), other.data_ptr(), size) == 0
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def _c_memcmp() -> Any:
    try:
        memcmp = ctypes.CDLL(None).memcmp
    except (AttributeError, OSError, TypeError):  # no C library by that name, as on Windows
        return None
    memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return memcmp


_memcmp = _c_memcmp()


def _copies(weights: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the weights. Those of weights on a GPU are on the CPU, too, where they would take much of what is free
    there."""
    have_room = _fit_on_gpu(weights)

    def stays(weight: Tensor) -> bool:
        return have_room and weight.device.type != "cpu"

    packed = iter(_copy_in_one_block([weight for weight in weights if not stays(weight) and weight.is_contiguous()]))
    return [
        weight.clone() if stays(weight) else next(packed) if weight.is_contiguous() else weight.to("cpu", copy=True)
        for weight in weights
    ]


def _copy_in_one_block(weights: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU of contiguous weights, in one piece of memory.

    Of small pages: in a virtual machine whose host takes back what is free the first touch of a huge one takes ten
    times as long as that of small ones, which are more likely to be there.
    """
    sizes = [-(-weight.nbytes // 64) * 64 for weight in weights]
    if sum(sizes) < _LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return [weight.to("cpu", copy=True) for weight in weights]
    arena = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pieces = torch.split(torch.frombuffer(arena, dtype=torch.uint8), sizes)
    return [
        piece[: weight.nbytes].view(weight.dtype).view(weight.shape).copy_(weight)
        for piece, weight in zip(pieces, weights, strict=True)
    ]


def _fit_on_gpu(weights: Sequence[Tensor]) -> bool:
    """Whether copies of those on a CUDA GPU take at most a quarter of the memory that is free there."""
    needed: Counter[torch.device] = Counter()
    for weight in weights:
        needed[weight.device] += weight.nbytes if weight.device.type == "cuda" else 0
    return all(size <= _free(device) // 4 for device, size in needed.items() if size)


def _free(device: torch.device) -> int:
    """Bytes of a CUDA GPU that nobody holds, and those that torch keeps for tensors to come."""
    kept: int = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _is_plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.is_contiguous()


@dataclass(frozen=True)
class _Source:
    """A weight file of the base, and the names in it that differ from the model's."""

    header: Header
    names: Mapping[str, str]

    def read(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mapped tensors, by the model's names, of those weights that the file holds in their dtype and size."""
        stored = {name: self._stored(name) for name in wanted}
        stored = {name: there for name, there in stored.items() if self._size(there) == wanted[name].nbytes}
        if not stored:
            return {}
        try:
            tensors = read_tensors(self.header.path, list(stored.values()), header=self.header, allow_nonfinite=True)
        except SfumatoError:  # a file that is broken now is no source; the weights are copied instead
            return {}
        found = {name: tensors[there] for name, there in stored.items()}
        return {name: tensor for name, tensor in found.items() if tensor.dtype == wanted[name].dtype}

    def _stored(self, name: str) -> str:
        spellings = (self.names.get(name, name), f"text_model.{name}", name.removeprefix("text_model."))
        return next((spelling for spelling in spellings if spelling in self.header.tensors), name)

    def _size(self, name: str) -> int:
        info = self.header.tensors.get(name)
        return 0 if info is None else info.end - info.start


def _sources(part: str, module: nn.Module, files: Sequence[Path]) -> list[_Source]:
    sources = []
    for file, names in _names_and_files(part, module, files):
        try:
            sources.append(_Source(read_header(file), names))
        except SfumatoError:
            continue
    return sources


def _names_and_files(part: str, module: nn.Module, files: Sequence[Path]) -> list[tuple[Path, Mapping[str, str]]]:
    """The files that may hold the part's weights, each with the names that differ there."""
    config: Any = getattr(module, "config", {})
    where = config.get("_name_or_path") if hasattr(config, "get") else getattr(config, "_name_or_path", None)
    folders = [Path(where), Path(where) / part] if isinstance(where, str) and where else []
    found = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.safetensors"))]
    found += [file for file in files if file.parent.name == part and file not in found]
    whole = [file for file in files if file.parent.name not in ("unet", "vae", "text_encoder", "text_encoder_2")]
    if whole and part == "unet":
        from sfumato.files.module_names import unet_name

        names = {name: f"model.diffusion_model.{unet_name(name, config)}" for name, _ in module.named_parameters()}
        return [(file, {}) for file in found] + [(file, names) for file in whole]
    return [(file, {}) for file in found]
