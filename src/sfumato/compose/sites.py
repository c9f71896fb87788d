"""The places that a mix changes, each within its weight or beside its layer, brought to new numbers together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sfumato.compose.baked import Applied, Baked
from sfumato.compose.live import Live
from sfumato.compose.lowrank import Scratch, exact_products
from sfumato.compose.match import MatchedWeight
from sfumato.compose.originals import Originals
from sfumato.weighting.adapter import Weight, weight_at

Site = Baked | Live


def new_site(found: MatchedWeight, part: nn.Module) -> Site:
    """A site without adapters for a weight or bias of this part of the pipeline."""
    if not found.live:
        return Baked(found.part, found.path, found.module, found.name)
    whole = next((p for p in part.parameters() if p.is_floating_point() and p.itemsize > 1), None)
    dtype, device = (torch.float32, torch.device("cpu")) if whole is None else (whole.dtype, whole.device)
    device = torch.device("cpu") if device.type == "meta" else device
    return Live(found.part, found.path, found.module, dtype, device)


def applied_at(site: Site, weights: Mapping[str, Weight], factors: Mapping[str, float]) -> Applied:
    """What a site has of these adapters. factors: of the weights in the U-Net, by label."""
    numbers = {
        label: weight_at(weights[label], site.part, site.path) * (factors.get(label, 1.0) if site.part == "unet" else 1)
        for label in sorted(site.effects)
        if label in weights
    }
    return tuple((label, number) for label, number in numbers.items() if number != 0)


def apply_changes(
    todo: Sequence[tuple[Site, Applied]], aside: Sequence[tuple[Site, Applied | None]], originals: Originals
) -> None:
    """Bring each site to its numbers and set others aside for `exchange`; all of it, or nothing when it raises."""
    for site, _ in todo:
        site.check_untouched()
    new = [site for site, applied in todo if isinstance(site, Baked) and site.original is None and applied]
    held = originals.of({site.place: site.weight for site in new})
    for site in new:
        found = held[site.place]
        site.original, site.candidates = (found, ()) if isinstance(found, Tensor) else (None, found)
    scratch = Scratch()
    earlier = [(site, site.other) for site, _ in aside]
    bare = [site for site, _ in todo if isinstance(site, Live) and site.is_bare]
    done: list[tuple[Site, Applied]] = []
    with torch.no_grad(), exact_products():
        try:
            for site, applied in todo:
                done.append((site, site.applied))
                site.apply(applied, scratch)
            for site, other in aside:
                site.set_aside(other, scratch)
        except BaseException:
            for site, before in reversed(done):
                site.apply(before, scratch)
            for site, before_aside in earlier:
                site.set_aside(before_aside, scratch)
            for site in new:
                site.restore()
            for live in bare:
                live.restore()
            raise
