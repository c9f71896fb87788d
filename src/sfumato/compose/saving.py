"""A mix as one LoRA file: sum of w_i s_i up_i down_i is the product of the factors side by side, exactly."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from sfumato.compose.baked import Baked
from sfumato.compose.live import Live
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import AdapterFile
from sfumato.files.changes import LoraModule
from sfumato.files.embedding_file import merge_embeddings
from sfumato.files.header import path_of
from sfumato.files.kohya import Target
from sfumato.files.write_kohya import write_lora
from sfumato.merging.convert import diffusers_warnings
from sfumato.merging.factors import Factors, concatenate, to_module
from sfumato.merging.lineage import Parent, merged_metadata
from sfumato.merging.sources import adapter_hash
from sfumato.weighting.adapter import Weight, public_name, weight_at


def save(
    path: str | os.PathLike[str],
    family: str,
    sites: Iterable[Baked | Live],
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
    path = path_of(path)
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
            if effect.low_rank is None:
                what = effect.change.kind if site.name == "weight" else f"{effect.change.kind} with biases"
                raise AdapterError(
                    f"{label} is a {what}, which has no low-rank form at {site.part} {site.path}, so the mix is no "
                    "LoRA. Mute or remove it, or bake the mix into a checkpoint."
                )
            terms.append((number, effect.low_rank))
        if terms:
            modules[site.part, site.path] = concatenated(terms)
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


def concatenated(terms: Iterable[tuple[float, LoraModule]]) -> LoraModule:
    """The LoRA of scale 1 whose update is the sum of weight * update over the terms; its rank is the sum of theirs."""
    terms = list(terms)
    factors = [
        Factors(low.up.flatten(1).float() * (number * low.scale), low.down.flatten(1).float()) for number, low in terms
    ]
    # One may be written for a linear layer and one for the 1x1 convolution that it is.
    return to_module(concatenate(factors), max((low.shape for _, low in terms), key=len))
