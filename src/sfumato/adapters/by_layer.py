"""Ranks and learning rates that layers have by their names: `--rank-of up.1=8`, `--rate-of IN04,IN05=0.5`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.adapters.targets import TARGETS
from sfumato.adapters.whole import Host
from sfumato.errors import AdapterError, ConfigError
from sfumato.files.kohya import Target
from sfumato.weighting.blocks import is_named

_NAMES = re.compile(r"[\w.,-]+")
"""A pattern of these signs alone is names between commas; any other is a regular expression."""


@dataclass(frozen=True)
class Rule:
    """What `option` gives the layers of a pattern. text: as it was given. value: a rank or a factor of the learning
    rate; of 0 a layer is not adapted. alpha: that beside a rank, None for the one that keeps the scale."""

    option: str
    text: str
    pattern: str
    value: float
    alpha: float | None = None

    def __str__(self) -> str:
        return f"{self.option} {self.text}"

    def words(self) -> Sequence[str]:
        """What the pattern consists of: its names, or itself."""
        is_names = self.pattern not in TARGETS and _NAMES.fullmatch(self.pattern)
        return [word for word in self.pattern.split(",") if word] if is_names else [self.pattern]

    def fits(self, part: str, path: str) -> bool:
        """Whether the pattern is one of this layer."""
        return any(_fits(word, part, path) for word in self.words())


def _fits(word: str, part: str, path: str) -> bool:
    if word in TARGETS:
        return part == "unet" and re.search(TARGETS[word], path) is not None
    return is_named(word, part, path) if _NAMES.fullmatch(word) else re.search(word, path) is not None


@dataclass(frozen=True)
class ByLayer:
    """The rules on ranks and on rates; of each the first that fits a layer counts, as in sd-scripts' regular
    expressions (network_reg_dims)."""

    ranks: tuple[Rule, ...] = ()
    rates: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, config: Any) -> ByLayer:
        """What a config's `rank_of` and `rate_of` say, of which it may lack the second. Raises ConfigError for what
        cannot be meant."""
        return cls(tuple(map(_rank_rule, config.rank_of)), tuple(map(_rate_rule, getattr(config, "rate_of", ()))))

    def rank_at(self, part: str, path: str) -> Rule | None:
        """The rule on a layer's rank; None where it has that of the others."""
        return next((rule for rule in self.ranks if rule.fits(part, path)), None)

    def rate_at(self, part: str, path: str) -> Rule | None:
        """The rule on a layer's rate; None where it has that of its part."""
        return next((rule for rule in self.rates if rule.fits(part, path)), None)

    def factor_at(self, part: str, path: str) -> float:
        """What a layer's learning rate is multiplied with."""
        rule = self.rate_at(part, path)
        return 1.0 if rule is None else rule.value

    def leaves_out(self, part: str, path: str) -> bool:
        """Whether a layer's rank or rate is 0, so that it is not adapted."""
        return any(rule is not None and not rule.value for rule in (self.rank_at(part, path), self.rate_at(part, path)))

    def without_left_out(self, parts: Mapping[str, Mapping[str, Host]]) -> dict[str, dict[str, Host]]:
        """The layers of `parts` whose rank and rate are not 0."""
        return {
            part: {path: host for path, host in some.items() if not self.leaves_out(part, path)}
            for part, some in parts.items()
        }

    def kept(self, parts: Mapping[str, Mapping[str, Host]]) -> dict[str, dict[str, Host]]:
        """The layers that are adapted, as `without_left_out`, and no part without any.

        Raises AdapterError for a rule that counts for no layer, and where no layer of the U-Net, or none of the text
        encoders, is left.
        """
        layers = [(part, path) for part, some in parts.items() for path in some]
        _refuse_idle(self.ranks, layers, self.rank_at, self.rate_at)
        _refuse_idle(self.rates, layers, self.rate_at, self.rank_at)
        found = self.without_left_out(parts)
        if not found.get("unet", True):
            raise AdapterError("--rank-of and --rate-of leave no layer of the U-Net to adapt; leave fewer out.")
        texts = [some for part, some in found.items() if part != "unet"]
        if texts and not any(texts):
            raise AdapterError(
                "--rank-of and --rate-of leave no layer of the text encoders to adapt; leave --train-text-encoder out."
            )
        return {part: some for part, some in found.items() if some}

    def as_network_args(self) -> dict[str, str]:
        """What a file's metadata say of them, beside the other --network_args."""
        told = {"rank_of": self.ranks, "rate_of": self.rates}
        return {name: " ".join(rule.text for rule in rules) for name, rules in told.items() if rules}


