"""Placeholders of new words: how they may be spelt, and where a text holds them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.bases.tokenizers import plain_tokenizer
from sfumato.errors import ConfigError
from sfumato.prompts.syntax import escaped
from sfumato.prompts.tags import is_tag

DEFAULT_LEARNING_RATES: Mapping[str, float] = MappingProxyType({"pocket": 2e-2, "sd1": 2e-3, "sd2": 2e-3, "sdxl": 1e-3})
"""Peak learning rates of new words, by family; an entry of a CLIP table's row is about 0.014 in size."""
DEFAULT_VECTORS = 4
"""Of a placeholder, where nothing else is asked for."""
MOST_VECTORS = 16
"""Of a placeholder: of the 77 positions that a prompt has, more would leave few."""


def check_stands_for(phrases: Sequence[str]) -> None:
    """Raises ConfigError for one without a letter or digit, which would stand between letters or nowhere."""
    for phrase in phrases:
        if not re.search(r"\w", phrase):
            raise ConfigError(f"--stands-for {phrase!r}: wanted words of the captions; name such as 'sks otter'.")


def is_alone(spelt: str) -> bool:
    """Whether a placeholder is one only where no letter or digit is beside it."""
    return re.fullmatch(r"\w+", spelt) is not None


def pattern(spelt: str) -> str:
    """Where a placeholder stands in a text that is spelt as it is, `spelling`."""
    return rf"(?<!\w){re.escape(spelt)}(?!\w)" if is_alone(spelt) else rf"{re.escape(spelt)}(?!_\d)"


def holds(token: str, text: str) -> bool:
    """Whether a text holds a placeholder, as a tokenizer finds it: in small or capital letters, and of letters and
    digits alone as a whole word: "totor" is in "a totor, red" and not in "a Totoro"."""
    spelt, read = (unicodedata.normalize("NFC", each).lower() for each in (token, text))  # as CLIP's normalizer
    return re.search(pattern(spelt), read) is not None


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


def pieces(token: str, tokenizer: Any) -> list[str]:
    """How a tokenizer cuts a word that it does not know as one."""
    ids = tokenizer(token, add_special_tokens=False).input_ids
    return [readable_token(tokenizer, index) for index in ids]


def spelling(token: str, tokenizer: Any) -> str:
    """A word as the tokenizer's own normalizer spells it: CLIP's in small letters, with accents that are composed."""
    normalizer = plain_tokenizer(tokenizer).backend_tokenizer.normalizer
    return token if normalizer is None else str(normalizer.normalize_str(token))


def warnings_of(placeholders: Sequence[str], tokenizer: Any) -> list[str]:
    """A line for each placeholder that is spelt like a word, with how the tokenizer cut it so far, and for each whose
    brackets A1111's syntax takes for its own."""
    plain = plain_tokenizer(tokenizer)
    lines = [
        f"{token} is spelt like a word, which the tokenizer cuts into {' '.join(pieces(token, plain))}: prompts that "
        f"mean that word get the new vectors. <{token}> would be nobody's word."
        for token in placeholders
        if re.fullmatch(r"[^\W\d_]+", token)
    ]
    return lines + [
        f"{token}: --prompt-syntax a1111 takes its brackets for emphasis, and wants {escaped(token)}; one such as "
        "<word> is the same everywhere."
        for token in placeholders
        if escaped(token) != token
    ]


def truncation_notes(initial: Sequence[str], vectors: int, tokenizer: Any) -> list[str]:
    """A line for each text of initial words that has more tokens than a word has vectors, with those that are taken."""
    cut = {text: pieces(text, plain_tokenizer(tokenizer)) for text in initial}
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
    spelt, known, bare = spelling(token, tokenizer), tokenizer.get_vocab(), token.strip("<>")
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
