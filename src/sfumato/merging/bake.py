"""Adapters into the weights of a checkpoint or a diffusers folder, written as a new one of the same form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.adapters.weights import weight_at
from sfumato.errors import AdapterError, FileError
from sfumato.files.header import read_header
from sfumato.files.kinds import Change
from sfumato.files.kinds.ia3 import BiasChange, bias_change
from sfumato.files.kinds.modules import refuse_modules
from sfumato.files.read import read_tensors
from sfumato.files.save import write_streamed
from sfumato.merging.merge import MergeSource
from sfumato.merging.methods import DENSE, MethodSettings
from sfumato.merging.model_weights import Parameter, StoredBase
from sfumato.models.family import read_config
from sfumato.models.folder import PARTS, weight_files
from sfumato.utils import randomness
from sfumato.utils.atomic import atomic_folder, write_text

_FIRST_LAYER: Parameter = ("unet", "conv_in.weight")
"""An inpainting or editing model's takes further channels after the latents' own, of which others know nothing."""

KEPT_SUFFIXES = (".json", ".txt", ".model")
"""What a new diffusers folder takes over beside the weights: configs and vocabularies."""


@dataclass(frozen=True)
class BakePlan:
    """How a base's parameters become those of the result.

    terms: by parameter, what changes it: (weight, change, name of the source). method: "linear", or a name of `DENSE`,
    which is given the deltas of a parameter as matrices. seed: where the draws of a method come from.
    """

    base: StoredBase
    terms: Mapping[Parameter, Sequence[tuple[float, Change | BiasChange, str]]]
    method: str
    settings: MethodSettings
    seed: int

    def changed(self, parameter: Parameter) -> Tensor:
        """The parameter with its changes, fp32."""
        original = self.base.read(parameter)
        if not original.is_floating_point():
            kind = str(original.dtype).removeprefix("torch.")
            raise AdapterError(
                f"{self.base.name}: {'.'.join(parameter)} is {kind}, which nothing can be added to. Name the base in a "
                "floating-point format."
            )
        original, terms = original.float(), self.terms[parameter]
        weights = [weight for weight, _, _ in terms]
        deltas = (self._delta(parameter, original, change, name) for _, change, name in terms)
        if self.method == "linear":
            total = original.clone()
            for weight, delta in zip(weights, deltas, strict=True):
                total += weight * delta
            return total
        draws = randomness.generator(self.seed, f"merge/{'/'.join(parameter)}")
        flat = [delta.reshape(len(delta), -1) for delta in deltas]
        merged = DENSE[self.method](self.settings, draws)(flat, weights)
        return original + merged.float().reshape(original.shape)

    def _delta(self, parameter: Parameter, original: Tensor, change: Change | BiasChange, name: str) -> Tensor:
        inputs = _inputs(change)
        narrow = parameter == _FIRST_LAYER and inputs is not None and inputs < original.shape[1]
        try:
            delta = change.delta(original[:, :inputs] if narrow else original)
        except AdapterError as error:
            raise AdapterError(f"{name}, {'.'.join(parameter)}: {error}") from None
        if narrow:
            delta = torch.cat([delta, torch.zeros_like(original[:, inputs:])], 1)
        if delta.numel() != original.numel() or delta.shape[:1] != original.shape[:1]:
            raise AdapterError(
                f"{name}: {'.'.join(parameter)} is {list(delta.shape)} in the adapter, {list(original.shape)} in "
                f"{self.base.name}. Name the base it was trained on."
            )
        return delta.float().reshape(original.shape)

    def files(self) -> dict[Path, dict[str, list[Parameter]]]:
        """Of each file the tensors that change, and the parameters that lie in each."""
        found: dict[Path, dict[str, list[Parameter]]] = {}
        for parameter in self.terms:
            place = self.base.places[parameter]
            found.setdefault(place.file, {}).setdefault(place.tensor, []).append(parameter)
        return found

    def write(
        self,
        file: Path,
        changed: Mapping[str, Sequence[Parameter]],
        output: Path,
        metadata: Mapping[str, str],
        *,
        hashed: bool,
    ) -> Path:
        """Write all tensors of a file, those of `changed` with their changes, in the file's dtypes, one at a time."""
        tensors = read_tensors(file)

        def make(name: str) -> Tensor:
            if name not in changed:
                return tensors[name]
            new = tensors[name].clone()
            for parameter in changed[name]:
                total = self.changed(parameter)
                if not bool((total.abs() <= torch.finfo(new.dtype).max).all()):
                    raise AdapterError(
                        f"{'.'.join(parameter)} would overflow {str(new.dtype).removeprefix('torch.')}. "
                        "Use smaller weights."
                    )
                self.base.places[parameter].view(new).copy_(total)
            return new

        return write_streamed(output, tensors, make, metadata, hashed=hashed)


def _inputs(change: Change | BiasChange) -> int | None:
    """The input channels of a convolution's change; None where it is none, or does not tell."""
    shape = getattr(change, "shape", None)
    return shape[1] if shape is not None and len(shape) == 4 else None


