"""Which modules a mix takes: `up`, `down.1`, `attn2`, `te`, `up.0.attentions.1`, `!mid`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from sfumato.errors import AdapterError
from sfumato.files.kohya import Target

PRESETS: Mapping[str, str] = MappingProxyType(
    {"b-lora-content": "up_blocks.0.attentions.0", "b-lora-style": "up_blocks.0.attentions.1"}
)
"""B-LoRA, Frenkel et al. 2024 (arXiv 2403.14572), section 4: which two blocks of SDXL hold content and style."""

SHORT: Mapping[str, str] = MappingProxyType(
    {"down": "down_blocks", "up": "up_blocks", "mid": "mid_block", "te": "text_encoder", "te1": "text_encoder"}
    | {"te2": "text_encoder_2"}
)
"""Short forms of a name's first part."""


def select_modules(targets: Iterable[Target], words: str) -> set[Target]:
    """The modules that the comma-separated words name.

    A word is a run of the parts of `unet.down_blocks.0....attn2.to_k`, from anywhere in it, with down, mid, up, te and
    te2 for short; or a preset. `!word` takes modules out, of all where nothing else is named.
    Raises AdapterError for a word that names none of the modules.
    """
    known = list(targets)
    wanted, unwanted = set[Target](), set[Target]()
    given = [word.strip() for word in words.split(",") if word.strip()]
    for word in given:
        found = {target for target in known if fits(word.removeprefix("!"), target)}
        if not found:
            raise AdapterError(
                f"blocks {word!r}: names none of the {len(known)} modules. Wanted such as up, down.1, mid, attn2, te, "
                f"up.0.attentions.1 or {', '.join(PRESETS)}, perhaps after !."
            )
        (unwanted if word.startswith("!") else wanted).update(found)
    if not any(not word.startswith("!") for word in given):
        wanted = set(known)
    return wanted - unwanted


def fits(word: str, target: Target) -> bool:
    """Whether the word names this module."""
    parts = PRESETS.get(word, word).split(".")
    parts[0] = SHORT.get(parts[0], parts[0])
    return f".{'.'.join(parts)}." in f".{target[0]}.{target[1]}."
