"""What files of adapters ask for that are distilled for few steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.files.metadata import Sampling, sampling_of
from sfumato.files.peft_folder import adapter_sources, is_adapter_folder
from sfumato.weighting.adapter import Adapter


def samplings_asked(adapters: Iterable[Adapter]) -> dict[str, Sampling]:
    """What the files of these adapters ask for, by label and in their order; those that ask for nothing are left out.
    Of several the first counts."""
    found = {}
    for adapter in adapters:
        path = Path(adapter.path)
        is_file = path.suffix == ".safetensors" and path.is_file()
        sources = adapter_sources(path) if is_file or is_adapter_folder(path) else []
        for asked in filter(None, (sampling_of(source.header.metadata) for source in sources)):
            found[adapter.label] = asked
    return found


def with_sampling(settings: Mapping[str, Any], asked: Sampling) -> dict[str, Any]:
    """The settings with what is asked for where they have None."""
    return {**settings, **{name: value for name, value in asdict(asked).items() if settings[name] is None}}


def overruled(asked: Mapping[str, Sampling]) -> list[str]:
    """A line on each adapter that asks for something else than the first of them."""
    if not asked:
        return []
    (first, counts), *others = asked.items()
    return [
        f"{label}: asks for {each}, but {first} counts, which is named before it. Name {label} first, or give "
        "--sampler, --steps and --guidance."
        for label, each in others
        if each != counts
    ]
