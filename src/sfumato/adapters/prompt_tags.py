"""What a prompt says beside its words: adapters as tags, and sd-scripts' options.

`<lora:name:0.8>` and `<lora:name:0.4:0.8>` (text encoders, then U-Net) are A1111's, as are `te=` and `unet=` in them;
`<lora:name:0.8:lbw=MIDD>` (or a list of numbers, or `lbw=down:0,up.1:1.2`) is that of its extension for weights by
block; `<lyco:...>` is the same. `--n blurry --w 512 --h 768 --d 7 --s 20 --l 7` after a prompt are sd-scripts' options.
Importing this loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.adapters.blocks import LBW_PRESETS, Blocks
from sfumato.adapters.weights import Weight, add_weights, checked_weight
from sfumato.errors import AdapterError, ConfigError

_TAG = re.compile(r"<(?:lora|lyco):([^:<>]*)((?::[^:<>]*)*)>", re.IGNORECASE)
_HYPERNETWORK = re.compile(r"<hypernet:[^<>]*>", re.IGNORECASE)
_BROKEN_TAG = re.compile(r"<(?:lora|lyco):", re.IGNORECASE)
"""The beginning of a tag that lacks its end."""
_NAMED = re.compile(r"([A-Za-z_]\w*)\s*=\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class TaggedPrompt:
    """A prompt without its tags, and the adapters they name with their weights."""

    prompt: str
    adapters: tuple[tuple[str, Weight], ...]


def split_tags(prompt: str) -> TaggedPrompt:
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
    if torn := _BROKEN_TAG.search(plain):
        raise ConfigError(f"the prompt {prompt[:60]!r}: {torn[0]}... is no whole tag; wanted such as <lora:line:0.8>.")
    return TaggedPrompt(" ".join(plain.split()) if adapters else plain, tuple(adapters.items()))


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
    return add_weights(weight, other)


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
        elif word in LBW_PRESETS or "," in word:  # the extension's older form, without lbw=
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
LETTERS: Mapping[str, str] = {name: letter for letter, (name, _) in _FLAGS.items()}
"""How our names are spelt there."""


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
        if key in settings:
            raise ConfigError(f"the prompt {plain[:60]!r}: --{name} is there twice; leave one.")
        try:
            settings[key] = read(value.strip())
        except ValueError:
            raise ConfigError(f"the prompt {plain[:60]!r}: --{name} {value!r:.20} is no number that fits.") from None
    return plain, settings


def without_flags(prompt: str, where: str) -> str:
    """The prompt. Raises ConfigError where it holds options, which `generate` and a training's samples read."""
    plain, settings = split_flags(prompt)
    if settings:
        raise ConfigError(
            f"{where}: options such as {prompt[len(plain) :].strip()[:40]!r} are not read here; leave them out."
        )
    return prompt
