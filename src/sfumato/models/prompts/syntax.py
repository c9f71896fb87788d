"""How weighted words are written in a prompt: compel's `word++`, `(some words)1.3`, `("a cat", "a dog").and()`, which
compel reads, and A1111's `(some words:1.3)`, which is read here. Importing this loads no torch.

Where a text holds a phrase: a trigger, a subject's words, the words that a placeholder takes the place of.

Importing this loads no torch.

The negative prompt that a subject's file asks for: the subject's own words.

Classifier-free guidance (Ho & Salimans 2022, eq. 6) multiplies what the prompt has and the negative prompt has not.
Where the subject is in both, it multiplies what is said beside the subject, such as a style, and not the subject, which
was learned in the styles that its pictures have. Importing this loads no torch.

ComfyUI's weights of words, said in A1111's syntax: in ComfyUI a number takes the place of those of the brackets
around it, and A1111 multiplies them.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from itertools import starmap
from typing import Any, Literal, get_args

from sfumato.errors import ConfigError
from sfumato.models.prompts.editing import prompt_stages

Syntax = Literal["plain", "a1111", "compel"]


def parse_prompt_attention(prompt: str) -> list[tuple[str, float]]:
    """A1111's emphasis: the texts of the prompt and their weights, in order.

    `(words:1.3)` weighs 1.3, `(words)` 1.1, `[words]` 1 / 1.1; nested ones multiply, and `\\(` is the character.
    Raises ConfigError for a bracket that is not closed, for a weight that is none, for words that change between the
    steps, which `prompt_editing` takes out first where there are steps, and for AND. BREAK is a text of its own.
    """
    if _AND.search(prompt):
        raise ConfigError(
            f"the prompt {prompt[:60]!r}: AND adds up the predictions of several prompts in A1111, which is not read "
            "here; write 'and' for the word."
        )
    pieces: list[list[Any]] = [["", 1.0]]
    opened: list[tuple[str, int, set[str]]] = []  # each open bracket, the first piece within it, the marks : and |
    for token in _EMPHASIS.findall(prompt):
        if token in "([":
            opened.append((token, len(pieces), set()))
            pieces.append(["", 1.0])
        elif token[-1] in ")]" and token[0] != "\\":
            wanted = "(" if token[-1] == ")" else "["
            if not opened or opened[-1][0] != wanted:
                raise _unbalanced(prompt, "closes", token[-1])
            _, first, marks = opened.pop()
            if wanted == "[":
                _check_marks(prompt, marks, is_timed=token[0] == ":")
            factor = _factor(token[1:-1]) if token[0] == ":" else 1.1 if token == ")" else 1 / 1.1
            for piece in pieces[first:]:
                piece[1] *= factor
            pieces.append(["", 1.0])
        else:
            if opened and token[0] != "\\":
                opened[-1][2].update(mark for mark in ":|" if mark in token)
            pieces[-1][0] += token.removeprefix("\\")
    if opened:
        raise _unbalanced(prompt, "does not close", opened[-1][0])
    joined: list[tuple[str, float]] = []  # of one weight, which A1111 reads as one text: of (cat)(fish) "catfish"
    for part, weight in ((part, weight) for text, weight in pieces for part in _BREAK.split(text) if part):
        if joined and joined[-1][1] == weight and "BREAK" not in (part, joined[-1][0]):
            part = joined.pop()[0] + part
        joined.append((part, weight))
    return [(text, weight) for text, weight in joined if text.strip()]


def escape_emphasis(text: str) -> str:
    """The text as A1111's syntax writes it: with a backslash before each bracket and backslash, and before a number
    that would weigh the whole prompt; AND and BREAK in small letters, in which text encoders read them anyway."""
    plain = re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
    return re.sub(r"\b(?:AND|BREAK)\b", lambda word: word[0].lower(), escape_trailing_weight(plain))


def escape_trailing_weight(text: str) -> str:
    """The text with a backslash before a number at its end that would weigh all of it."""
    return _WHOLE_WEIGHT.sub(r"\1\\\2", text)


def unescape_emphasis(text: str, syntax: Syntax) -> str:
    """The text without the backslashes by which A1111's syntax marks characters; as it is in another syntax."""
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL) if syntax == "a1111" else text


def check_syntax(syntax: Any) -> None:
    """Raises ConfigError for what is no `Syntax`, and would be read as one of them."""
    if syntax not in get_args(Syntax):
        raise ConfigError(f"the prompt syntax {syntax!r}: wanted one of {', '.join(get_args(Syntax))}.")


def check_no_trailing_weight(prompt: str) -> None:
    """Raises ConfigError for a prompt that ends in what A1111 takes for the weight of all of it; not for negative ones,
    which have none."""
    if found := _WHOLE_WEIGHT.search(prompt):
        raise ConfigError(
            f"the prompt {prompt[:60]!r} ends in {found[0].strip()[:20]!r}, by which A1111 weighs the whole prompt, as "
            "around AND; that is not read here. Write (words:1.3) for a weight, or a backslash before the number for "
            "the characters."
        )


def checked_syntax(prompt: str, syntax: Syntax, *, is_negative: bool = False) -> str:
    """The prompt. Raises ConfigError for one that cannot be read in its syntax, and where compel, which reads it, is
    not installed.

    What is said after a count of more than 50 steps is read when drawing.
    """
    if syntax == "a1111" and not is_negative:
        check_no_trailing_weight(prompt)
    for _, text in prompt_stages(prompt, 50) if syntax == "a1111" else ():
        parse_prompt_attention(text)
    if syntax != "plain":
        compel = import_compel()
    if syntax == "compel":
        try:
            compel.Compel.parse_prompt_string(prompt)
        except Exception as error:  # pyparsing's errors and its own
            raise compel_error(prompt, error) from None
    return prompt


