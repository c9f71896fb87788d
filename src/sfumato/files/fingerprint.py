"""What an adapter does to the weights, in a few numbers a module: whether two files are the same adapter.

A hash is of bytes and changes with every dtype and dialect. A fingerprint is of the deltas: for each module its norm
and y' delta x for a few random x and y that depend on nothing but the module's name. Of an error E of the delta the
probes see y' E x, whose mean square is the squared norm of E; so what rounding does to a delta, and what another delta
is, can be told apart from a few kilobytes in the metadata.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import FileError
from sfumato.files.kinds import Change, LoraModule, ModuleAdapter
from sfumato.files.kinds.base import weight_independent_delta
from sfumato.files.kinds.ia3 import changes_weight
from sfumato.files.module_names import Target
from sfumato.utils import randomness
from sfumato.utils.formatting import pluralize

FINGERPRINT_KEY = "sfumato.fingerprint"
"""Where it stands in a file's metadata."""
PROBES = 3
TOLERANCE = 0.01
"""Root mean square of the relative errors of all modules; saving in bf16, the coarsest dtype in use, makes 0.0025."""
WORST = 10
"""A single module may be off by so many tolerances: of 1,000 modules some probe sees several times its mean."""
_VERSION = "1"
_NEGLIGIBLE = 1e-3
"""Modules far below the mean norm are compared with this share of it: a half's rounding is all of them."""

Row = tuple[float, ...]
"""(norm, probe, probe, probe) of one module."""


@dataclass(frozen=True)
class Comparison:
    """How far two adapters are apart. rms: of the modules' relative errors; worst: the largest, and its module.

    missing, extra: modules that only the first, only the second has.
    """

    rms: float
    worst: float
    module: str
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def same(self, tolerance: float = TOLERANCE) -> bool:
        """Whether it is one adapter, but for rounding."""
        return not self.missing and not self.extra and self.rms <= tolerance and self.worst <= WORST * tolerance

    def reason(self, tolerance: float = TOLERANCE) -> str:
        """One line on the difference, or on the lack of one."""
        if self.missing or self.extra:
            first = (self.missing or self.extra)[0]
            return f"{pluralize(len(self.missing), 'module')} missing and {len(self.extra)} new, first {first}"
        figures = f"relative error {self.rms:.2g} over all modules, {self.worst:.2g} in {self.module}"
        return f"{figures}; at most {tolerance:g} and {WORST * tolerance:g} are rounding"


def module_name(target: Target) -> str:
    """The module's name whichever transformers version spells it: `text_model.` is no part of it."""
    part, path = target
    return f"{part}.{path.removeprefix('text_model.')}"


def probe_rows(modules: Mapping[Target, LoraModule | Tensor]) -> dict[str, Row]:
    """The numbers of each module by its name. A module is a LoRA, or a delta (out,), (out, in), (out, in, h, w)."""
    return {module_name(target): _row(module_name(target), module) for target, module in modules.items()}


def _row(name: str, module: LoraModule | Tensor) -> Row:
    return _row_of_lora(name, module.plain()) if isinstance(module, LoraModule) else _row_of_delta(name, module)


def _row_of_lora(name: str, module: LoraModule) -> Row:
    """From the factors, which are much smaller than the delta."""
    up, down = (factor.detach().cpu().double().flatten(1) for factor in (module.up, module.down))
    up = up * module.scale
    squared_norm = float(((up.T @ up) * (down @ down.T)).sum())
    ys, xs = _probes(name, up.shape[0], down.shape[1])
    return (math.sqrt(max(squared_norm, 0.0)), *((ys @ up) * (xs @ down.T)).sum(1).tolist())


def _row_of_delta(name: str, delta: Tensor) -> Row:
    matrix = delta.detach().cpu().double().reshape(delta.shape[0] if delta.ndim else 1, -1)
    ys, xs = _probes(name, *matrix.shape)
    return (float(matrix.norm()), *((ys @ matrix) * xs).sum(1).tolist())


