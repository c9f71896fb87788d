"""A whole model as an adapter: its weights in the place of the base's, so that no difference is written first."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from sfumato.errors import FileError
from sfumato.files.adapter_file import AdapterFile, read_adapter
from sfumato.files.header import read_header
from sfumato.files.kinds.ia3 import Replacement
from sfumato.files.module_names import PARTS, Target
from sfumato.files.read import Stamp, stamp
from sfumato.models.family import UNET

if TYPE_CHECKING:
    from sfumato.merging.model_weights import StoredBase

_PREDICTION = "modelspec.prediction_type"


def read_adapter_or_model(path: str | os.PathLike[str], *, partial: bool = False) -> AdapterFile:
    """The adapter at `path`, as `read_adapter` has it, or the whole model there, a checkpoint or a diffusers folder.

    Raises as `read_adapter` does, and BaseModelError for a model that is not whole.
    """
    return model_as_adapter(Path(path)) if is_whole_model(path) else read_adapter(path, partial=partial)


def is_whole_model(path: str | os.PathLike[str]) -> bool:
    """Whether a diffusers folder or a checkpoint is there, told by the names in it; False also where nothing is.

    What a file holds is remembered for as long as it stays as it is, since every picture asks.
    """
    path = Path(path)
    if os.path.isdir(path):  # False, where pathlib raises: too long a name, in a folder that may not be entered
        return (path / "model_index.json").is_file()
    try:
        return os.path.isfile(path) and _is_checkpoint(path.absolute(), stamp(path.stat()))
    except FileError:
        return False


@cache
def _is_checkpoint(path: Path, stamp: Stamp) -> bool:
    return f"{UNET}input_blocks.0.0.weight" in read_header(path).tensors


def model_as_adapter(path: Path) -> AdapterFile:
    """U-Net and text encoders of a whole model, each weight in the place of the base's; the VAE is left out.

    The tensors are views of the mapped files. Raises BaseModelError for a model that is not whole or not finite.
    """
    from sfumato.merging.model_weights import stored_base  # which imports diffusers, as mixing adapters does not

    model = stored_base(path)
    said = {_PREDICTION: model.prediction_type} if model.prediction_type else {}
    width = next(place.shape[1] for (_, name), place in model.places.items() if name.endswith("attn2.to_k.weight"))
    changes = MappingProxyType(weight_replacements(model))
    return AdapterFile(path, changes, MappingProxyType({}), said, model.family.name, width, (), ())


def weight_replacements(model: StoredBase) -> dict[Target, Replacement]:
    """Every weight of the model, with its bias, as the change that puts it in another's place."""
    changes: dict[Target, Replacement] = {}
    for part, name in model.places:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            bias = (part, f"{module}.bias")
            changes[part, module] = Replacement(
                model.read((part, name)), model.read(bias) if bias in model.places else None
            )
    return changes


def files_of_parts(folder: Path) -> list[Path]:
    """The files that U-Net and text encoders of a model's folder are in, in order."""
    from sfumato.models import folder as folders

    return sorted(file for part in PARTS if (folder / part).is_dir() for file in folders.weight_files(folder / part))