def import_compel() -> Any:
    """compel. Raises ConfigError where it is not installed."""
    try:
        import compel
    except ImportError:
        raise ConfigError(
            'weighted words and long prompts need the package compel: pip install "sfumato[prompts]", or use '
            "--prompt-syntax plain."
        ) from None
    return compel


def compel_error(prompt: str, error: Exception) -> ConfigError:
    """That compel's parser, which raises what it likes, could not read the prompt."""
    return ConfigError(f"the prompt {prompt[:60]!r} is not in compel's syntax ({error_reason(error)}).")


def error_reason(error: Exception) -> str:
    """What a library's error says, on one line of at most 120 characters."""
    return " ".join(str(error).split())[:120]


_AND = re.compile(r"\bAND\b")
_WHOLE_WEIGHT = re.compile(r"(:\s*)([-+]?(?:\d+\.?|\d*\.\d+)\s*)\Z")
_BREAK = re.compile(r"(?:(?<!\s)\s+)?\b(BREAK)\b\s*")  # (?<!\s): a run of blanks is looked at once
_EMPHASIS = re.compile(r"\\.|:\s*[+-]?[.\d]+\s*[)\]]|[()\[\]]|[^\\()\[\]:]+|[:\\]", re.DOTALL)


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise ConfigError(f"({text.strip()[:40]}): a weight is a number, as in (words:1.3).")
    return factor


def _unbalanced(prompt: str, does: str, bracket: str) -> ConfigError:
    return ConfigError(f"the prompt {prompt[:60]!r} {does} a bracket {bracket!r}; write \\{bracket} for the character.")


def _check_marks(prompt: str, marks: Set[str], *, is_timed: bool) -> None:
    """Raises ConfigError for a square bracket that is more than emphasis. is_timed: whether it ends in a number.

    A1111 has no reading of `:` and `|` in one: it takes the whole prompt for text then, all other brackets included.
    """
    if "|" in marks and (is_timed or ":" in marks):
        raise ConfigError(
            f"the prompt {prompt[:60]!r}: ':' and '|' do not go together in one bracket. Give one of them a bracket "
            "of its own, as in [a:[b|c]:0.5]."
        )
    if is_timed or "|" in marks:
        form = "[a:b:0.5]" if is_timed else "[a|b]"
        raise ConfigError(
            f"the prompt {prompt[:60]!r}: words that change between the steps, as {form}, cannot be so here. Leave one "
            "of the words, or write \\[ and \\] for the characters."
        )


_BEFORE, _AFTER = r"(?<![^\W_])", r"(?![^\W_])"
"""No letter or digit beside it. An underscore parts words, as CLIP's tokenizer has it: "zwx" is in "zwx_style"."""


def phrase_pattern(phrase: str, *, plural: bool = False) -> str:
    """The regular expression of a phrase that stands by itself: "ring" is not in "string". For `re.IGNORECASE`.

    plural: also in "rings", of which it matches what the phrase has.
    """
    before = _BEFORE if phrase[:1].isalnum() else ""
    after = _AFTER if phrase[-1:].isalnum() else ""
    return f"{before}{re.escape(phrase)}" + (f"(?=(?:e?s)?{after})" if plural and after else after)


def has_phrase(phrase: str, text: str, *, plural: bool = False) -> bool:
    """Whether the text holds the phrase, in small letters or capitals; plural: as of `phrase_pattern`."""
    # macOS writes accents in names of files apart from their letters, and the tokenizer joins them.
    phrase, text = (unicodedata.normalize("NFC", each) for each in (phrase, text))
    return re.search(phrase_pattern(phrase, plural=plural), text, re.IGNORECASE) is not None


def negative_for(prompt: str, asked: Iterable[str], syntax: Syntax = "plain") -> str:
    """The texts, out of those that files ask for, that the prompt holds beside other words; separated by commas, or "".

    Upper and lower case are alike. syntax: how the prompt is written, and what is returned.
    """
    texts = (escape_emphasis(text) if syntax == "a1111" else text for text in asked)
    return ", ".join(text for text in dict.fromkeys(texts) if text and _is_beside(text, prompt))


def _is_beside(text: str, prompt: str) -> bool:
    rest, count = re.subn(phrase_pattern(text), "", prompt, flags=re.IGNORECASE)
    # Articles say nothing, nor do weights: "an (otter:1.3)" under "otter" would be drawn without any guidance.
    words = [word for word in re.findall(r"\w+", rest) if re.search(r"[^\W\d_]", word) and word != "BREAK"]
    return count > 0 and any(word.lower() not in ("a", "an", "the") for word in words)


def comfy_to_a1111(text: str) -> str:
    """A text of ComfyUI as A1111 reads it with the same weights; as it stands where both read the same in it."""
    text = escape_trailing_weight(text)
    with suppress(ConfigError, RecursionError):
        said = "".join(starmap(_emphasis, _weighted(text.replace(r"\(", "\0").replace(r"\)", "\1"), 1.0)))
        return text if _read(text) == _read(said) else said
    return text


def _read(text: str) -> list[tuple[str, float]] | None:
    """What A1111 reads in a text; None where brackets do not pair."""
    with suppress(ConfigError):
        return [(part, round(weight, 6)) for part, weight in parse_prompt_attention(text)]
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
