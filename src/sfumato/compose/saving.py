"""A mix as one LoRA file: sum of w_i s_i up_i down_i is the product of the factors side by side, exactly.

The mix in words: a line on how it is applied, and a table of its adapters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from sfumato.adapters.weights import Weight, format_weight, public_name, weight_at
from sfumato.compose.layers.fused import FusedWeight
from sfumato.compose.layers.unfused import UnfusedLayer
from sfumato.compose.match import ApplyMode
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import AdapterFile, merge_embeddings
from sfumato.files.header import checked_path
from sfumato.files.kinds import LoraModule, ModuleAdapter
from sfumato.files.module_names import DENOISERS, Target
from sfumato.files.writing.kohya import write_lora
from sfumato.merging.extract import diffusers_warnings
from sfumato.merging.factors import Factors, concatenate, to_module
from sfumato.merging.sources import Parent, adapter_hash, merged_metadata
from sfumato.utils.formatting import pluralize


def save_mix(
    path: str | os.PathLike[str],
    family: str,
    sites: Iterable[FusedWeight | UnfusedLayer],
    weights: Mapping[str, Weight],
    files: Mapping[str, AdapterFile],
    dtype: torch.dtype,
    title: str | None,
) -> Path:
    """Write the weighted sum of the adapters as one LoRA; returns the path. Says on stderr what diffusers does not read
    of it.

    weights: by label, 0 for what is left out. New words that come with the adapters are bundled with it.
    Raises AdapterError for changes that have no low-rank form, for words that contradict, and for a name, title or
    dtype that no such file has; FileError for a file that cannot be written.
    """
    path = checked_path(path)
    if path.suffix != ".safetensors":
        raise AdapterError(f"a mix is saved as a .safetensors file, got {str(path)!r}; give a name that ends so.")
    if title is not None and not isinstance(title, str):
        raise AdapterError(f"a title is a text, got {title!r:.40}.")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise AdapterError(f"a mix is saved in torch.float32, float16 or bfloat16, not in {dtype!r:.40}.")
    modules: dict[Target, LoraModule] = {}
    for site in sites:
        numbers = {label: weight_at(weights[label], site.part, site.path) for label in sorted(site.effects)}
        terms = []
        for label, number in numbers.items():
            if number == 0:
                continue
            effect = site.effects[label]
            if isinstance(effect.change, ModuleAdapter):
                raise AdapterError(
                    f"{label} is a {effect.change.kind} adapter, which changes no weight, so the mix is no LoRA. Mute "
                    "or remove it to save the others, and mix its own file beside what is saved."
                )
            if effect.low_rank is None:
                what = effect.change.kind if site.name == "weight" else f"{effect.change.kind} with biases"
                raise AdapterError(
                    f"{label} is a {what}, which has no low-rank form at {site.part} {site.path}, so the mix is no "
                    "LoRA. Mute or remove it, or bake the mix into a checkpoint."
                )
            terms.append((number, effect.low_rank))
        if terms:
            modules[site.part, site.path] = concatenate_loras(terms)
    if not modules:
        raise AdapterError(f"{path.name}: nothing is applied, so there is nothing to save. Give an adapter a weight.")
    used = {label: weight for label, weight in weights.items() if weight != 0}
    parents = [
        Parent(public_name(file.path), adapter_hash(file.path), file.metadata, file.family, weight)
        for file, weight in ((files[label], weight) for label, weight in used.items())
    ]
    metadata = merged_metadata(parents, title=title or path.stem, family=family)
    words = merge_embeddings({label: files[label].embeddings for label in used})
    written = write_lora(path, modules, family=family, metadata=metadata, dtype=dtype, words=words)
    for line in diffusers_warnings(written, modules):
        print(line, file=sys.stderr)
    return written


def concatenate_loras(terms: Iterable[tuple[float, LoraModule]]) -> LoraModule:
    """The LoRA of scale 1 whose update is the sum of weight * update over the terms; its rank is the sum of theirs."""
    terms = list(terms)
    factors = [
        Factors(low.up.flatten(1).float() * (number * low.scale), low.down.flatten(1).float()) for number, low in terms
    ]
    # One may be written for a linear layer and one for the 1x1 convolution that it is.
    return to_module(concatenate(factors), max((low.shape for _, low in terms), key=len))


_HEAD = ("adapter", "weight", "file", "kind", "rank", "U-Net", "text", "way")


def apply_reason(ways: Sequence[str], asked: ApplyMode) -> str:
    """How the adapters are applied, and why. ways: "baked", "live" or "beside" of each weight, layer or module; asked:
    of `compose`."""
    baked, live, beside = (sum(way == each for way in ways) for each in ("baked", "live", "beside"))
    modules = f"{pluralize(beside, 'module')} with adapters beside {'it' if beside == 1 else 'them'}" if beside else ""
    if beside and not (baked or live):
        return modules
    if beside:
        return f"{apply_reason([way for way in ways if way != 'beside'], asked)}; {modules}"
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


def mix_table(
    weights: Mapping[str, Weight],
    muted: frozenset[str],
    files: Mapping[str, AdapterFile],
    sites: Iterable[tuple[str, FusedWeight | UnfusedLayer]],
    reason: str,
) -> str:
    """A line for each adapter: its weight, file, kinds, ranks, how many modules of each part it changes, and the way.

    weights: by label. sites: (label, weight or bias that it changes).
    """
    if not weights:
        return "an empty mix"
    by_label: dict[str, list[FusedWeight | UnfusedLayer]] = {label: [] for label in weights}
    for label, site in sites:
        if site.name != "bias":
            by_label[label].append(site)
    rows = [_HEAD]
    for label, weight in weights.items():
        found = by_label[label]
        unet = sum(site.part in DENOISERS for site in found)
        low = [form.rank for site in found if (form := site.effects[label].low_rank) is not None]
        ranks = "" if not low else str(min(low)) if min(low) == max(low) else f"{min(low)}-{max(low)}"
        rows.append(
            (
                " ".join(label.split()),
                format_weight(weight) + (" (muted)" if label in muted else ""),
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
