"""What files of adapters ask for that are distilled for few steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.files.header import read_header
from sfumato.files.metadata import Sampling, sampling_of
from sfumato.weighting.adapter import Adapter


def sampling_asked(adapters: Iterable[Adapter]) -> tuple[str, Sampling] | None:
    """The label of the first of these adapters whose file asks for a sampling, and what for; None where none does."""
    for adapter in adapters:
        path = Path(adapter.path)
        if path.suffix == ".safetensors" and path.is_file() and (asked := sampling_of(read_header(path).metadata)):
            return adapter.label, asked
    return None


def with_sampling(settings: Mapping[str, Any], asked: Sampling) -> dict[str, Any]:
    """The settings with what is asked for where they have None."""
    return {**settings, **{name: value for name, value in asdict(asked).items() if settings[name] is None}}