def bake(
    base: StoredBase,
    sources: Sequence[MergeSource],
    output: Path,
    metadata: Mapping[str, str],
    *,
    method: str,
    settings: MethodSettings,
    seed: int,
) -> Path:
    """Write the base with the sources in it: each delta taken on the pristine W, each weight rounded once to its dtype.

    method: "linear" for W + sum of w_i delta_i, or one on dense deltas, of each parameter by itself: ties, dare,
    dare-ties, magnitude. output: a .safetensors file for a checkpoint, a folder that does not exist for a diffusers
    folder. Whole or not at all. metadata: added to a checkpoint's own.
    Raises AdapterError for modules that the base lacks or that do not fit.
    """
    recipe = BakePlan(base, _by_parameter(base, sources), method, settings, seed)
    if base.root.is_file():
        return _write_file(recipe, output, metadata)
    return _write_folder(recipe, output)


TermsByParameter = dict[Parameter, list[tuple[float, Change | BiasChange, str]]]


def _by_parameter(base: StoredBase, sources: Sequence[MergeSource]) -> TermsByParameter:
    found: TermsByParameter = {}
    for source in sources:
        refuse_modules(source.name, source.changes)
        lacking = [target for target in source.changes if base.parameter(target) is None]
        if lacking:
            raise AdapterError(
                f"{source.name}: {len(lacking)} of {len(source.changes)} modules are not in {base.name}, first "
                f"{'.'.join(lacking[0])}. Name the base it was trained on."
            )
        for target, change in source.changes.items():
            weight = weight_at(source.weight, *target)
            if weight == 0:
                continue
            has_bias = base.parameter(target, "bias") is not None
            for which, what in (("weight", change), ("bias", bias_change(change, has_bias=has_bias))):
                if what is None:
                    continue
                parameter = base.parameter(target, which)
                if parameter is None:
                    raise AdapterError(
                        f"{source.name}: changes the bias of {'.'.join(target)}, which has none in {base.name}. "
                        "Name the base it was trained on."
                    )
                found.setdefault(parameter, []).append((weight, what, source.name))
    if not found:
        raise AdapterError("nothing is left to bake: every adapter has the weight 0, or no block was chosen.")
    return found


def _write_file(recipe: BakePlan, output: Path, metadata: Mapping[str, str]) -> Path:
    base = recipe.base
    if output.suffix != ".safetensors":
        raise FileError(f"{output.name}: {base.name} is a single file; name a .safetensors file to write.")
    if output.exists() and output.samefile(base.root):
        raise FileError(f"{output.name}: this is the base itself, which is not written over. Name another file.")
    described = {**read_header(base.root).metadata, **metadata}
    return recipe.write(base.root, recipe.files()[base.root], output, described, hashed=True)


def _write_folder(recipe: BakePlan, output: Path) -> Path:
    base = recipe.base
    if output.exists():
        raise FileError(f"{output.name}: exists already, and folders are not written over. Name another one.")
    if output.suffix == ".safetensors":
        raise FileError(f"{output.name}: {base.name} is a diffusers folder; name a folder to write.")
    touched, index = recipe.files(), read_config(base.root, "model_index.json")
    try:
        with atomic_folder(output) as temporary:
            for path in sorted(base.root.rglob("*")):
                inside = path.relative_to(base.root)
                if not path.is_file() or any(name.startswith(".") for name in inside.parts):
                    continue
                target = temporary / inside
                if path in touched:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    recipe.write(path, touched[path], target, read_header(path).metadata, hashed=False)
                elif path.suffix in KEPT_SUFFIXES or _is_read(inside, base.root, index):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
            _leave_out_lacking(temporary, index)
    except OSError as error:
        raise FileError(f"{output.name}: the folder could not be written ({error.strerror}). Make room.") from None
    return output


def _is_read(inside: Path, root: Path, index: Mapping[str, Any]) -> bool:
    """Whether a weight file is one that a reader of the folder opens: of a part, not a variant beside the plain one, no
    pickle."""
    if inside.suffix != ".safetensors" or len(inside.parts) != 2 or inside.parts[0] not in index:
        return False
    return root / inside in weight_files(root / inside.parent)


def _leave_out_lacking(folder: Path, index: Mapping[str, Any]) -> None:
    """Take parts that are not in the folder out of its index, by which diffusers would look for them and fail: the
    hub's bases are fetched without their safety checker, and pickles are not taken over."""
    lacking = [
        name
        for name, kind in index.items()
        if isinstance(kind, list) and any(kind) and name not in PARTS and not _is_whole(folder / name)
    ]
    if lacking:
        told = {**index, **{name: [None, None] for name in lacking}}
        if "safety_checker" in lacking:
            told["requires_safety_checker"] = False
        write_text(folder / "model_index.json", json.dumps(told, indent=2) + "\n")


def _is_whole(part: Path) -> bool:
    """Whether what diffusers reads of a part is there: of a model, which has a config.json, weights, too."""
    is_model = (part / "config.json").is_file()
    return part.is_dir() and (not is_model or any(part.glob("[!.]*.safetensors")))
