"""Placeholders of new words: how they may be spelt, and where a text holds them.

The word that a subject is bound to: how a tokenizer cuts it, and whether it means something already.

DreamBooth wants a word with a weak prior (Ruiz et al. 2023, section 3.2): what an ordinary word stands for has to be
unlearned, and comes through in the pictures.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sfumato.adapters.prompt_tags import is_tag
from sfumato.errors import ConfigError
from sfumato.models.family import plain_tokenizer
from sfumato.models.prompts.syntax import escape_emphasis

if TYPE_CHECKING:
    from sfumato.models import Base


DEFAULT_LEARNING_RATES: Mapping[str, float] = MappingProxyType({"pocket": 2e-2, "sd1": 2e-3, "sd2": 2e-3, "sdxl": 1e-3})
"""Peak learning rates of new words, by family; an entry of a CLIP table's row is about 0.014 in size."""
DEFAULT_VECTORS = 4
"""Of a placeholder, where nothing else is asked for."""
MAX_VECTORS = 16
"""Of a placeholder: of the 77 positions that a prompt has, more would leave few."""


def check_stands_for(phrases: Sequence[str]) -> None:
    """Raises ConfigError for one without a letter or digit, which would stand between letters or nowhere."""
    for phrase in phrases:
        if not re.search(r"\w", phrase):
            raise ConfigError(f"--stands-for {phrase!r}: wanted words of the captions; name such as 'sks otter'.")


def needs_word_boundary(spelt: str) -> bool:
    """Whether a placeholder is one only where no letter or digit is beside it."""
    return re.fullmatch(r"\w+", spelt) is not None


def placeholder_pattern(spelt: str) -> str:
    """Where a placeholder stands in a text that is spelt as it is, `spelling`."""
    return rf"(?<!\w){re.escape(spelt)}(?!\w)" if needs_word_boundary(spelt) else rf"{re.escape(spelt)}(?!_\d)"


def contains_placeholder(token: str, text: str) -> bool:
    """Whether a text holds a placeholder, as a tokenizer finds it: in small or capital letters, and of letters and
    digits alone as a whole word: "totor" is in "a totor, red" and not in "a Totoro"."""
    spelt, read = (unicodedata.normalize("NFC", each).lower() for each in (token, text))  # as CLIP's normalizer
    return re.search(placeholder_pattern(spelt), read) is not None


def embedding_files(folder: Path, name: str, placeholders: Sequence[str], *, alone: bool) -> dict[str, Path]:
    """The file of each placeholder's vectors: NAME.safetensors for one that is alone, else NAME-WORD.safetensors."""
    if alone and len(placeholders) == 1:
        return {placeholders[0]: folder / f"{name}.safetensors"}
    slugs = ["".join(c if c.isalnum() else "-" for c in token).strip("-") or "word" for token in placeholders]
    names: list[str] = []
    for slug in slugs:
        word, number, equal = slug, 1, [other.casefold() for other in slugs].count(slug.casefold())
        while word.casefold() in {taken.casefold() for taken in names} or (equal > 1 and word == slug):
            word, number = f"{slug}-{number}", number + 1  # a disk may not tell upper from lower case
        names.append(word)
    return {token: folder / f"{name}-{slug}.safetensors" for token, slug in zip(placeholders, names, strict=True)}


def subword_pieces(token: str, tokenizer: Any) -> list[str]:
    """How a tokenizer cuts a word that it does not know as one."""
    ids = tokenizer(token, add_special_tokens=False).input_ids
    return [readable_token(tokenizer, index) for index in ids]


def normalized_spelling(token: str, tokenizer: Any) -> str:
    """A word as the tokenizer's own normalizer spells it: CLIP's in small letters, with accents that are composed."""
    normalizer = plain_tokenizer(tokenizer).backend_tokenizer.normalizer
    return token if normalizer is None else str(normalizer.normalize_str(token))


def placeholder_warnings(placeholders: Sequence[str], tokenizer: Any) -> list[str]:
    """A line for each placeholder that is spelt like a word, with how the tokenizer cut it so far, and for each whose
    brackets A1111's syntax takes for its own."""
    plain = plain_tokenizer(tokenizer)
    lines = [
        f"{token} is spelt like a word, which the tokenizer cuts into {' '.join(subword_pieces(token, plain))}: "
        f"prompts that "
        f"mean that word get the new vectors. <{token}> would be nobody's word."
        for token in placeholders
        if re.fullmatch(r"[^\W\d_]+", token)
    ]
    return lines + [
        f"{token}: --prompt-syntax a1111 takes its brackets for emphasis, and wants {escape_emphasis(token)}; "
        f"one such as "
        "<word> is the same everywhere."
        for token in placeholders
        if escape_emphasis(token) != token
    ]


