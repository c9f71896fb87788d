"""The weights of a base as they lie in its files, by (part, parameter): to be looked at, subtracted, changed.

A checkpoint and a diffusers folder of one model have the same parameters under different names, in OpenCLIP's text
encoders fused in threes and transposed. Nothing here builds a model; a weight is read when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from sfumato.errors import BaseModelError
from sfumato.files.header import read_header
from sfumato.files.module_names import Target
from sfumato.files.read import is_finite, read_tensors
from sfumato.models import folder as folders
from sfumato.models import single_file
from sfumato.models.family import (
    FAMILIES,
    Family,
    family_from_keys,
    family_of_config,
    read_config,
    stated_prediction_type,
)
from sfumato.models.loading import find_base
from sfumato.models.weights import LazyModel, StoredWeight

Parameter = tuple[str, str]
"""(part, name in the part's `state_dict()`), such as ("unet", "conv_in.weight")."""


@dataclass(frozen=True)
class ParameterLocation:
    """Where a parameter lies. shape: the model's; a file may hold a 1x1 convolution as a matrix, or the other way."""

    stored: StoredWeight
    shape: tuple[int, ...]

    @property
    def file(self) -> Path:
        """The file that holds it."""
        return self.stored.header.path

    @property
    def tensor(self) -> str:
        """The name of the file's tensor that holds it, perhaps beside others."""
        return self.stored.name

    def view(self, tensor: Tensor) -> Tensor:
        """The parameter within the tensor of the file, a view."""
        return self.stored.view(tensor).view(self.shape)


@dataclass(frozen=True)
class StoredBase:
    """A base's parameters and where they lie. root: the folder or file. name: its public name. prediction_type: where
    the folder's scheduler or the file's metadata says it."""

    root: Path
    name: str
    family: Family
    places: Mapping[Parameter, ParameterLocation]
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
        """The parameter in the file's dtype, a view of the mapped file. Raises FileError for one that was replaced."""
        place = self.places[parameter]
        if place.file not in self._mapped:  # views, which cost nothing until they are looked at
            header = place.stored.header
            self._mapped[place.file] = read_tensors(place.file, header=header, allow_nonfinite=True)
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


def stored_base(source: str | os.PathLike[str]) -> StoredBase:
    """The parameters of `pocket`, a hub id, a diffusers folder or a checkpoint, without reading them.

    Raises BaseModelError, or FileError for a broken file.
    """
    path, name = find_base(source)
    if path.is_file():
        return _in_file(path, name)
    return _in_folder(path, name)


def _in_file(path: Path, name: str) -> StoredBase:
    header = read_header(path)
    family = family_from_keys(header.tensors, path.name, needs_vae=False)  # which nobody here reads
    shells = {"unet": single_file.load_unet(header, single_file.unet_config(header, family), torch.float32)}
    for index, encoder in enumerate(family.encoders):
        shells[encoder.folder] = single_file.load_text_encoder(header, family, index, torch.float32)
    return StoredBase(path, name, family, _places(shells), stated_prediction_type(header))


def _in_folder(path: Path, name: str) -> StoredBase:
    if not (path / "model_index.json").is_file():
        raise BaseModelError(f"{path.name}: no model_index.json, so it is no diffusers folder. Name its whole folder.")
    family = FAMILIES["pocket"] if name == "pocket" else family_of_config(read_config(path, "unet/config.json"))
    shells = {"unet": folders.load_unet(path, torch.float32)}
    for encoder in family.encoders:
        shells[encoder.folder] = folders.load_text_encoder(path, encoder, torch.float32)
    said = ""
    if (path / "scheduler/scheduler_config.json").is_file():
        config = read_config(path, "scheduler/scheduler_config.json")
        kind = config.get("prediction_type", "epsilon")  # diffusers' own default
        said = kind if kind in ("epsilon", "v_prediction") else ""
    return StoredBase(path, name, family, _places(shells), said)


def _places(shells: Mapping[str, LazyModel]) -> Mapping[Parameter, ParameterLocation]:
    return MappingProxyType(
        {
            (part, name): ParameterLocation(shell.stored[name], tuple(value.shape))
            for part, shell in shells.items()
            for name, value in shell.model.state_dict().items()
        }
    )
