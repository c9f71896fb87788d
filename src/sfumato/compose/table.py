"""The mix in words: a line on how it is applied, and a table of its adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sfumato.compose.baked import Baked
from sfumato.compose.live import Live
from sfumato.compose.match import Way
from sfumato.files.adapter_file import AdapterFile
from sfumato.numerals import pluralize
from sfumato.weighting.adapter import Weight, public_name, weight_text

_HEAD = ("adapter", "weight", "file", "kind", "rank", "U-Net", "text", "way")


def reason(ways: Sequence[str], asked: Way) -> str:
    """How the adapters are applied, and why. ways: "baked" or "live" of each weight or layer; asked: of `compose`."""
    baked = sum(way == "baked" for way in ways)
    live = len(ways) - baked
    if not live:
        whys = {
            "auto": "none is quantised, so this is exact, and drawing takes no longer",
            "baked": "as asked",
            "live": "there is no layer that a path could stand beside",
        }
        return f"{pluralize(baked, 'weight')} baked in place ({whys[asked]})"
    why = "as asked" if asked == "live" else "quantised, so nothing can be summed into their weights"
    rest = f"; {pluralize(baked, 'weight')} baked in place" if baked else ""
    return f"{pluralize(live, 'layer')} live, one path for all adapters beside each ({why}){rest}"


def show(
    weights: Mapping[str, Weight],
    muted: frozenset[str],
    files: Mapping[str, AdapterFile],
    sites: Iterable[tuple[str, Baked | Live]],
    reason: str,
) -> str:
    """A line for each adapter: its weight, file, kinds, ranks, how many modules of each part it changes, and the way.

    weights: by label. sites: (label, weight or bias that it changes).
    """
    if not weights:
        return "an empty mix"
    by_label: dict[str, list[Baked | Live]] = {label: [] for label in weights}
    for label, site in sites:
        if site.name == "weight":
            by_label[label].append(site)
    rows = [_HEAD]
    for label, weight in weights.items():
        found = by_label[label]
        unet = sum(site.part == "unet" for site in found)
        low = [form.rank for site in found if (form := site.effects[label].low_rank) is not None]
        ranks = "" if not low else str(min(low)) if min(low) == max(low) else f"{min(low)}-{max(low)}"
        rows.append(
            (
                " ".join(label.split()),
                weight_text(weight) + (" (muted)" if label in muted else ""),
                public_name(files[label].path),
                "+".join(files[label].kinds),
                ranks,
                str(unet),
                str(len(found) - unet),
                "+".join(sorted({site.way for site in found})),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, reason])
