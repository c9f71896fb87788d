"""How weighted words are written in a prompt: compel's `word++`, `(some words)1.3`, `("a cat", "a dog").and()`, which
compel reads, and A1111's `(some words:1.3)`, which is read here. Importing this loads no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Set
from typing import Any, Literal, get_args

from sfumato.errors import ConfigError
from sfumato.prompts.prompt_editing import stages

Syntax = Literal["plain", "a1111", "compel"]


def emphasised(prompt: str) -> list[tuple[str, float]]:
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


def escaped(text: str) -> str:
    """The text as A1111's syntax writes it: with a backslash before each bracket and backslash, and before a number
    that would weigh the whole prompt; AND and BREAK in small letters, in which text encoders read them anyway."""
    plain = re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
    return re.sub(r"\b(?:AND|BREAK)\b", lambda word: word[0].lower(), unweighted(plain))


def unweighted(text: str) -> str:
    """The text with a backslash before a number at its end that would weigh all of it."""
    return _WHOLE_WEIGHT.sub(r"\1\\\2", text)


def unescaped(text: str, syntax: Syntax) -> str:
    """The text without the backslashes by which A1111's syntax marks characters; as it is in another syntax."""
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL) if syntax == "a1111" else text


def check_syntax(syntax: Any) -> None:
    """Raises ConfigError for what is no `Syntax`, and would be read as one of them."""
    if syntax not in get_args(Syntax):
        raise ConfigError(f"the prompt syntax {syntax!r}: wanted one of {', '.join(get_args(Syntax))}.")


def check_whole(prompt: str) -> None:
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
        check_whole(prompt)
    for _, text in stages(prompt, 50) if syntax == "a1111" else ():
        emphasised(text)
    if syntax != "plain":
        compel = compel_package()
    if syntax == "compel":
        try:
            compel.Compel.parse_prompt_string(prompt)
        except Exception as error:  # pyparsing's errors and its own
            raise not_compels(prompt, error) from None
    return prompt


def compel_package() -> Any:
    """compel. Raises ConfigError where it is not installed."""
    try:
        import compel
    except ImportError:
        raise ConfigError(
            'weighted words and long prompts need the package compel: pip install "sfumato[prompts]", or use '
            "--prompt-syntax plain."
        ) from None
    return compel


def not_compels(prompt: str, error: Exception) -> ConfigError:
    """That compel's parser, which raises what it likes, could not read the prompt."""
    return ConfigError(f"the prompt {prompt[:60]!r} is not in compel's syntax ({reason_of(error)}).")


def reason_of(error: Exception) -> str:
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
