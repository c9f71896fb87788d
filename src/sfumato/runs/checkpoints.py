"""Checkpoints: directories that exist whole or not at all.

    checkpoints/000240/state.safetensors    every kept tensor
    checkpoints/000240/state.json           everything else of the state
    checkpoints/000240/manifest.json        step, and size and sha256 of the two; written last

A checkpoint is written beside its place, brought to the disk, read back, and renamed onto its place before an older one
is removed. So whatever is killed at whatever moment, the newest that verifies is a whole state.

What a training's checkpoints hold of it: modules, optimizers, and all else that has a state.

Nested state (an optimizer's, a module's) <-> named tensors and a JSON skeleton, exactly.

Checkpoints are safetensors and JSON and nothing else, so that reading one can run no code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import FileError, RunError
from sfumato.files import read_tensors, write_tensors
from sfumato.files.read import Stamp, is_finite, stamp
from sfumato.files.save import header_bytes, ordered, raw_bytes
from sfumato.precision.quantization import dtype_name
from sfumato.utils.atomic import atomic_folder, fsync_path, require_disk_space


class CheckpointedParts:
    """parts: by name, each with `state_dict` and `load_state_dict`."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """The state of each part, by its name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def future_bytes(self) -> int:
        """What the states will hold after the first step and do not hold yet: the moments of optimizers."""
        optimizers = [part for part in self.parts.values() if isinstance(part, torch.optim.Optimizer)]
        return sum(
            getattr(each, "state_bytes", _two_moments)(p.shape)
            for each in optimizers
            if not each.state
            for group in each.param_groups
            for p in group["params"]
        )

    def load(self, states: Mapping[str, Any], step: int) -> None:
        """Give the parts what `state` gave of them after `step`. Raises RunError for states of other parts."""
        if lacking := self.parts.keys() ^ states.keys():
            raise RunError(
                f"the checkpoint of step {step} has other parts than this training ({', '.join(sorted(lacking))}); "
                "resume it with the program that wrote it."
            )
        for name, part in self.parts.items():
            try:
                _load(part, states[name])
            except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise RunError(
                    f"the checkpoint of step {step} does not fit: {name}: {' '.join(str(error).split())[:200]}. "
                    "Resume with the settings, the program and the version that wrote it."
                ) from None


def _load(part: Any, state: Any) -> None:
    """Give a part its state; an optimizer keeps the settings it was built with, which --force may have changed.

    A gradient scaler takes none from where nothing was scaled, in bf16 or fp32, and finds its scale anew.
    """
    if isinstance(part, torch.amp.GradScaler) and not state:
        return
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(state)
        return
    names = getattr(part, "given", ("weight_decay",))
    own = [{name: group[name] for name in names if name in group} for group in part.param_groups]
    part.state.clear()  # a run that goes back has moments already, and two of each would be in memory at once
    part.load_state_dict(state)
    for group, settings in zip(part.param_groups, own, strict=True):
        group.update(settings)
    # A checkpoint holds numbers in the order of their places, and fused optimizers take those of a moment and of its
    # weight, which may be channels_last, as they lie in memory.
    for parameter, moments in part.state.items():
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape and moment.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype, device=moment.device).copy_(moment)


def _two_moments(shape: Sequence[int]) -> int:
    """Bytes of AdamW's moments of a weight."""
    return 8 * math.prod(shape)


