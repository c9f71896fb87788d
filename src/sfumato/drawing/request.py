"""One picture of a call that draws several. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.weighting.adapter import Weight


@dataclass(frozen=True)
class PictureRequest:
    """One picture that is asked for. prompt: without its tags. tag_weights: of all adapters by label, where the prompt
    has tags. overrides: what is set for it otherwise than for all, by name."""

    prompt: str
    seed: int
    tag_weights: Mapping[str, Weight] | None
    overrides: Mapping[str, Any]
