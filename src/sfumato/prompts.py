"""Prompts as people write them: adapters as tags, weighted words, any length.

`<lora:name:0.8>` and `<lora:name:0.4:0.8>` (text encoders, then U-Net) are A1111's, as are `te=` and `unet=` in them;
`<lora:name:0.8:lbw=MIDD>` (or a list of numbers, or `lbw=down:0,up.1:1.2`) is that of its extension for weights by
block; `<lyco:...>` is the same. Weights and length are the library compel's work: `word++`, `(some words)1.3`,
`("a cat", "a dog").and()`; A1111's `(some words:1.3)` is read here and handed to it, by `sfumato.prompt_encoding`, as
texts and their weights.
`--n blurry --w 512 --h 768 --d 7 --s 20 --l 7` after a prompt are sd-scripts' options.
Importing this loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

from sfumato.compose.adapter import Weight, added, checked_weight
from sfumato.compose.blocks import WEB_PRESETS, Blocks
from sfumato.errors import AdapterError, ConfigError
from sfumato.prompt_steps import stages

Syntax = Literal["plain", "compel", "a1111"]

_TAG = re.compile(r"<(?:lora|lyco):([^:<>]*)((?::[^:<>]*)*)>", re.IGNORECASE)
_HYPERNETWORK = re.compile(r"<hypernet:[^<>]*>", re.IGNORECASE)
_NAMED = re.compile(r"([A-Za-z_]\w*)\s*=\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Tagged:
    """A prompt without its tags, and the adapters they name with their weights."""

    prompt: str
    adapters: tuple[tuple[str, Weight], ...]


def split_tags(prompt: str) -> Tagged:
    """Take the `<lora:...>` tags out of a prompt; weights of a name that is tagged twice are added.

    Raises ConfigError for one without a name or whose weight is none, for a second one of a weight by block, and for
    the tag of a hypernetwork.
    """
    if other := _HYPERNETWORK.search(prompt):
        raise ConfigError(f"{other[0]}: a hypernetwork, which is not read here; leave it out, or draw with a LoRA.")
    adapters: dict[str, Weight] = {}
    for found in _TAG.finditer(prompt):
        if not (name := found[1].strip()):
            raise ConfigError(f"{found[0]}: names no adapter; wanted such as <lora:line:0.8>.")
        try:
            weight = checked_weight(name, _weight(found[2].split(":")[1:]))
            adapters[name] = checked_weight(name, _both(adapters[name], weight)) if name in adapters else weight
        except ValueError:
            raise ConfigError(f"{found[0]}: a weight is a number, as in <lora:{name}:0.8>.") from None
        except (AdapterError, ConfigError) as error:
            raise ConfigError(f"{found[0]}: {error}") from None
    plain = _TAG.sub(" ", prompt) if adapters else prompt
    return Tagged(" ".join(plain.split()) if adapters else plain, tuple(adapters.items()))


def is_tag(text: str) -> bool:
    """Whether a text is read as a tag in any syntax."""
    return bool(_TAG.search(text) or _HYPERNETWORK.search(text))


def refuse_tags(prompt: str, where: str, instead: str) -> None:
    """Raises ConfigError for a prompt that names an adapter where nobody would hear it."""
    if found := split_tags(prompt).adapters:
        raise ConfigError(f"{where}: <lora:{found[0][0]}:...> is not read here; {instead}.")


def _both(weight: Weight, other: Weight) -> Weight:
    """The sum of the weights of two tags of one name."""
    if isinstance(weight, Blocks) or isinstance(other, Blocks):
        raise ConfigError("this adapter has another tag in the prompt, and weights by block are not added; leave one.")
    return added(weight, other)


def _weight(words: Sequence[str]) -> Weight:
    """What follows a tag's name between colons, as a weight. Raises ValueError for a word that is no number."""
    numbers: list[float] = []
    named: dict[str, str] = {}
    key = ""
    for word in (word.strip() for word in words):
        if found := _NAMED.fullmatch(word):
            key = found[1].lower()
            if key not in ("te", "unet", "lbw"):
                raise ConfigError(f"{key}= is not read here; te=, unet= and lbw= (weights by block) are.")
            named[key] = found[2]
        elif key == "lbw":  # of lbw=down:0,up.1:1.2
            named[key] += f":{word}"
        elif word in WEB_PRESETS or "," in word:  # the extension's older form, without lbw=
            named["lbw"] = word
        elif word:
            numbers.append(float(word))
    if len(numbers) > 2:
        raise ConfigError(f"{len(numbers)} weights; wanted one, or two: text encoders, then U-Net.")
    te = float(named.get("te", numbers[0] if numbers else 1.0))
    unet = float(named.get("unet", numbers[1] if len(numbers) > 1 else te))  # as A1111 has it
    weight = unet if unet == te else (unet, te)
    return Blocks.parse(weight, named["lbw"]) if "lbw" in named else weight


