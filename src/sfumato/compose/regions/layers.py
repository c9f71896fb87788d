"""What each region changes in each layer of the U-Net, at the current step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from sfumato.adapters.weights import Adapter
from sfumato.compose.hooks import calling_pipeline
from sfumato.compose.layers.modules import Placed
from sfumato.compose.match import PipelineModules, unwrapped_parts, weighted_matches
from sfumato.compose.regions.region import DeviceCache, Region
from sfumato.compose.schedules import Ramp, is_pair, progress_of
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import AdapterFile
from sfumato.files.fingerprint import verify as verify_deltas
from sfumato.files.kinds.ia3 import extract_command
from sfumato.files.module_names import DENOISERS
from sfumato.merging.whole_model import read_adapter_or_model
from sfumato.models import calls
from sfumato.precision import quantization


class Spans:
    """Which adapters count at the current step. asked: the spans of those that `spans` does not name."""

    def __init__(
        self, pipe: Any, spans: Mapping[str, tuple[float, float]], asked: Mapping[str, tuple[float, float]]
    ) -> None:
        if not isinstance(spans, Mapping) or not all(map(is_pair, spans.values())):
            raise AdapterError(f"over_steps {spans!r:.60}: wanted (from, to) by label, such as {{'line': (0, 0.8)}}.")
        self._pipe = pipe
        self._ways = {label: Ramp.within(*span, 1.0) for label, span in {**asked, **spans}.items()}
        self._now: dict[str, float] = {}

    def on_unet_call(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note a call's step."""
        if self._ways:
            now = calls.timestep_of(args, options)
            progress = progress_of(now, calling_pipeline(self._pipe).scheduler)
            self._now = {label: way(progress) for label, way in self._ways.items()}

    def at(self, owner: str) -> float:
        """How much an adapter counts at this step."""
        return self._now.get(owner, 1.0)

    def gated(self, narrow: Tensor, owners: Sequence[str]) -> Tensor:
        """What `RegionChange.narrow` gave, 0 where its owner does not count at this step."""
        if all(self._now.get(owner, 1.0) == 1 for owner in owners):
            return narrow
        counts = torch.tensor([self._now.get(owner, 1.0) for owner in owners], device=narrow.device, dtype=narrow.dtype)
        return narrow * (counts[:, None, None] if narrow.ndim == 4 else counts)


@dataclass
class RegionChange:
    """One region's change of one layer.

    down: (rank, in, ...), up: (out, rank), the weights within it. owners: the label of each rank's adapter.
    """

    down: Tensor
    up: Tensor
    owners: list[str]
    spans: Spans

    def __post_init__(self) -> None:
        self._down, self._up = DeviceCache(self.down), DeviceCache(self.up)

    def narrow(self, module: nn.Module, x: Tensor) -> Tensor:
        """down x: (rows, tokens, rank), or (rows, rank, height, width) of a convolution."""
        down = self._down.like(x)
        if isinstance(module, nn.Conv2d):
            found = conv2d(x, down, None, module.stride, module.padding, module.dilation)
        else:
            found = linear(x, down)
        return self.spans.gated(found, self.owners)

    def widen(self, narrow: Tensor) -> Tensor:
        """up of what `narrow` gave."""
        up = self._up.like(narrow)
        return conv2d(narrow, up[..., None, None]) if narrow.ndim == 4 else linear(narrow, up)


RegionChanges = list[RegionChange | None]
"""By region."""


def read_region_adapters(parts: Sequence[Region], *, partial: bool, verify: bool) -> dict[Adapter, AdapterFile]:
    """The files of all regions' adapters, each once."""
    found = {}
    for adapter in dict.fromkeys(each for region in parts for each in region.adapters):
        file = found[adapter] = read_adapter_or_model(adapter.path, partial=partial)
        if verify:
            verify_deltas(file.metadata, file.changes, file.path.name)
    return found


@dataclass
class RegionModules:
    """The adapters beside one module, of kinds that change no weight: (region, weight, label, adapter)."""

    terms: list[tuple[int, float, str, Placed]]
    spans: Spans

    def now(self) -> list[tuple[int, float, Placed]]:
        """(region, weight at the current step, adapter)."""
        return [(place, number * self.spans.at(label), placed) for place, number, label, placed in self.terms]


def changes_by_layer(
    pipe: Any, parts: Sequence[Region], files: Mapping[Adapter, AdapterFile], spans: Spans, *, partial: bool
) -> tuple[dict[str, RegionChanges], dict[str, RegionModules]]:
    """By the path of a layer of the U-Net: what each region changes there, and what stands beside modules there."""
    modules = PipelineModules(unwrapped_parts(pipe))
    layers: dict[str, RegionChanges] = {}
    beside: dict[str, RegionModules] = {}
    for place, region in enumerate(parts):
        for adapter in region.adapters:
            for number, found in weighted_matches(adapter, files[adapter], modules, partial=partial):
                if found.part not in DENOISERS:
                    if region.prompt is None:
                        raise AdapterError(
                            f"{adapter.label} changes {found.part}, and its region has no prompt of its own. Give the "
                            "Region a prompt, or the adapter a weight (0.8, 0)."
                        )
                    continue
                if found.beside is not None:
                    there = beside.setdefault(found.path, RegionModules([], spans))
                    there.terms.append((place, number, adapter.label, Placed(found.beside)))
                    continue
                low = found.live_form
                if low is None:
                    raise AdapterError(
                        f"{adapter.label}: {found.path} is changed by a {found.effect.change.kind}, which has no "
                        "low-rank form to keep to a region. Make it a LoRA: "
                        f"{extract_command(found.effect.change)}."
                    )
                shape = quantization.module_weight_shape(found.module)
                assert shape is not None
                down = low.down.float().reshape(low.rank, *shape[1:])
                up = low.up.float().flatten(1) * (number * low.scale)
                paths = layers.setdefault(found.path, [None] * len(parts))
                owners = [adapter.label] * low.rank
                before = paths[place]
                if before is not None:
                    down, up = torch.cat([before.down, down]), torch.cat([before.up, up], dim=1)
                    owners = before.owners + owners
                paths[place] = RegionChange(down, up, owners, spans)
    return layers, beside
