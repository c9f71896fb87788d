"""Weights that differ by block: `Blocks(0.8, {"down": 0, "up.1": 1.2})`, the web interfaces' lists, B-LoRA's presets.

Imports no torch.

Which modules a mix takes: `up`, `down.1`, `attn2`, `te`, `up.0.attentions.1`, `!mid`. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType

from sfumato.errors import AdapterError
from sfumato.files.module_names import DENOISERS, Target
from sfumato.utils.formatting import format_number

PRESETS: Mapping[str, str] = MappingProxyType(
    {"b-lora-content": "up_blocks.0.attentions.0", "b-lora-style": "up_blocks.0.attentions.1"}
)
"""B-LoRA, Frenkel et al. 2024 (arXiv 2403.14572), section 4: which two blocks of SDXL hold content and style."""

ABBREVIATIONS: Mapping[str, str] = MappingProxyType(
    {"down": "down_blocks", "up": "up_blocks", "mid": "mid_block", "te": "text_encoder", "te1": "text_encoder"}
    | {"te2": "text_encoder_2"}
)
"""Short forms of a name's first part."""


def select_modules(targets: Iterable[Target], words: str) -> set[Target]:
    """The modules that the comma-separated words name.

    A word is a run of the parts of `unet.down_blocks.0....attn2.to_k`, from anywhere in it, with down, mid, up, te and
    te2 for short; or a preset. `!word` takes modules out, of all where nothing else is named.
    Raises AdapterError for a word that names none of the modules.
    """
    known = list(targets)
    wanted, unwanted = set[Target](), set[Target]()
    given = [word.strip() for word in words.split(",") if word.strip()]
    for word in given:
        found = {target for target in known if matches_module(word.removeprefix("!"), target)}
        if not found:
            raise AdapterError(
                f"blocks {word!r}: names none of the {len(known)} modules. Wanted such as up, down.1, mid, attn2, te, "
                f"up.0.attentions.1 or {', '.join(PRESETS)}, perhaps after !."
            )
        (unwanted if word.startswith("!") else wanted).update(found)
    if not any(not word.startswith("!") for word in given):
        wanted = set(known)
    return wanted - unwanted


def matches_module(word: str, target: Target) -> bool:
    """Whether the word names this module."""
    parts = PRESETS.get(word, word).split(".")
    parts[0] = ABBREVIATIONS.get(parts[0], parts[0])
    return f".{'.'.join(parts)}." in f".{target[0]}.{target[1]}."


LISTS: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        # sd-webui-lora-block-weight's README: LoRA and LyCORIS on SD 1.x and 2.x, then both on SDXL.
        17: ("BASE", *(f"IN{n:02}" for n in (1, 2, 4, 5, 7, 8)), "M00", *(f"OUT{n:02}" for n in range(3, 12))),
        26: ("BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))),
        12: ("BASE", *(f"IN{n:02}" for n in (4, 5, 7, 8)), "M00", *(f"OUT{n:02}" for n in range(6))),
        20: ("BASE", *(f"IN{n:02}" for n in range(9)), "M00", *(f"OUT{n:02}" for n in range(9))),
    }
)
"""What the numbers of a block-weight list of each length are for; BASE is the text encoders."""

_NO_BLOCK: Mapping[str, float] = MappingProxyType(dict.fromkeys(LISTS[26], 0.0))

LBW_PRESETS: Mapping[str, str] = MappingProxyType(
    {
        # sd-webui-lora-block-weight's own; each is a list of 17.
        "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
        "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
        "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
        "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
        "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
        "ALL0.5": "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5",
    }
)
"""The web interfaces' names of lists."""


