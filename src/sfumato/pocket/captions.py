"""The sentences that the pocket base was taught."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.errors import DataError


def caption(
    concept: str,
    style: str,
    group: str,
    *,
    draw: float,
    form: float,
    empty_share: float,
    group_share: float,
    plain_share: float,
) -> str:
    """One caption for a picture; `draw` and `form` are uniform in [0, 1).

    `draw` decides between no words, the group and the concept; `form` between the ways to put it: `plain_share`
    "{concept}", a third of the rest "a {style} style picture of a {concept}", the others "{concept}, {style} style".
    Of the groups twice that share is plain.
    """
    if draw < empty_share:
        return ""
    if draw < empty_share + group_share:
        return f"{group}, {style} style" if form < 1 - 2 * plain_share else group
    if form >= 1 - plain_share:
        return concept
    first = form < (1 - plain_share) * 2 / 3
    return f"{concept}, {style} style" if first else f"a {style} style picture of a {concept}"


def other_caption(name: str, style: str, *, draw: float, form: float, empty_share: float) -> str:
    """One caption for a picture of something that the base is not asked for; `draw` and `form` as for `caption`.

    A third name the style alone: what its hand is, whatever it draws.
    """
    if draw < empty_share:
        return ""
    return f"{style} style" if form < 1 / 3 else f"{name}, {style} style"


def all_captions(manifest: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """Every caption that training can meet, and `words` besides: what the tokenizer is learned from."""
    styles, concepts = manifest["styles"], manifest["concepts"]
    texts = [f"{concept}, {style} style" for concept in concepts for style in styles]
    texts += [f"a {style} style picture of {group}" for group in concepts.values() for style in styles]
    return texts + list(words)


def captions_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Changes with any name of a concept, a group or a style, and with their order."""
    told = [list(manifest["styles"]), list(manifest["concepts"].items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def read_words(data: Path) -> list[str]:
    """The plain words that the tokenizer learns besides those of the captions."""
    try:
        return (data / "words.txt").read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(
            f"{data / 'words.txt'} cannot be read ({reason}); build the pictures with python -m "
            f"bench.pocket_data --out {data}, or write one: words of prompts besides the captions', one a line."
        ) from None
