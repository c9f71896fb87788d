"""Ranks beside the layers that have them, and what rank layers have room for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sfumato.adapters.whole import Host
from sfumato.errors import AdapterError
from sfumato.numerals import pluralize


@dataclass(frozen=True)
class Ranked:
    """Layers of one rank, which `option` gave; what: they are called."""

    option: str
    rank: int
    what: str
    hosts: Sequence[Host]


def ranked(parts: Mapping[str, Mapping[str, Host]], rank: int, conv_rank: int | None = None) -> list[Ranked]:
    """The layers by their rank. parts, conv_rank: as of `attach`.

    Raises AdapterError where no layer has the convolutions' rank.
    """
    every = [host for some in parts.values() for host in some.values()]
    if conv_rank is None:
        return [Ranked("--rank", rank, "layer", every)]
    wide = [host for host in every if is_spatial(host)]
    if not wide:
        raise AdapterError(
            "--conv-rank and --conv-alpha are for convolutions of more than 1x1, and none is adapted; add --targets "
            "everything, or leave them out."
        )
    others = [host for host in every if not is_spatial(host)]
    of_others = [Ranked("--rank", rank, "layer", others)] if others else []
    return [*of_others, Ranked("--conv-rank", conv_rank, "convolution", wide)]


def is_spatial(host: Host) -> bool:
    """Whether the layer is a convolution of more than 1x1, which is what has conv_dim in sd-scripts."""
    return isinstance(host, nn.Conv2d) and math.prod(host.kernel_size) > 1


def narrow_notes(some: Ranked) -> list[str]:
    """A line on the layers that are narrower than their rank.

    Raises AdapterError where all are: the update would hold more numbers than the layers, and learn no more.
    """
    widths = [min(host.weight.shape[0], host.weight[0].numel()) for host in some.hosts]
    narrow = [width for width in widths if width < some.rank]
    if len(narrow) == len(widths):
        raise AdapterError(
            f"{some.option} {some.rank}: the widest {some.what} has {max(widths)} directions, and a change of it no "
            "more; wanted at most that, of which 4 to 128 is usual."
        )
    if not narrow:
        return []
    are, least, most = "is" if len(narrow) == 1 else "are", min(narrow), max(narrow)
    between = f"{least}" if least == most else f"{least} to {most}"
    return [
        f"{some.option} {some.rank}: {len(narrow)} of {pluralize(len(widths), some.what)} {are} narrower ({between}), "
        "where it takes memory and learns no more"
    ]