def truncation_notes(initial: Sequence[str], vectors: int, tokenizer: Any) -> list[str]:
    """A line for each text of initial words that has more tokens than a word has vectors, with those that are taken."""
    cut = {text: subword_pieces(text, plain_tokenizer(tokenizer)) for text in initial}
    return [
        f"--initial-words {text!r}: of {len(found)} tokens only these are taken, one a vector: "
        f"{' '.join(found[:vectors])}. --vectors (of lora --word-vectors) says how many."
        for text, found in cut.items()
        if len(found) > vectors
    ]


def check_placeholder(token: str, tokenizer: Any) -> None:
    """Raises ConfigError for a placeholder that cannot be one: empty, with spaces, or a token already."""
    if not token or token != "".join(token.split()) or not token.isprintable():
        raise ConfigError(f"placeholder {token!r}: wanted a word without spaces that nobody writes, such as <otter>.")
    if is_tag(token):
        raise ConfigError(
            f"placeholder {token}: prompts read that as an adapter's tag; write {token.replace(':', '-')} or so."
        )
    if token == "__metadata__":
        raise ConfigError("placeholder __metadata__: a safetensors file has its header by that name; write <metadata>.")
    ids = tokenizer(token, add_special_tokens=False).input_ids
    spelt, known, bare = normalized_spelling(token, tokenizer), tokenizer.get_vocab(), token.strip("<>")
    if len(ids) == 1 or spelt in tokenizer.get_added_vocab() or f"{spelt}_0" in known:
        number = f" (token {ids[0]})" if len(ids) == 1 else ""
        raise ConfigError(
            f"placeholder {token} is a word already{number}, and prompts need its meaning; write <{bare}-1> or so."
        )
    if spelt in known:
        raise ConfigError(
            f"placeholder {token} is a piece that the tokenizer begins other words with (token {known[spelt]}), and "
            f"has to stay one; write <{bare}> or so."
        )


def readable_token(tokenizer: Any, index: int) -> str:
    """A token as people read it; the part of a word that goes on ends in a hyphen."""
    text = str(tokenizer.convert_ids_to_tokens(index))
    if not text.isascii():  # CLIP's vocabulary has a letter for each byte
        decoded = tokenizer.decode([index]).strip()
        text = text if "\ufffd" in decoded else f"{decoded}</w>" if text.endswith("</w>") else decoded
    return text.removesuffix("</w>") if text.endswith("</w>") else f"{text}-"


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


def examine_identifier(word: str, base: Base) -> Identifier:
    """How the base's tokenizers cut `word`, and what in it is ordinary by the frequencies of CLIP's vocabulary.

    CLIP's vocabulary travels with the package, so the second holds for a base with a vocabulary of its own, too.
    """
    cuts = dict.fromkeys(_cut(tokenizer, word) for tokenizer in base.tokenizers)
    parts = re.findall(r"[^\W\d_]+", word)  # CLIP cuts at signs and digits, too: "my-dog7" has a dog in it
    found = dict.fromkeys(ordinary for part in parts if (ordinary := _ordinary_in(part)))
    return Identifier(word, tuple(cuts), tuple(found))


def words_before_class(of_class: str, captions: Iterable[str]) -> list[str]:
    """The words that stand before a class in captions, each once: in "a photo of red dog" it is "red" before "dog".

    Articles do not count, nor signs at the class's ends, such as a prompt's full stop. Empty where no caption holds the
    class.
    """
    bare = re.sub(r"^\W+|\W+$", "", of_class) or of_class
    found = re.compile(rf"(?:^|\s)(\S+)\s+{re.escape(bare)}(?!\w)", re.IGNORECASE)
    words = dict.fromkeys(word for caption in captions for word in found.findall(caption))
    return [word for word in words if word.lower() not in ("a", "an", "the", "of")]


def is_common_word(word: str) -> bool:
    """Whether CLIP knows `word` as one frequent piece."""
    ids = _clip()(word, add_special_tokens=False, verbose=False).input_ids
    return len(ids) == 1 and ids[0] < FREQUENT and len(word) >= _SHORTEST


def _ordinary_in(part: str) -> str:
    """The ordinary word that `part` is, or that its last piece is: "reddog" ends in the very token of "dog". A piece of
    two letters is a syllable."""
    if is_common_word(part):
        return part
    end = _cut(_clip(), part)[-1]
    return end if len(end) > _SHORTEST and is_common_word(end) else ""


def _cut(tokenizer: Any, word: str) -> tuple[str, ...]:
    return tuple(piece.removesuffix("</w>") for piece in tokenizer.tokenize(word))


@cache
def _clip() -> Any:
    """CLIP's own tokenizer, which takes a moment to build."""
    from sfumato.models.vocabulary import clip_tokenizer

    return clip_tokenizer(positions=77)
