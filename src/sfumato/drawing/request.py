"""One image of a call that generates several. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.weighting.adapter import Weight


@dataclass(frozen=True)
class PictureRequest:
    """One image that is asked for. prompt: without its tags. tag_weights: weights of all adapters by label, if the
    prompt has tags. overrides: settings of this image that differ from the others', by name."""

    prompt: str
    seed: int
    tag_weights: Mapping[str, Weight] | None
    overrides: Mapping[str, Any]
