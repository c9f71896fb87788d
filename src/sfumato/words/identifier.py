"""The word that a subject is bound to: how a tokenizer cuts it, and whether it means something already.

DreamBooth wants a word with a weak prior (Ruiz et al. 2023, section 3.2): what an ordinary word stands for has to be
unlearned, and comes through in the pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.bases import Base

FREQUENT = 44_000
"""Pieces of CLIP's vocabulary, of 49,408 and the most frequent first, that count as ordinary: "dog" is number 1,929,
"corgi" 31,320, "zendaya" 35,956; the customary identifiers "ohwx" and "sks" are numbers 47,993 and 48,136."""
_SHORTEST = 2


@dataclass(frozen=True)
class Identifier:
    """A proposed word. pieces: of each tokenizer that cuts it in its own way. ordinary: words in it that CLIP knows."""

    word: str
    pieces: tuple[tuple[str, ...], ...]
    ordinary: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the person: how it is cut, and a warning where it holds an ordinary word."""
        cuts = [f"{len(cut)} piece{'s'[: len(cut) != 1]} ({' + '.join(cut)})" for cut in self.pieces]
        found = [f"identifier {self.word!r}: {' and '.join(cuts)}"]
        if self.ordinary:
            words = ", ".join(repr(word) for word in self.ordinary)
            are = "is an ordinary word" if len(self.ordinary) == 1 else "are ordinary words"
            found.append(
                f"warning: {words} {are}, whose meaning will come through in the images; "
                "a rare one, such as --identifier sks or ohwx, has none to unlearn"
            )
        return found


def examine(word: str, base: Base) -> Identifier:
    """How the base's tokenizers cut `word`, and what in it is ordinary by the frequencies of CLIP's vocabulary.

    CLIP's vocabulary travels with the package, so the second holds for a base with a vocabulary of its own, too.
    """
    cuts = dict.fromkeys(_cut(tokenizer, word) for tokenizer in base.tokenizers)
    parts = re.findall(r"[^\W\d_]+", word)  # CLIP cuts at signs and digits, too: "my-dog7" has a dog in it
    found = dict.fromkeys(ordinary for part in parts if (ordinary := _ordinary_in(part)))
    return Identifier(word, tuple(cuts), tuple(found))


def before(of_class: str, captions: Iterable[str]) -> list[str]:
    """The words that stand before a class in captions, each once: in "a photo of red dog" it is "red" before "dog".

    Articles do not count, nor signs at the class's ends, such as a prompt's full stop. Empty where no caption holds the
    class.
    """
    bare = re.sub(r"^\W+|\W+$", "", of_class) or of_class
    found = re.compile(rf"(?:^|\s)(\S+)\s+{re.escape(bare)}(?!\w)", re.IGNORECASE)
    words = dict.fromkeys(word for caption in captions for word in found.findall(caption))
    return [word for word in words if word.lower() not in ("a", "an", "the", "of")]


def is_ordinary(word: str) -> bool:
    """Whether CLIP knows `word` as one frequent piece."""
    ids = _clip()(word, add_special_tokens=False, verbose=False).input_ids
    return len(ids) == 1 and ids[0] < FREQUENT and len(word) >= _SHORTEST


def _ordinary_in(part: str) -> str:
    """The ordinary word that `part` is, or that its last piece is: "reddog" ends in the very token of "dog". A piece of
    two letters is a syllable."""
    if is_ordinary(part):
        return part
    end = _cut(_clip(), part)[-1]
    return end if len(end) > _SHORTEST and is_ordinary(end) else ""


def _cut(tokenizer: Any, word: str) -> tuple[str, ...]:
    return tuple(piece.removesuffix("</w>") for piece in tokenizer.tokenize(word))


@cache
def _clip() -> Any:
    """CLIP's own tokenizer, which takes a moment to build."""
    from sfumato.bases.vocabulary import clip_tokenizer

    return clip_tokenizer(positions=77)
