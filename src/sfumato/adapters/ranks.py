"""Ranks beside the layers that have them, and what rank layers have room for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sfumato.adapters.by_layer import EQUAL, ByLayer, Rule
from sfumato.adapters.whole import Host
from sfumato.errors import AdapterError
from sfumato.numerals import pluralize


@dataclass(frozen=True)
class Ranked:
    """Layers of one rank, which `given` gave, such as "--rank 4". what: they are called."""

    given: str
    rank: int
    what: str
    hosts: Sequence[Host]


def ranked(
    parts: Mapping[str, Mapping[str, Host]], rank: int, conv_rank: int | None = None, by_layer: ByLayer = EQUAL
) -> list[Ranked]:
    """The layers by their rank. parts, conv_rank, by_layer: as of `attach`.

    Raises AdapterError where no layer has the convolutions' rank.
    """
    own: dict[Rule, list[Host]] = {}
    wide, others = list[Host](), list[Host]()
    for part, some in parts.items():
        for path, host in some.items():
            if (rule := by_layer.rank_at(part, path)) is not None:
                own.setdefault(rule, []).append(host)
            elif conv_rank is not None and is_spatial(host):
                wide.append(host)
            else:
                others.append(host)
    if conv_rank is not None and not wide:
        without = " without a --rank-of" if any(is_spatial(host) for some in own.values() for host in some) else ""
        raise AdapterError(
            f"--conv-rank and --conv-alpha are for convolutions of more than 1x1, and none is adapted{without}; add "
            "--targets everything, or leave them out."
        )
    found = [Ranked(f"--rank {rank}", rank, "layer", others)]
    found += [Ranked(f"--conv-rank {conv_rank}", conv_rank, "convolution", wide)] if conv_rank is not None else []
    found += [Ranked(str(rule), int(rule.value), "layer", hosts) for rule, hosts in own.items()]
    return [some for some in found if some.hosts]


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
            f"{some.given}: the widest {some.what} has {max(widths)} directions, and a change of it no "
            "more; wanted at most that, of which 4 to 128 is usual."
        )
    if not narrow:
        return []
    are, least, most = "is" if len(narrow) == 1 else "are", min(narrow), max(narrow)
    between = f"{least}" if least == most else f"{least} to {most}"
    return [
        f"{some.given}: {len(narrow)} of {pluralize(len(widths), some.what)} {are} narrower ({between}), "
        "where it takes memory and learns no more"
    ]
