"""{red|blue} in a caption is a wildcard: a sample has one of its alternatives, as with sd-scripts' enable_wildcard.

An alternative may hold wildcards, whose }} closes two of them. Else {{ and }} are the letters { and }; an empty {} is
two letters, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product
from math import prod

from sfumato.errors import DataError

Alternatives = tuple["Parts", ...]
Parts = tuple[str | Alternatives, ...]
"""A text as the words between its wildcards, and these as their alternatives."""

_TOKEN = re.compile(r"\{\{|\}\}|\{\}|[{}|]|[^{}|]+")
_LETTERS = {"{{": "{", "}}": "}"}
_DEEPEST = 20
"""Wildcards within each other; nobody writes more, and Python calls no function within thousands of others."""


def drawn(text: str, pick: Callable[[int], int]) -> str:
    """The text with one alternative of each wildcard. pick: told how many there are, says which, from 0 on.

    Raises DataError for braces that do not match, as all of these do.
    """
    return _drawn(_parsed(text), pick)


def count(text: str) -> int:
    """How many ways there are to choose."""
    return _count(_parsed(text))


def forms(text: str) -> Iterator[str]:
    """The text for each way to choose; ask `count` first."""
    return _forms(_parsed(text))


def cover(text: str) -> list[str]:
    """So few of the forms that each alternative is in one of them, in the first those that come first."""
    return _cover(_parsed(text))


def longest(text: str, size: Callable[[str], int]) -> str:
    """The form with the longest alternative of each wildcard. size: of a text."""
    return _longest(_parsed(text), size)


def fault(text: str) -> str:
    """What is wrong with the text's braces; empty if nothing is."""
    try:
        _parsed(text)
    except DataError as error:
        return str(error)
    return ""


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Parts:
    ((parts,), _) = _read(text, 0, 0)
    return parts


def _read(text: str, start: int, depth: int) -> tuple[Alternatives, int]:
    """The alternatives that begin here, and where their wildcard has ended. depth: how many wildcards are open; without
    any the whole text is the one alternative."""
    if depth > _DEEPEST:
        raise DataError(f"wildcards in more than {_DEEPEST} others. Write {{{{ for each {{ that is a letter.")
    alternatives: list[list[str | Alternatives]] = [[]]
    at, pairs = start, 0  # pairs: how many {{ wait for their }}
    while token := _TOKEN.match(text, at):
        found = "}" if token[0] == "}}" and depth and not pairs else token[0]
        at += len(found)
        if found == "{":
            inner, at = _read(text, at, depth + 1)
            alternatives[-1].append(inner)
        elif found == "}" and depth:
            return tuple(map(tuple, alternatives)), at
        elif found == "}":
            said = text[max(0, at - 30) : at]
            raise DataError(f"a }} that closes nothing, {said!r}. Open it with {{, or write }}}} for the letter.")
        elif found == "|" and depth:
            alternatives.append([])
        else:
            pairs += (found == "{{") - (found == "}}")
            alternatives[-1].append(_LETTERS.get(found, found))
    if depth:
        said = text[start - 1 : start + 29]
        raise DataError(f"a {{ that is never closed, {said!r}. Close it with }}, or write {{{{ for the letter.")
    return tuple(map(tuple, alternatives)), at


def _drawn(parts: Parts, pick: Callable[[int], int]) -> str:
    return "".join(part if isinstance(part, str) else _drawn(part[pick(len(part))], pick) for part in parts)


def _count(parts: Parts) -> int:
    return prod(sum(map(_count, part)) for part in parts if not isinstance(part, str))


def _forms(parts: Parts) -> Iterator[str]:
    return map("".join, product(*_each(parts, _forms)))


def _cover(parts: Parts) -> list[str]:
    each = _each(parts, _cover)
    return ["".join(own[place % len(own)] for own in each) for place in range(max(map(len, each), default=1))]


def _each(parts: Parts, texts: Callable[[Parts], Iterator[str] | list[str]]) -> list[list[str]]:
    """Of each part the texts that may stand there."""
    return [[part] if isinstance(part, str) else [text for one in part for text in texts(one)] for part in parts]


def _longest(parts: Parts, size: Callable[[str], int]) -> str:
    return "".join(
        part if isinstance(part, str) else max((_longest(one, size) for one in part), key=size) for part in parts
    )