def flatten_state(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a tree of dicts, lists, tuples, numbers, texts and tensors, and the rest of it as JSON.

    A tensor's name is its path in the tree. Raises RunError for what neither format can hold.
    """
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            if node.numel() == 0:  # which a safetensors file of ours does not hold
                return {"empty": [list(node.shape), dtype_name(node.dtype)]}
            name = path
            while name in tensors:  # 1 and "1" are two keys of a dict and one path
                name += "'"
            tensors[name] = node.detach()
            return {"tensor": name}
        if isinstance(node, Mapping):
            return {"dict": [[visit(key, path), visit(value, f"{path}/{key}")] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            kind = "list" if isinstance(node, list) else "tuple"
            return {kind: [visit(value, f"{path}/{place}") for place, value in enumerate(node)]}
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise RunError(f"{path or 'the state'} is a {type(node).__name__}, which a checkpoint cannot hold.")

    return tensors, visit(tree, "")


def unflatten_state(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The tree that `pack` took apart. Tensors are copies: a checkpoint's file may be pruned while they live."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind == "empty":
        shape, dtype = content
        kind = getattr(torch, dtype)
        if 0 not in shape or not isinstance(kind, torch.dtype):
            raise ValueError("an empty tensor that is none")
        return torch.empty(shape, dtype=kind)
    if kind == "dict":
        return {unflatten_state(tensors, key): unflatten_state(tensors, value) for key, value in content}
    values = [unflatten_state(tensors, value) for value in content]
    return values if kind == "list" else tuple(values)


_FILES = ("state.safetensors", "state.json")
_MANIFEST = "manifest.json"
_FORMAT = 1
_STEP = re.compile("[0-9]{6,15}")


class NotFiniteError(RunError):
    """A state with NaN or Inf in it, which no checkpoint holds."""


class Checkpoints:
    """The checkpoints of one run. keep: how many stay, at least two."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, max(2, keep)
        self._verified: dict[int, tuple[Stamp, ...]] = {}

    def steps(self) -> list[int]:
        """The steps that have a directory, valid or not, oldest first; what is called otherwise is none of ours."""
        if not self.folder.is_dir():
            return []
        found = (int(path.name) for path in self.folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir())
        return sorted(step for step in found if self.path(step).is_dir())

    def path(self, step: int) -> Path:
        return self.folder / f"{step:06d}"

    def save(self, step: int, state: Any) -> Path:
        """Write, verify, then prune.

        Raises NotFiniteError for a state with NaN or Inf, RunError with the reason for a disk that does not take it;
        earlier checkpoints stay as they were.
        """
        tensors, rest = flatten_state(state)
        broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
        if broken:
            raise NotFiniteError(f"the state of step {step} is not finite ({broken[0]})")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            require_disk_space(self.folder, bytes_of(state))
            # There is one of this step where a run was rolled back, or resumed from further back.
            with atomic_folder(self.path(step)) as temporary:
                # What is sealed is what was meant to be written: a disk that drops bytes in silence is found out below.
                sealed = {"state.json": _write(temporary / "state.json", {"state": rest, "tensors": sorted(tensors)})}
                if tensors:
                    write_tensors(temporary / "state.safetensors", tensors)
                    sealed["state.safetensors"] = _seal_of(tensors)
                _write(temporary / _MANIFEST, {"format": _FORMAT, "step": step, "files": sealed})
                problem = _problem(temporary, step)
                if problem:
                    raise FileError(f"it does not read back as written: {problem}")
            fsync_path(self.folder)
        except (OSError, FileError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise RunError(f"the checkpoint of step {step} could not be written: {reason.rstrip('.')}") from None
        self._prune(step)
        return self.path(step)

    def problem(self, step: int) -> str | None:
        """What is wrong with the checkpoint of `step`; None if every byte is as it was written."""
        return _problem(self.path(step), step)

    def newest(self) -> tuple[int | None, list[str]]:
        """The newest step that verifies, and a line on each newer one that does not."""
        passed: list[str] = []
        for step in reversed(self.steps()):
            problem = self.problem(step)
            if problem is None:
                return step, passed
            passed.append(f"{self.path(step)} was passed over: {problem}.")
        return None, passed

    def load(self, step: int) -> Any:
        """The state saved at `step`, whose checkpoint has been verified."""
        place = self.path(step)
        try:
            content = json.loads((place / "state.json").read_bytes())
            file = place / "state.safetensors"
            return unflatten_state(read_tensors(file) if content["tensors"] else {}, content["state"])
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, FileError) as error:
            raise RunError(f"{place} cannot be read ({error}). Remove it to resume from an earlier one.") from None

    def drop_after(self, step: int) -> None:
        """Remove checkpoints of later steps: a run that goes on from here will write its own."""
        for later in self.steps():
            if later > step and self._is_ours(later):
                try:
                    shutil.rmtree(self.path(later))
                except OSError as error:
                    raise RunError(
                        f"{self.path(later)} is of another course of this run and cannot be removed "
                        f"({error.strerror}); remove it, then resume."
                    ) from None

    def _prune(self, newest: int) -> None:
        """Remove all but the newest `keep` that verify, once that many do."""
        self._verified[newest] = self._stamps(newest)
        valid = list(islice(filter(self._is_whole, reversed(self.steps())), self.keep))
        if len(valid) < self.keep:
            return
        for step in self.steps():
            if step < min(valid) and self._is_ours(step):
                shutil.rmtree(self.path(step), ignore_errors=True)

    def _is_ours(self, step: int) -> bool:
        """Whether it is a checkpoint, be it a broken one, and may be removed. Others call folders by numbers, too, such
        as photographs by their day, and a run folder from somewhere else may have a link to these here."""
        try:
            names = {path.name for path in self.path(step).iterdir()}
        except OSError:
            return False
        return _MANIFEST in names or names <= set(_FILES)

    def _is_whole(self, step: int) -> bool:
        """Whether the checkpoint verifies; what has and was not touched since is not read again, it may be 10 GB."""
        found = self._stamps(step)
        if found and self._verified.get(step) == found:
            return True
        whole = self.problem(step) is None
        if whole:
            self._verified[step] = found
        return whole

    def _stamps(self, step: int) -> tuple[Stamp, ...]:
        try:
            return tuple(stamp(path.stat()) for path in sorted(self.path(step).iterdir()))
        except OSError:
            return ()

    def _clear_leftovers(self) -> None:
        """Remove what a killed process was writing; the run's lock says that nobody else writes here."""
        for path in self.folder.glob(".*.part"):
            shutil.rmtree(path, ignore_errors=True)


def bytes_of(state: Any) -> int:
    """What a checkpoint of this state takes on the disk, nearly."""
    tensors, rest = flatten_state(state)
    return sum(tensor.nbytes for tensor in tensors.values()) + len(json.dumps(rest)) + 200 * len(tensors)


def _problem(place: Path, step: int) -> str | None:
    try:
        manifest = json.loads((place / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT or manifest["step"] != step:
            return f"its manifest is of format {manifest['format']!r:.20} and step {manifest['step']!r:.20}"
        if not manifest["files"].keys() >= {"state.json"}:
            return "its manifest is broken"
        for name, sealed in manifest["files"].items():
            if name not in _FILES:
                return f"its manifest names {name!r:.60}"
            found = _seal(place / name)
            if found["bytes"] != sealed["bytes"]:
                return f"{name} has {found['bytes']:,} bytes, {sealed['bytes']:,} were written"
            if found != sealed:
                return f"{name} has another sha256 than what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"not readable ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its manifest is broken"
    return None


def _write(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write JSON through to the disk; returns the seal of what was to be written."""
    blob = json.dumps(content).encode()
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}


def _seal(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _seal_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The seal of the file that `write_tensors` makes of them, from memory."""
    head = header_bytes(tensors, {})
    digest = hashlib.sha256(head)
    for name in ordered(tensors):
        digest.update(raw_bytes(tensors[name]))
    return {"bytes": len(head) + sum(t.nbytes for t in tensors.values()), "sha256": digest.hexdigest()}