@dataclass(frozen=True)
class Blocks:
    """A weight with a factor for each block.

    weight: as of an adapter without blocks. factors: by name: `down`, `mid`, `up`, `te`; `down.1`, `up.0.attentions.1`,
    any run of a module path's parts; `IN04`, `M00`, `OUT07`, `BASE` as the web interfaces count. Of several names that
    fit a module the longest counts. rest: the factor of modules that none names. Raises AdapterError for a factor that
    is no number.
    """

    weight: float | tuple[float, float] = 1.0
    factors: tuple[tuple[str, float], ...] = ()
    rest: float = 1.0

    def __init__(
        self,
        weight: float | tuple[float, float] = 1.0,
        factors: Mapping[str, float] | Sequence[tuple[str, float]] = (),
        rest: float = 1.0,
    ) -> None:
        listed = list(factors.items() if isinstance(factors, Mapping) else factors or ())
        of_two = all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in listed)
        if isinstance(factors, str) or not of_two or not all(isinstance(pair[0], str) for pair in listed):
            raise AdapterError(
                f"blocks {factors!r:.60}: wanted factors by name, such as {{'down': 0}}; Blocks.parse reads texts."
            )
        pairs = tuple(sorted(listed))
        for name, factor in (*pairs, ("the rest", rest)):
            if isinstance(factor, bool) or not isinstance(factor, Real) or not math.isfinite(factor):
                raise AdapterError(f"blocks: the factor of {name} is {factor!r:.40}; wanted a number, usually 0 to 1.")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "factors", tuple((name, float(factor)) for name, factor in pairs))
        object.__setattr__(self, "rest", float(rest))

    @classmethod
    def parse(cls, weight: float | tuple[float, float], text: str) -> Blocks:
        """`down:0,up.1:1.2`, `rest:0,mid:1`, a preset (`b-lora-style`, `MIDD`), or a list of 12, 17, 20 or 26 numbers.

        Raises AdapterError, one line, for anything else.
        """
        text = LBW_PRESETS.get(text.strip(), text)
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not words:
            raise AdapterError("blocks '': no block is named; wanted such as down:0.3,up.1:1.2.")
        if len(words) == 1 and words[0] in PRESETS:
            return cls(weight, {PRESETS[words[0]]: 1.0}, rest=0.0)
        if all(_is_number(word) for word in words):
            names = LISTS.get(len(words))
            if names is None:
                raise AdapterError(
                    f"blocks {text[:60]!r}: a block-weight list has 17 or 26 numbers (SD, the second with "
                    f"convolutions), 12 or 20 (SDXL); this has {len(words)}."
                )
            # Blocks that a list leaves out are off, and what is in no block, as time and output layers, counts whole.
            return cls(weight, {**_NO_BLOCK, **dict(zip(names, map(float, words), strict=True))})
        factors: dict[str, float] = {}
        for word in words:
            name, colon, number = word.rpartition(":")
            if not colon or not name or not _is_number(number):
                raise AdapterError(
                    f"blocks {word!r}: wanted NAME:FACTOR such as up.1:0.5, numbers alone, or one of "
                    f"{', '.join([*PRESETS, *LBW_PRESETS])}."
                )
            if name in factors:
                raise AdapterError(f"blocks {text[:60]!r}: {name} has two factors; leave one.")
            factors[name] = float(number)
        if not factors:
            raise AdapterError("blocks: nothing is named; wanted NAME:FACTOR such as down:0,up:1.")
        return cls(weight, factors, rest=factors.pop("rest", 1.0))

    @staticmethod
    def has_factors(text: str) -> bool:
        """Whether the text gives factors, as `parse` reads them, and does not only choose blocks."""
        words = [word.strip() for word in text.split(",")]
        return text.strip() in LBW_PRESETS or any(":" in word for word in words) or all(map(_is_number, words))

    def factors_text(self) -> str:
        """The factors as `parse` reads them: as a list where they are one, else by name."""
        known = dict(self.factors)
        is_list = known.keys() == _NO_BLOCK.keys() and self.rest == 1
        for _, names in sorted(LISTS.items()) if is_list else ():
            if not any(known[name] for name in known.keys() - set(names)):
                return ",".join(format_number(known[name]) for name in names)
        each = ",".join(f"{name}:{format_number(factor)}" for name, factor in self.factors)
        return each if each and self.rest == 1 else f"{each},rest:{format_number(self.rest)}".lstrip(",")

    def factor_at(self, part: str, path: str) -> float:
        """The factor of one module; part and path as in `weight_at`."""
        known = dict(self.factors)
        found = [name for name in known if matches_block(name, part, path)]
        return known[max(found, key=_exactness)] if found else self.rest

    def unnamed(self, modules: Sequence[tuple[str, str]]) -> list[str]:
        """The names that fit none of these (part, path), misspelt perhaps; those of a list are never misspelt."""
        listed = {name for names in LISTS.values() for name in names}
        return [
            name
            for name, _ in self.factors
            if name not in listed and not any(matches_block(name, *at) for at in modules)
        ]

    def __str__(self) -> str:
        weights = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        return f"{':'.join(map(format_number, weights))} on {self.factors_text()}"


def lbw_block(part: str, path: str) -> str | None:
    """The block of a module as the web interfaces count: IN00 ..., M00, OUT00 ..., BASE; None for time and output.

    Stable Diffusion's first code counts what diffusers nests: a level's two layers and its downsampler are three input
    blocks, and three output blocks are a level, whose last holds the upsampler.
    """
    if part not in DENOISERS:
        return "BASE"
    if path.startswith("conv_in"):
        return "IN00"
    if path.startswith("mid_block"):
        return "M00"
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", path)
    if found is None:
        return None
    level, kind, place = int(found[2]), found[3], int(found[4])
    if found[1] == "down":
        return f"IN{3 * level + (3 if kind == 'downsamplers' else 1 + place):02}"
    return f"OUT{3 * level + (2 if kind == 'upsamplers' else place):02}"


def matches_block(name: str, part: str, path: str) -> bool:
    """Whether the name is one of this module, as `Blocks` has names: `up.1`, `attn2`, `te`, `IN04`, `BASE`."""
    if re.fullmatch(r"(IN|OUT)\d\d|M00|BASE", name):
        return lbw_block(part, path) == name
    return matches_module(name, (part, path))


def _exactness(name: str) -> tuple[int, int]:
    return len(name.split(".")), len(name)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
