"""How the mix of a drawing is applied: in the weights, or beside the layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sfumato.merging.whole_model import is_whole_model

if TYPE_CHECKING:
    from sfumato.bases import Base
    from sfumato.compose.match import Way
    from sfumato.weighting.adapter import Adapter


def way_for(base: Base, adapters: Iterable[Adapter], *, follows_steps: bool = False) -> Way:
    """The way to mix: "live" where that is the better one for these adapters on this base, else "auto".

    A new weight at every step costs least in a path beside the layers, and adapter guidance holds a second set of the
    weights that it changes, for which there is no room where parts are offloaded. Not of a whole model, whose path is
    as large as the U-Net and would be computed at each call.
    """
    is_beside = follows_steps or base.precision.offload is not None
    return "live" if is_beside and not any(is_whole_model(each.path) for each in adapters) else "auto"
