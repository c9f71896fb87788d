"""Prompts as people write them: adapters as tags, weighted words, any length.

`<lora:name:0.8>` and `<lora:name:0.4:0.8>` (text encoders, then U-Net) are A1111's, as are `te=` and `unet=` in them;
`<lora:name:0.8:lbw=MIDD>` (or a list of numbers, or `lbw=down:0,up.1:1.2`) is that of its extension for weights by
block; `<lyco:...>` is the same. Weights and length are the library compel's work: `word++`, `(some words)1.3`,
`("a cat", "a dog").and()`; A1111's `(some words:1.3)` is read here and handed to it as texts and their weights.
`--n blurry --w 512 --h 768 --d 7 --s 20 --l 7` after a prompt are sd-scripts' options.
Importing this loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sfumato.compose.adapter import Weight, added, checked_weight
from sfumato.compose.blocks import WEB_PRESETS, Blocks
from sfumato.errors import AdapterError, ConfigError, SfumatoError

if TYPE_CHECKING:
    from sfumato.bases import Base, TextEmbedding
    from sfumato.prompt_steps import Stage

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
    plain, *flags = re.split(r"(?:^|\s+)--(?=[A-Za-z]+(?:\s|$))", prompt)
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
    """The prompt. Raises ConfigError for one in A1111's syntax that cannot be read; compel reads its own when drawing.

    What is said after a count of more than 50 steps is read when drawing, too.
    """
    from sfumato.prompt_steps import stages

    for _, text in stages(prompt, 50) if syntax == "a1111" else ():
        emphasised(text)
    return prompt


_AND = re.compile(r"\bAND\b")
_BREAK = re.compile(r"\s*\b(BREAK)\b\s*")
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


def encode(base: Base, prompts: Sequence[str], negative: str, syntax: Syntax) -> tuple[TextEmbedding, TextEmbedding]:
    """The embeddings of the prompts, and of the negative prompt for each: (batch, tokens, width), equal in tokens.

    Raises ConfigError where compel is not installed, cannot read a prompt, or does not know the base's clip skip.
    """
    import torch

    from sfumato.bases import TextEmbedding

    encoders = _encoders(base)
    texts = [emphasised(text) if syntax == "a1111" else text for text in (*prompts, negative)]
    hidden, pooled = [], []
    for encoder in encoders:
        found = [_encoded(encoder, text) for text in texts]
        hidden.append(torch.cat(encoder.pad_conditioning_tensors_to_same_length([first for first, _ in found])))
        pooled = [second for _, second in found if second is not None]
    whole = TextEmbedding(torch.cat(hidden, dim=-1), torch.cat(pooled) if pooled else None)
    count = len(prompts)
    other = whole[[count] * count]
    return whole[:count], other.zeros() if not negative and base.zeros_for_empty_prompt else other


def encode_stages(base: Base, prompts: Sequence[str], negative: str, steps: int) -> list[Stage]:
    """What A1111's prompts, and the negative prompt for each, tell the U-Net until which of the steps.

    One stage where no words change, as of `encode`; raises what that raises.
    """
    from sfumato.prompt_steps import Stage, stages

    by_text = [stages(text, steps) for text in (*prompts, negative)]
    lasts = sorted({last for parts in by_text for last, _ in parts})
    said = [[next(text for end, text in parts if last <= end) for parts in by_text] for last in lasts]
    distinct = list(dict.fromkeys(text for texts in said for text in (texts if negative else texts[:-1])))
    whole, other = encode(base, distinct, "", "a1111")
    found = []
    for last, (*texts, without) in zip(lasts, said, strict=True):
        text = whole[[distinct.index(each) for each in texts]]
        count = len(texts)
        found.append(Stage(last, text, whole[[distinct.index(without)] * count] if negative else other[[0] * count]))
    return found


def _encoded(compel: Any, text: str | list[tuple[str, float]]) -> tuple[Any, Any]:
    """(hidden, pooled or None) of one prompt, (1, tokens, width) and (1, width). A list is texts and their weights."""
    import torch

    try:
        with torch.no_grad():
            found = compel([text]) if isinstance(text, str) else _of_pieces(compel, text)
    except SfumatoError:
        raise
    except Exception as error:  # its parser raises pyparsing's errors and its own
        reason = " ".join(str(error).split())[:120]
        if isinstance(text, str):
            raise ConfigError(f"the prompt {text[:60]!r} is not in compel's syntax ({reason}).") from None
        whole = "".join(words for words, _ in text)
        raise ConfigError(f"the prompt {whole[:60]!r} cannot be encoded by compel ({reason}). Shorten it.") from None
    return (found[0], found[1]) if isinstance(found, tuple | list) else (found, None)


def _of_pieces(compel: Any, pieces: list[tuple[str, float]]) -> tuple[Any, Any]:
    """The same past compel's parser, to which `c++`, quotes and `.swap(` would say more than they do in A1111.

    What BREAK parts is encoded by itself, 75 tokens or a multiple of them; the pooled embedding is of the first part.
    """
    from compel.prompt_parser import Conjunction, FlattenedPrompt

    chunks: list[list[tuple[str, float]]] = [[]]
    for piece in pieces:
        if piece[0] == "BREAK":
            chunks.append([])
        else:
            chunks[-1].append(piece)
    prompts = Conjunction([FlattenedPrompt(chunk or [("", 1.0)]) for chunk in chunks])
    hidden, _ = compel.build_conditioning_tensor_for_conjunction(prompts)
    if not compel.requires_pooled:
        return hidden, None
    whole = "".join(text for text, _ in chunks[0])
    return hidden, compel.conditioning_provider.get_pooled_embeddings([whole], device=compel.device)


class _WithTextModel:
    """A text encoder with the level `text_model`, which transformers 5.6 dropped and compel still looks for."""

    def __init__(self, encoder: Any) -> None:
        self._encoder, self.text_model = encoder, getattr(encoder, "text_model", encoder)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._encoder(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)


def _encoders(base: Base) -> list[Any]:
    """A compel for each text encoder."""
    try:
        from compel import Compel, ReturnedEmbeddingsType
    except ImportError:
        raise ConfigError(
            "weighted words and long prompts need the package compel: pip install 'sfumato[prompts]', or use "
            "--prompt-syntax plain."
        ) from None
    is_sdxl = len(base.text_encoders) > 1
    kinds = {
        (False, 0): ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED,
        (False, 1): ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NORMALIZED,
        (True, 0): ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
    }
    if (is_sdxl, base.clip_skip or 0) not in kinds:
        raise ConfigError(f"--clip-skip {base.clip_skip} does not go with --prompt-syntax; leave one of them.")
    last = len(base.text_encoders) - 1
    return [
        Compel(
            tokenizer=tokenizer,
            text_encoder=_WithTextModel(encoder),
            returned_embeddings_type=kinds[is_sdxl, base.clip_skip or 0],
            requires_pooled=is_sdxl and place == last,
            truncate_long_prompts=False,
            device=str(base.precision.device),
        )
        for place, (tokenizer, encoder) in enumerate(zip(base.tokenizers, base.text_encoders, strict=True))
    ]
