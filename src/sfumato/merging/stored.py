"""The weights of a base as they lie in its files, by (part, parameter): to be looked at, subtracted, changed.

A checkpoint and a diffusers folder of one model have the same parameters under different names, in OpenCLIP's text
encoders fused in threes and transposed. Nothing here builds a model; a weight is read when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from sfumato.bases import folder as folders
from sfumato.bases import single_file
from sfumato.bases.family import FAMILIES, Encoder, Family, recognise
from sfumato.bases.loading import find
from sfumato.bases.names import clip_name, open_clip_name, unet_name
from sfumato.bases.recognise import TEXT_PREFIXES, UNET, family_of_names, stated_prediction
from sfumato.bases.weights import text_skeleton, unet_skeleton
from sfumato.errors import BaseModelError
from sfumato.files.header import Header, read_header
from sfumato.files.kohya import Target
from sfumato.files.read import is_finite, read_tensors

Parameter = tuple[str, str]
"""(part, name in the part's `state_dict()`), such as ("unet", "conv_in.weight")."""


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: the file, the tensor, which third of its rows, whether as its transpose.

    shape: the parameter's in the model; a file may hold a 1x1 convolution as a matrix, and the other way round.
    """

    file: Path
    tensor: str
    shape: tuple[int, ...]
    third: slice | None = None
    transposed: bool = False

    def view(self, stored: Tensor) -> Tensor:
        """The parameter within the tensor of the file, a view."""
        if self.third is not None:
            rows = stored.shape[0] // 3
            stored = stored[self.third.start * rows : self.third.stop * rows]
        return (stored.T if self.transposed else stored).view(self.shape)


@dataclass(frozen=True)
class StoredBase:
    """A base's parameters and where they lie. root: the folder or file. name: its public name. prediction_type: where
    the folder's scheduler or the file's metadata says it."""

    root: Path
    name: str
    family: Family
    places: Mapping[Parameter, Place]
    prediction_type: str = ""
    _mapped: dict[Path, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def parameter(self, target: Target, which: str = "weight") -> Parameter | None:
        """The parameter of a module, by the path this base gives it; None if there is none such."""
        part, path = target
        bare = path.removeprefix("text_model.")
        for spelling in (path, bare, f"text_model.{bare}"):
            if (part, f"{spelling}.{which}") in self.places:
                return part, f"{spelling}.{which}"
        return None

    def read(self, parameter: Parameter) -> Tensor:
        """The parameter in the file's dtype, a view of the mapped file."""
        place = self.places[parameter]
        if place.file not in self._mapped:  # views, which cost nothing until they are looked at
            self._mapped[place.file] = read_tensors(place.file, allow_nonfinite=True)
        tensor = self._mapped[place.file][place.tensor]
        if not is_finite(tensor):
            raise BaseModelError(f"{self.name}: {place.tensor} holds NaN or Inf. Download the base again.")
        return place.view(tensor)

    def weight(self, target: Target, which: str = "weight") -> Tensor:
        """The weight or "bias" of a module in fp32. Raises BaseModelError where the base lacks it."""
        parameter = self.parameter(target, which)
        if parameter is None:
            what = "" if which == "weight" else f" with a {which}"
            raise BaseModelError(
                f"{self.name}: has no {'.'.join(target)}{what}, which the adapter changes. Name the base that it was "
                "trained on."
            )
        return self.read(parameter).float()


def stored(source: str | os.PathLike[str]) -> StoredBase:
    """The parameters of `pocket`, a hub id, a diffusers folder or a checkpoint, without reading them.

    Raises BaseModelError, or FileError for a broken file.
    """
    path, name = find(source)
    if path.is_file():
        return _in_file(path, name)
    return _in_folder(path, name)


def _in_file(path: Path, name: str) -> StoredBase:
    header = read_header(path)
    family = family_of_names(header.tensors, path.name, needs_vae=False)  # which nobody here reads
    config = single_file.unet_config(header, family)
    places: dict[Parameter, Place] = {}
    for key, value in unet_skeleton(config).state_dict().items():
        old = UNET + unet_name(key, config)
        _place(places, ("unet", key), header, Place(path, old, tuple(value.shape)))
    _refuse_unknown(places, (key for key in header.tensors if key.startswith(UNET)), path.name)
    for index, encoder in enumerate(family.encoders):
        prefix = TEXT_PREFIXES[family.name][index]
        real = {clip_name(old.removeprefix(prefix)): old for old in header.tensors if old.startswith(prefix)}
        model = text_skeleton(encoder.class_name, single_file.text_config(header, family, index))
        for key, value in model.state_dict().items():
            old, third, transposed = clip_name(key), None, False
            if "transformer" not in prefix:
                old, third, transposed = open_clip_name(key)
            place = Place(path, real.get(old, prefix + old), tuple(value.shape), third, transposed)
            _place(places, (encoder.folder, key), header, place)
    return StoredBase(path, name, family, MappingProxyType(places), stated_prediction(header))


def _refuse_unknown(places: Mapping[Parameter, Place], there: Iterable[str], where: str) -> None:
    """Refuse a U-Net with more weights than these places, as loading does: scales of 8-bit ones are such."""
    known = {place.tensor for place in places.values()}
    if unknown := [key for key in there if key not in known]:
        raise BaseModelError(
            f"{where}: {len(unknown)} weights of its U-Net are unknown, first {unknown[0]}. It is quantised, or of "
            "another architecture; name another model."
        )


def _place(places: dict[Parameter, Place], parameter: Parameter, header: Header, place: Place) -> None:
    if place.tensor not in header.tensors:
        raise BaseModelError(f"{header.path.name}: {place.tensor} is missing. Download the file again.")
    places[parameter] = place


def _in_folder(path: Path, name: str) -> StoredBase:
    if not (path / "model_index.json").is_file():
        raise BaseModelError(f"{path.name}: no model_index.json, so it is no diffusers folder. Name its whole folder.")
    config = folders.read_config(path, "unet/config.json")
    family = FAMILIES["pocket"] if name == "pocket" else recognise(config)
    places: dict[Parameter, Place] = {}
    shapes = {key: tuple(value.shape) for key, value in unet_skeleton(config).state_dict().items()}
    _collect(places, "unet", path / "unet", shapes)
    headers = (read_header(file) for file in folders.weight_files(path / "unet"))
    _refuse_unknown(places, (key for header in headers for key in header.tensors), f"{path.name}/unet")
    for encoder in family.encoders:
        _collect(places, encoder.folder, path / encoder.folder, _text_shapes(path, encoder))
    said = ""
    if (path / "scheduler/scheduler_config.json").is_file():
        config = folders.read_config(path, "scheduler/scheduler_config.json")
        kind = config.get("prediction_type", "epsilon")  # diffusers' own default
        said = kind if kind in ("epsilon", "v_prediction") else ""
    return StoredBase(path, name, family, MappingProxyType(places), said)


def _text_shapes(path: Path, encoder: Encoder) -> dict[str, tuple[int, ...]]:
    model = text_skeleton(encoder.class_name, folders.read_config(path, f"{encoder.folder}/config.json"))
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _collect(places: dict[Parameter, Place], part: str, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The parameters of one model of a folder, whichever transformers version wrote the names."""
    files: Sequence[Path] = folders.weight_files(folder)
    real = {_bare(key): (file, key) for file in files for key in read_header(file).tensors}
    for key, shape in shapes.items():
        if _bare(key) not in real:
            raise BaseModelError(f"{folder.parent.name}/{folder.name}: {key} is missing. Download it again.")
        file, old = real[_bare(key)]
        places[part, key] = Place(file, old, shape)


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")