EQUAL = ByLayer()
"""No rules: all layers have the rank and the rate of the others."""
_RuleAt = Callable[[str, str], Rule | None]


def _refuse_idle(rules: Sequence[Rule], layers: Sequence[Target], own: _RuleAt, other: _RuleAt) -> None:
    """Raises AdapterError for a rule that counts for none of the layers. own: the rule of these that counts for a
    layer. other: that on its rate beside its rank, or the reverse."""
    for rule in rules:
        for word in rule.words():
            if not any(_fits(word, *layer) for layer in layers):
                raise AdapterError(_unknown(rule, word, layers))
        counts_for = [layer for layer in layers if own(*layer) is rule]
        if not counts_for:
            raise AdapterError(
                f"{rule}: rules before it have all of its layers, and the first that fits counts; give it before them, "
                "or leave it out."
            )
        beside = [other(*layer) for layer in counts_for]
        if all(each is not None and not each.value for each in beside):
            raise AdapterError(f"{rule}: {beside[0]} leaves all of its layers out; give one of the two.")


def _unknown(rule: Rule, word: str, layers: Sequence[Target]) -> str:
    """What to say of a word that names none of these layers: the first of each part's blocks are examples."""
    examples: dict[tuple[str, str], str] = {}
    for part, path in layers:
        examples.setdefault((part, path.split(".")[0]), path)
    named = "" if word == rule.pattern else f"{word} "
    return (
        f"{rule}: {named}names none of the {len(layers)} adapted layers, such as "
        f"{', '.join(list(examples.values())[:3])}; wanted down, up.1, IN04, attn2, te, or a regular expression "
        r"such as \.to_(k|v)$."
    )


def _rank_rule(text: str) -> Rule:
    """PATTERN=RANK or PATTERN=RANK:ALPHA."""
    wanted = "wanted PATTERN=RANK, or PATTERN=RANK:ALPHA, such as up.1=8, mid=8:4, or te=0 to leave it out"
    pattern, numbers = _split("--rank-of", text, wanted)
    number, colon, alpha_text = numbers.partition(":")
    try:
        rank, alpha = int(number), float(alpha_text) if colon else None
    except ValueError:
        raise ConfigError(f"--rank-of {text!r:.80}: {wanted}.") from None
    if not 0 <= rank < 2**31 or not (alpha is None or 0 < alpha < math.inf):
        raise ConfigError(f"--rank-of {text!r:.80}: a rank is 0 or more, and an alpha a positive number; {wanted}.")
    if alpha is not None and not rank:
        raise ConfigError(f"--rank-of {text!r:.80}: an alpha has no effect beside a rank of 0; leave it out.")
    return Rule("--rank-of", text, pattern, rank, alpha)


def _rate_rule(text: str) -> Rule:
    """PATTERN=FACTOR."""
    wanted = "wanted PATTERN=FACTOR, such as up.1=0.5, or mid=0 to leave it out"
    pattern, number = _split("--rate-of", text, wanted)
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not 0 <= factor < math.inf:
        raise ConfigError(f"--rate-of {text!r:.80}: {wanted}.")
    return Rule("--rate-of", text, pattern, factor)


def _split(option: str, text: str, wanted: str) -> tuple[str, str]:
    """What stands before and after the last = of a rule. Raises ConfigError for what is none."""
    pattern, _, number = (part.strip() for part in text.rpartition("="))
    if not pattern or not pattern.strip(","):
        raise ConfigError(f"{option} {text!r:.80}: {wanted}.")
    if pattern not in TARGETS and not _NAMES.fullmatch(pattern):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{option} {text!r:.80}: no regular expression ({error}).") from None
    return pattern, number
