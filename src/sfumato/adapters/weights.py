"""What a user says about an adapter: its file, its weight, its label. Imports no torch.

From where to where in the denoising an adapter counts. Imports no torch.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from sfumato.adapters.blocks import Blocks
from sfumato.errors import AdapterError, ConfigError
from sfumato.files.module_names import DENOISERS

WEIGHT_LIMIT = 10.0
"""Largest weight, either sign. Usual weights are within -2 to 2; a larger one is a typing error (08 for 0.8)."""

Weight = float | tuple[float, float] | Blocks
"""One weight for the whole adapter, two as (U-Net, text encoders), or Blocks with factors by block."""


@dataclass(frozen=True)
class Adapter:
    """An adapter file, its weight, and its label in the mix.

    weight: from -10 to 10; or two, for the U-Net and for the text encoders; or Blocks, by block. name: the label, with
    any characters; by default the file's name without its suffix. Raises AdapterError for an invalid weight.
    """

    path: str | os.PathLike[str]
    weight: Weight = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise AdapterError(f"an adapter is named by the path of its file, got {type(self.path).__name__}.")
        if self.name is not None and (not isinstance(self.name, str) or not self.name):
            raise AdapterError(f"{Path(self.path).name}: name is a text that is not empty, got {self.name!r}.")
        object.__setattr__(self, "weight", checked_weight(self.label, self.weight))

    @property
    def label(self) -> str:
        """The adapter's name in the mix."""
        if self.name is not None:
            return self.name
        # As a keyboard writes it: macOS has accents in names of files apart from their letters.
        return unicodedata.normalize("NFC", without_suffix(public_name(self.path)))


def public_name(path: str | os.PathLike[str]) -> str:
    """The name of a file or folder without where it lies, which is private; in the hub's cache, whose folders are
    called by hashes, what the hub calls it: owner/name, or owner/name/file.safetensors."""
    parts = Path(path).parts
    for place, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[place + 1] == "snapshots":
            return "/".join([*part.split("--")[1:], *parts[place + 3 :]])
    return Path(path).name


def without_suffix(name: str) -> str:
    """The last part of a file's or folder's name; a folder's keeps its dots ("line v1.5")."""
    return Path(name).name.removesuffix(".safetensors")


def checked_weight(label: str, weight: object) -> Weight:
    """The weight as a float, two, or Blocks; raises AdapterError, one line, for anything that cannot be meant."""
    if isinstance(weight, Blocks):
        plain = checked_weight(label, weight.weight)
        assert not isinstance(plain, Blocks)
        return Blocks(plain, weight.factors, weight.rest)
    if isinstance(weight, tuple | list):
        if len(weight) != 2:
            raise AdapterError(f"{label}: two weights are (U-Net, text encoders), got {len(weight)}.")
        unet, text = (checked_number(label, value) for value in weight)
        return unet if unet == text else (unet, text)
    return checked_number(label, weight)


def checked_number(label: str, value: object) -> float:
    """One weight. Raises AdapterError, one line, for what is no number or beyond the limits."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise AdapterError(f"{label}: a weight is a number, got {type(value).__name__} {_short(value)}.")
    try:
        number = float(value)
    except OverflowError:  # an integer may be too large
        number = WEIGHT_LIMIT + 1
    if not abs(number) <= WEIGHT_LIMIT:  # nor is a nan
        limits = f"-{WEIGHT_LIMIT:g} to {WEIGHT_LIMIT:g}"
        raise AdapterError(f"{label}: weight {_short(value)} is outside {limits}. Most adapters want 0.3 to 1.")
    return number + 0.0  # -0.0 is 0.0


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def weight_at(weight: Weight, part: str, path: str) -> float:
    """The weight of an adapter at one module of the pipeline.

    part: "unet", "text_encoder" or "text_encoder_2". path: the module's name in it. The one place that knows what a
    `Weight` says of a module.
    """
    if isinstance(weight, Blocks):
        return weight_at(weight.weight, part, path) * weight.factor_at(part, path)
    if isinstance(weight, tuple):
        return weight[0] if part in DENOISERS else weight[1]
    return weight


def is_zero_weight(weight: Weight) -> bool:
    """Whether an adapter of this weight counts nowhere."""
    if isinstance(weight, Blocks):
        return is_zero_weight(weight.weight) or not (weight.rest or any(factor for _, factor in weight.factors))
    return not any(weight) if isinstance(weight, tuple) else not weight


def unet_weight(weight: Weight) -> float:
    """The number for the U-Net, before the blocks' factors."""
    plain = weight.weight if isinstance(weight, Blocks) else weight
    return plain[0] if isinstance(plain, tuple) else plain


