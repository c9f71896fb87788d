"""Prompts of all that the pocket base was taught."""

from __future__ import annotations

import json
from importlib import resources


def known_prompts() -> list[str]:
    """Each concept in each style, and with no style named."""
    concepts, styles = (
        json.loads(resources.files("sfumato.pocket").joinpath(name).read_text(encoding="utf-8"))
        for name in ("concepts.json", "manifest.json")
    )
    named = [f"{concept}, {style} style" for concept in concepts for style in styles["styles"]]
    return named + list(concepts)
