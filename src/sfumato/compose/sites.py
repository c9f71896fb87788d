"""The places that a mix changes, each within its weight or beside its layer, brought to new numbers together.

What a mix refuses before it changes anything: layers that are compiled, offloaded, or in another's mix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.adapters.weights import Adapter, Weight, check_adapters, weight_at
from sfumato.compose.layers.fused import Applied, FusedWeight
from sfumato.compose.layers.lowrank import Scratch
from sfumato.compose.layers.modules import Beside
from sfumato.compose.layers.original_weights import OriginalWeights
from sfumato.compose.layers.unfused import UnfusedLayer
from sfumato.compose.match import MatchedWeight, compiled_parts
from sfumato.errors import AdapterError
from sfumato.files.module_names import DENOISERS
from sfumato.precision import quantization
from sfumato.precision.cpu_matmul import exact_matmul

Site = FusedWeight | UnfusedLayer


def make_site(found: MatchedWeight, part: nn.Module) -> Site:
    """A site without adapters for a weight or bias of this part of the pipeline, or for a module's answers."""
    if found.name == Beside.name:
        return Beside(found.part, found.path, found.module)
    if not found.live:
        return FusedWeight(found.part, found.path, found.module, found.name)
    whole = next((p for p in part.parameters() if p.is_floating_point() and p.itemsize > 1), None)
    dtype, device = (torch.float32, torch.device("cpu")) if whole is None else (whole.dtype, whole.device)
    device = torch.device("cpu") if device.type == "meta" else device
    return UnfusedLayer(found.part, found.path, found.module, dtype, device)


def applied_weights(site: Site, weights: Mapping[str, Weight], factors: Mapping[str, float]) -> Applied:
    """What a site has of these adapters. factors: of the weights in the U-Net, by label."""
    denoises = site.part in DENOISERS
    numbers = {
        label: weight_at(weights[label], site.part, site.path) * (factors.get(label, 1.0) if denoises else 1)
        for label in sorted(site.effects)
        if label in weights
    }
    return tuple((label, number) for label, number in numbers.items() if number != 0)


class SiteChange(NamedTuple):
    """What a site is to have. applied: of the adapters, in each call; aside: in its place within `exchange`, None where
    nothing is held for that.

    Of the adapter `line` alone, weights {"line": 0.8} and factors {"line": 2 / 7.5}, as adapter guidance 2 at a
    guidance of 7.5 has them:

        in the U-Net           applied (("line", 0.2133),), aside (): the base alone
        in the text encoder    applied (("line", 0.8),), aside None

    With another adapter, {"line": 0.8, "otter": 0.5}, which no factor names, the U-Net has both applied and
    (("otter", 0.5),) aside.
    """

    site: Site
    applied: Applied
    aside: Applied | None

    @classmethod
    def to(cls, site: Site, weights: Mapping[str, Weight], factors: Mapping[str, float]) -> SiteChange:
        """The change that brings the site to these weights. factors: as in `applied_at`."""
        applied = applied_weights(site, weights, factors)
        if site.part not in DENOISERS or factors.keys().isdisjoint(site.effects):
            return cls(site, applied, None)
        unfactored = {label: weight for label, weight in weights.items() if label not in factors}
        return cls(site, applied, applied_weights(site, unfactored, {}))

    @property
    def rewrites(self) -> bool:
        """Whether the site has other adapters applied so far."""
        return self.applied != self.site.applied

    @property
    def changes_anything(self) -> bool:
        """Whether it has others applied, or aside. What is held aside is made anew where the rest is rewritten."""
        return self.rewrites or self.aside != self.site.other


def apply_changes(changes: Sequence[SiteChange], originals: OriginalWeights) -> None:
    """Bring each site to what it is to have; all of it, or nothing when it raises."""
    rewriting = [change for change in changes if change.rewrites]
    for change in rewriting:
        change.site.check_untouched()
    new = [
        site for site, applied, _ in rewriting if isinstance(site, FusedWeight) and site.original is None and applied
    ]
    held = originals.of({site.place: site.weight for site in new})
    for site in new:
        found = held[site.place]
        site.original, site.candidates = (found, ()) if isinstance(found, Tensor) else (None, found)
    scratch = Scratch()
    aside_before = [(change.site, change.site.other) for change in changes]
    bare = [change.site for change in rewriting if isinstance(change.site, UnfusedLayer) and change.site.is_bare]
    rewritten: list[tuple[Site, Applied]] = []
    with torch.no_grad(), exact_matmul():
        try:
            for change in rewriting:
                rewritten.append((change.site, change.site.applied))
                change.site.apply(change.applied, scratch)
            for change in changes:
                change.site.set_aside(change.aside, scratch)
        except BaseException:
            for each, before in reversed(rewritten):
                each.apply(before, scratch)
            for each, before_aside in aside_before:
                each.set_aside(before_aside, scratch)
            for site in new:
                site.restore()
            for live in bare:
                live.restore()
            raise


def refuse_new_paths_in_compiled(pipe: Any, sites: Iterable[UnfusedLayer]) -> None:
    """Of layers that are to get a path beside them, or another: refuse those that are compiled already."""
    changed = list(sites)
    compiled = compiled_parts(pipe) if changed else set()
    for site in changed:
        if site.part in compiled:
            raise AdapterError(
                f"the {site.part} is compiled already, and a compiled layer does not notice a new path beside it. "
                "Compose the live way before torch.compile, or say way='baked'."
            )


def refuse_offloaded(parts: Mapping[str, nn.Module], sites: Iterable[Site]) -> None:
    """Refuse weights that are to be written to and lie on a disk."""
    for name in sorted({site.part for site in sites if isinstance(site, FusedWeight)}):
        if "disk" in quantization.group_offloading(parts[name]):
            raise AdapterError(
                f"the {name} is offloaded to disk in groups, where its weights cannot be written to. Offload it "
                "without offload_to_disk_path, or say way='live' to compose."
            )


def refuse_replaced(parts: Mapping[str, nn.Module], sites: Iterable[Site]) -> None:
    """Refuse weights of layers that their part does not hold any more, where neither a mix nor undoing it shows."""
    baked = [site for site in sites if isinstance(site, FusedWeight)]
    held = {id(module) for name in {site.part for site in baked} for module in parts[name].modules()}
    for site in baked:
        if id(site.module) not in held:
            raise AdapterError(
                f"the {site.part} has another {site.path} than the one that this mix is in, perhaps quantised since. "
                "Put the layer back, or load the base again and compose after that."
            )


def refuse_taken(labels: Iterable[str], adapters: Sequence[Adapter]) -> None:
    """Refuse new adapters whose labels are taken, by these or by one another."""
    taken = list(labels)
    check_adapters(adapters)
    for adapter in adapters:
        if adapter.label in taken:
            raise AdapterError(
                f"two adapters are called {adapter.label!r}. Tell them apart with Adapter(file, weight, name=...)."
            )
        taken.append(adapter.label)