def replace_unet_weight(weight: Weight, number: float) -> Weight:
    """The weight with another number for the U-Net; text encoders and blocks as they were."""
    if isinstance(weight, Blocks):
        plain = replace_unet_weight(weight.weight, number)
        assert not isinstance(plain, Blocks)
        return Blocks(plain, weight.factors, weight.rest)
    return (number, weight[1] if isinstance(weight, tuple) else weight)


def check_adapters(adapters: Iterable[Any]) -> None:
    """Raises AdapterError for what is given in place of an adapter, such as the file's name alone."""
    for adapter in adapters:
        if not isinstance(adapter, Adapter):
            raise AdapterError(f"an adapter is given as Adapter(file, weight), got {adapter!r:.60}.")


def check_mix(mix: Any, what: str) -> None:
    """Raises AdapterError for what is no mix, such as its pipeline, or one that was undone. what: wants it."""
    if not hasattr(mix, "check_open"):
        raise AdapterError(f"{what} wants the mix that compose gave back, got a {type(mix).__name__}.")
    mix.check_open()


def check_by_label(values: Any, known: Collection[str]) -> None:
    """As `check_labels`, of a dictionary; raises AdapterError for what is none."""
    if not isinstance(values, Mapping):
        raise AdapterError(f"wanted a dictionary by label, such as {{'line': 0.5}}, got {values!r:.60}.")
    check_labels(values, known)


def check_labels(labels: Iterable[str], known: Collection[str]) -> None:
    """Raises AdapterError for a label that none of a mix's adapters has, whose labels are `known`."""
    for label in labels:
        if not isinstance(label, str):
            raise AdapterError(f"a label is a text, and several are given one by one, got {label!r:.60}.")
        if label not in known:
            there = ", ".join(map(repr, known)) or "nothing"
            raise AdapterError(f"no adapter of this mix is called {label!r}; it holds {there}.")


def scale_unet_weight(label: str, weight: Weight, number: float) -> Weight:
    """The weight with another number for the U-Net, and the text encoders' in proportion; factors by block stay.

    Raises AdapterError for what is no weight, and for two weights of which the U-Net's is 0, which has no proportion.
    """
    if isinstance(weight, Blocks):
        return inherit_block_factors(weight, scale_unet_weight(label, weight.weight, number))
    if not isinstance(weight, tuple):
        return checked_weight(label, number)
    if not weight[0]:
        raise AdapterError(
            f"{label}: its weights {format_weight(weight)} are no start for other weights, as the first, the "
            f"U-Net's, is "
            "0. Give one weight, or two such as 1:0.5."
        )
    return checked_weight(label, (number, number * weight[1] / weight[0]))


def inherit_block_factors(old: Weight, new: Weight) -> Weight:
    """The new weight, with the old one's factors by block where it has none of its own."""
    if isinstance(old, Blocks) and not isinstance(new, Blocks):
        return Blocks(new, old.factors, old.rest)
    return new


def add_weights(weight: float | tuple[float, float], other: float | tuple[float, float]) -> tuple[float, float]:
    """Both weights, one or two each, as one (U-Net, text encoders)."""
    (unet, text), more = (each if isinstance(each, tuple) else (each, each) for each in (weight, other))
    return unet + more[0], text + more[1]


def format_weight(weight: Weight) -> str:
    """The weight as people write it: "0.8", or "0.8:0.4" for U-Net and text encoders."""
    if isinstance(weight, Blocks):
        return str(weight)
    return f"{weight[0]:g}:{weight[1]:g}" if isinstance(weight, tuple) else f"{weight:g}"


@dataclass(frozen=True)
class Span:
    """From progress `start` to `end` an adapter has the weight that it has in the mix."""

    start: float
    end: float


def parse_span(text: str, label: str = "") -> Span:
    """The span of START-END in an option --over-steps. label: what stands before it there. Raises ConfigError, one
    line."""
    try:
        start, end = (float(number) for number in text.split("-"))
    except ValueError:
        start = end = 0.0
    if not 0 <= start < end <= 1:
        raise ConfigError(f"--over-steps {label}{text}: wanted START-END, progress from 0 to 1, such as {label}0-0.5.")
    return Span(start, end)
