"""ComfyUI's weights of words, said in A1111's syntax: in ComfyUI a number takes the place of those of the brackets
around it, and A1111 multiplies them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import starmap

from sfumato.errors import ConfigError
from sfumato.prompts.syntax import emphasised, unweighted


def in_a1111(text: str) -> str:
    """A text of ComfyUI as A1111 reads it with the same weights; as it stands where both read the same in it."""
    text = unweighted(text)
    with suppress(ConfigError, RecursionError):
        said = "".join(starmap(_emphasis, _weighted(text.replace(r"\(", "\0").replace(r"\)", "\1"), 1.0)))
        return text if _read(text) == _read(said) else said
    return text


def _read(text: str) -> list[tuple[str, float]] | None:
    """What A1111 reads in a text; None where brackets do not pair."""
    with suppress(ConfigError):
        return [(part, round(weight, 6)) for part, weight in emphasised(text)]
    return None


def _weighted(text: str, weight: float) -> Iterator[tuple[str, float]]:
    """ComfyUI's texts and weights, in order: a bracket's number takes the place of those of the brackets around it, and
    brackets that do not pair are characters. As its comfy/sd1_clip.py has it; \\( and \\) are \\0 and \\1.
    """
    for part in _bracketed(text):
        if not (len(part) > 1 and part[0] == "(" and part[-1] == ")"):
            yield part, weight
            continue
        inside, within = part[1:-1], weight * 1.1
        words, _, number = inside.rpartition(":")
        if words:
            with suppress(ValueError):
                inside, within = words, float(number)
        yield from _weighted(inside, within)


def _bracketed(text: str) -> Iterator[str]:
    """The text in parts, of which a whole bracket is one."""
    part, level = "", 0
    for token in re.findall(r"[()]|[^()]+", text):
        if token == "(":
            if not level and part:
                yield part
                part = ""
            level += 1
        part += token
        if token == ")":
            level -= 1
            if not level:
                yield part
                part = ""
    if part:
        yield part


def _emphasis(text: str, weight: float) -> str:
    """A text of `_weighted` with its weight in A1111's syntax, which has no exponents."""
    if not math.isfinite(weight):
        raise ConfigError(f"a weight of {weight} has no form in A1111's syntax.")
    text = re.sub(r"[()]", r"\\\g<0>", text).replace("\0", r"\(").replace("\1", r"\)")
    return text if weight == 1 else f"({text}:{round(weight, 6):.6f}".rstrip("0").rstrip(".") + ")"