def _probes(name: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The y (PROBES, rows) and x (PROBES, columns) of a module."""
    draws = randomness.generator(0, f"fingerprint/{name}")
    ys = torch.randn(PROBES, rows, generator=draws).double()
    return ys, torch.randn(PROBES, columns, generator=draws).double()


def fingerprint(modules: Mapping[Target, LoraModule | Tensor]) -> str:
    """The text for the metadata: 16 bytes a module, in the order of the names, and a digest of the names.

    Raises FileError for a change that is larger than fp32, in which it would be applied, can hold.
    """
    return fingerprint_of_rows(probe_rows(modules))


def fingerprint_of_rows(found: Mapping[str, Row]) -> str:
    """The same of what `probe_rows` gave."""
    names = sorted(found)
    limit = torch.finfo(torch.float32).max
    for name in names:
        if any(abs(value) > limit for value in found[name]):
            raise FileError(
                f"{name}: its change has the norm {found[name][0]:.3g}, more than fp32 holds, so the file was not "
                "written. Use smaller weights, or an earlier save."
            )
    values = np.array([found[name] for name in names], "<f4")
    return f"{_VERSION}:{_digest(names)}:{base64.b64encode(values.tobytes()).decode()}"


def probed_delta(change: Change, weight: Tensor | None = None) -> LoraModule | Tensor | None:
    """What a fingerprint looks at in a change: `known_delta`, but None for a vector, such as a norm's, which none
    holds."""
    delta = known_delta(change, weight)
    return None if isinstance(delta, Tensor) and delta.ndim < 2 else delta


def known_delta(change: Change, weight: Tensor | None = None) -> LoraModule | Tensor | None:
    """What a change adds to its module's weight: its low-rank form where it has one, else its delta.

    weight: the pristine one. None where nothing is added, and where that depends on a weight that is not given.
    """
    low_rank = change.low_rank()
    if low_rank is not None:
        return low_rank
    if not changes_weight(change):
        return None
    # Without the weight a kernel may lie within the columns, where the probes have it in any case.
    return weight_independent_delta(change) if weight is None else change.delta(weight)


def fingerprint_with_weights(changes: Mapping[Target, Change], weights: Mapping[Target, Tensor]) -> str:
    """The same of changes of any kind, of which those that have no low rank are formed one at a time. weights: the
    pristine ones."""
    found: dict[str, Row] = {}
    for target, change in changes.items():
        if isinstance(change, ModuleAdapter):
            found |= rows_of_tensors(target, change)
            continue
        module = probed_delta(change, weights[target])
        found |= {} if module is None else probe_rows({target: module})
    return fingerprint_of_rows(found)


def rows_of_tensors(target: Target, adapter: ModuleAdapter) -> dict[str, Row]:
    """The numbers of an adapter that changes no weight: of each of its tensors, as if that were a delta."""
    part, path = target
    return probe_rows({(part, f"{path}.{role}"): value for role, value in adapter.tensors().items()})


def _digest(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def verify(metadata: Mapping[str, str], changes: Mapping[Target, Change], file: str) -> None:
    """Raise FileError unless a file's changes are those that the fingerprint in its metadata was taken of.

    Also for a file without one, and for kinds whose delta cannot be told without a base.
    """
    if FINGERPRINT_KEY not in metadata:
        raise FileError(f"{file}: it states no fingerprint, so it cannot be verified. Leave verify out for it.")
    rows: dict[str, Row] = {}  # one delta at a time: all of them may be as large as the model
    for target, change in changes.items():
        if isinstance(change, ModuleAdapter):
            rows |= rows_of_tensors(target, change)
            continue
        module = probed_delta(change)
        if module is None and change.needs_weight:
            raise FileError(
                f"{file}: {change.kind} in {'.'.join(target)} cannot be verified without its base. "
                "Use sfumato verify --base."
            )
        if module is not None:
            rows |= probe_rows({target: module})
    found = check_rows(metadata[FINGERPRINT_KEY], rows, file)
    if not found.same():
        raise FileError(f"{file}: it is not the adapter that was written: {found.reason()}. Take it from its source.")


def check_rows(stated: str, found: Mapping[str, Row], file: str) -> Comparison:
    """What `probe_rows` gave of a file's modules, beside the fingerprint that it states.

    Raises FileError for a fingerprint that is not readable, or is one of other modules.
    """
    names = sorted(found)
    version, _, rest = stated.partition(":")
    digest, _, text = rest.partition(":")
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(-1, 1 + PROBES)
    except ValueError:
        values = np.empty((0, 1 + PROBES), "<f4")
    if version != _VERSION or not len(values) or not np.isfinite(values).all():
        raise FileError(f"{file}: its fingerprint is not readable by this version; compare with --against the source.")
    if digest != _digest(names):
        raise FileError(
            f"{file}: its fingerprint is of {len(values)} modules, the file has {len(names)}, not the same ones. "
            "Modules were added or taken out after it was written."
        )
    return compare(dict(zip(names, (tuple(map(float, row)) for row in values), strict=True)), found)


def compare(first: Mapping[str, Row], second: Mapping[str, Row]) -> Comparison:
    """How far the second adapter is from the first; both as `probe_rows` gives them."""
    missing, extra = sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return Comparison(math.inf, math.inf, "", tuple(missing), tuple(extra))
    floor = _NEGLIGIBLE * math.sqrt(sum(first[name][0] ** 2 for name in shared) / len(shared))
    squares = {}
    for name in shared:
        scale = max(first[name][0], second[name][0], floor)
        apart = sum((a - b) ** 2 for a, b in zip(first[name][1:], second[name][1:], strict=True)) / PROBES
        norms = (first[name][0] - second[name][0]) ** 2
        squares[name] = max(apart, norms) / scale**2 if scale > 0 else 0.0
    worst = max(shared, key=lambda name: squares[name])
    rms = math.sqrt(sum(squares.values()) / len(squares))
    return Comparison(rms, math.sqrt(squares[worst]), worst, tuple(missing), tuple(extra))