_FLAGS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "l": ("guidance", float),
}
"""sd-scripts' options in a prompt, by our names."""


def split_flags(prompt: str) -> tuple[str, dict[str, Any]]:
    """A prompt without sd-scripts' options in it, and what they set: negative, width, height, seed, steps, guidance.

    Raises ConfigError for an option that is none of these, such as `--ar 3:2`, and for a value that is no number.
    """
    plain, *flags = re.split(r"(?:^|(?<!\s)\s+)--(?=[A-Za-z]+(?:\s|$))", prompt)
    settings: dict[str, Any] = {}
    for name, _, value in (flag.partition(" ") for flag in flags):
        if name.lower() not in _FLAGS:
            raise ConfigError(
                f"the prompt {plain[:60]!r}: --{name} is not read there; --n, --w, --h, --d, --s, --l are."
            )
        key, read = _FLAGS[name.lower()]
        try:
            settings[key] = read(value.strip())
        except ValueError:
            raise ConfigError(f"the prompt {plain[:60]!r}: --{name} {value!r:.20} is no number that fits.") from None
    return plain, settings


def without_flags(prompt: str, where: str) -> str:
    """The prompt. Raises ConfigError where it holds options, which are read in the prompts of `generate` alone."""
    plain, settings = split_flags(prompt)
    if settings:
        raise ConfigError(
            f"{where}: options such as {prompt[len(plain) :].strip()[:40]!r} are not read here; leave them out."
        )
    return prompt


def emphasised(prompt: str) -> list[tuple[str, float]]:
    """A1111's emphasis: the texts of the prompt and their weights, in order.

    `(words:1.3)` weighs 1.3, `(words)` 1.1, `[words]` 1 / 1.1; nested ones multiply, and `\\(` is the character.
    Raises ConfigError for a bracket that is not closed, for a weight that is none, for words that change between the
    steps, which `sfumato.prompt_steps` takes out first where there are steps, and for AND. BREAK is a text of its own.
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
    parted = [(part, weight) for text, weight in pieces for part in _BREAK.split(text)]
    return [(text, weight) for text, weight in parted if text.strip()]


def escaped(text: str) -> str:
    """The text as A1111's syntax writes it: with a backslash before each bracket and backslash; AND and BREAK in small
    letters, in which text encoders read them anyway."""
    plain = re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
    return re.sub(r"\b(?:AND|BREAK)\b", lambda word: word[0].lower(), plain)


def unescaped(text: str, syntax: Syntax) -> str:
    """The text without the backslashes by which A1111's syntax marks characters; as it is in another syntax."""
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL) if syntax == "a1111" else text


def checked_syntax(prompt: str, syntax: Syntax) -> str:
    """The prompt. Raises ConfigError for one that cannot be read in its syntax, and where compel, which reads it, is
    not installed.

    What is said after a count of more than 50 steps is read when drawing.
    """
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
            "weighted words and long prompts need the package compel: pip install 'sfumato[prompts]', or use "
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
_BREAK = re.compile(r"(?:(?<!\s)\s+)?\b(BREAK)\b\s*")  # (?<!\s): a run of blanks is looked at once
_EMPHASIS = re.compile(r"\\.|:\s*[+-]?[.\d]+\s*[)\]]|[()\[\]]|[^\\()\[\]:]+|[:\\]", re.DOTALL)


def _factor(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"({text.strip()}): a weight is a number, as in (words:1.3).") from None


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
