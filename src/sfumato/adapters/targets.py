"""Which layers of a frozen model an adapter changes, by the names of sets of them.

Ranks and learning rates that layers have by their names: `--rank-of up.1=8`, `--rate-of IN04,IN05=0.5`.

Ranks beside the layers that have them, and what rank layers have room for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from sfumato.adapters.blocks import matches_block
from sfumato.adapters.layers import BaseLayer
from sfumato.errors import AdapterError, ConfigError
from sfumato.files.kinds import ModuleAdapter
from sfumato.files.module_names import DENOISERS, Target
from sfumato.utils.formatting import pluralize

_ATTENTION = r"\.attn[12]\.to_(q|k|v|out\.0)$"
_PROJECTIONS = r"\.attentions\.\d+\.proj_(in|out)$"
_MLP = r"\.ff\.net\.(0\.proj|2)$"
# What LyCORIS calls LoCon: all of the blocks, but neither the first and last convolution nor the time embedding, which
# sd-scripts would pass over in silence.
_BLOCKS = r"^(down_blocks|mid_block|up_blocks)\."

TARGETS: Mapping[str, str] = {
    "cross-attention": r"\.attn2\.to_(q|k|v|out\.0)$",
    "attention": _ATTENTION,
    "attention+mlp": rf"{_ATTENTION}|{_MLP}",
    "transformers": rf"{_ATTENTION}|{_MLP}|{_PROJECTIONS}",
    "everything": _BLOCKS,
}
"""Names of sets of U-Net layers, as regular expressions that are searched in a layer's module path. transformers
is what sd-scripts adapts unless told otherwise."""

TEXT_TARGETS = r"\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"
CONV_TARGETS = r"\.(conv1|conv2|conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv)$"


def select(
    model: nn.Module, pattern: str, *, conv: bool = False, named: Mapping[str, str] | None = None
) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions of `model` whose module path matches `pattern`; with `conv` also its blocks'
    convolutions, whatever the pattern.

    named: sets of layers by name, of the model's family; None for those of a U-Net, `TARGETS`. 1x1 convolutions count
    as linear ones, which they are. An empty choice is an AdapterError.
    """
    sets = TARGETS if named is None else named
    if not pattern.strip():
        raise AdapterError(f"--targets is empty; give one of {', '.join(sets)}, or a regular expression.")
    expression = sets.get(pattern, pattern)
    try:
        compiled = re.compile(f"(?:{expression})" + (f"|(?:{CONV_TARGETS})" if conv else ""))
    except re.error as error:
        raise AdapterError(
            f"--targets {pattern!r} is neither one of {', '.join(sets)} nor a regular expression ({error})."
        ) from None
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and compiled.search(name)
    }
    if not chosen:
        raise AdapterError(
            f"--targets {pattern!r} matches none of the model's layers; use one of {', '.join(sets)} or a "
            r"regular expression over names such as down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q."
        )
    return chosen


def modules_around(
    layers: Mapping[str, Mapping[str, nn.Module]],
    parts: Mapping[str, nn.Module],
    kind: type[ModuleAdapter],
    algo: str,
) -> dict[str, dict[str, nn.Module]]:
    """The modules that a kind which changes no weight stands beside: its `hosts` that contain one of the layers, or are
    one. Text encoders may have none; where the denoiser has none, that is an AdapterError."""
    found: dict[str, dict[str, nn.Module]] = {}
    for part, chosen in layers.items():
        within = {".".join(path.split(".")[:end]) for path in chosen for end in range(1, path.count(".") + 2)}
        here = {name: module for name, module in parts[part].named_modules() if name in within}
        found[part] = {name: module for name, module in here.items() if re.search(kind.hosts, name)}
    if not any(found.values()):
        raise AdapterError(
            f"--algo {algo} stands beside modules called {kind.hosts}, and --targets chooses no layer within one; take "
            "--targets attention+mlp, or another set."
        )
    return found


def target_layers(
    parts: Mapping[str, nn.Module], targets: str, *, conv: bool = False, named: Mapping[str, str] | None = None
) -> dict[str, dict[str, nn.Linear | nn.Conv2d]]:
    """What `attach` adapts of each part: by `targets` and `conv` of the denoiser, all of the text encoders' blocks."""
    return {
        part: select(model, targets, conv=conv, named=named) if part in DENOISERS else select(model, TEXT_TARGETS)
        for part, model in parts.items()
    }


Adapted = TypeVar("Adapted", bound=nn.Module)
_NAMES = re.compile(r"[\w.,-]+")
"""A pattern of these signs alone is names between commas; any other is a regular expression."""


@dataclass(frozen=True)
class LayerRule:
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
        return part in DENOISERS and re.search(TARGETS[word], path) is not None
    return matches_block(word, part, path) if _NAMES.fullmatch(word) else re.search(word, path) is not None


@dataclass(frozen=True)
class ByLayer:
    """The rules on ranks and on rates; of each the first that fits a layer counts, as in sd-scripts' regular
    expressions (network_reg_dims)."""

    ranks: tuple[LayerRule, ...] = ()
    rates: tuple[LayerRule, ...] = ()

    @classmethod
    def of(cls, config: Any) -> ByLayer:
        """What a config's `rank_of` and `rate_of` say, of which it may lack the second. Raises ConfigError for what
        cannot be meant."""
        return cls(tuple(map(_rank_rule, config.rank_of)), tuple(map(_rate_rule, getattr(config, "rate_of", ()))))

    def rank_at(self, part: str, path: str) -> LayerRule | None:
        """The rule on a layer's rank; None where it has that of the others."""
        return next((rule for rule in self.ranks if rule.fits(part, path)), None)

    def rate_at(self, part: str, path: str) -> LayerRule | None:
        """The rule on a layer's rate; None where it has that of its part."""
        return next((rule for rule in self.rates if rule.fits(part, path)), None)

    def factor_at(self, part: str, path: str) -> float:
        """What a layer's learning rate is multiplied with."""
        rule = self.rate_at(part, path)
        return 1.0 if rule is None else rule.value

    def is_excluded(self, part: str, path: str) -> bool:
        """Whether a layer's rank or rate is 0, so that it is not adapted."""
        return any(rule is not None and not rule.value for rule in (self.rank_at(part, path), self.rate_at(part, path)))

    def without_excluded(self, parts: Mapping[str, Mapping[str, Adapted]]) -> dict[str, dict[str, Adapted]]:
        """The layers of `parts` whose rank and rate are not 0."""
        return {
            part: {path: host for path, host in some.items() if not self.is_excluded(part, path)}
            for part, some in parts.items()
        }

    def kept(self, parts: Mapping[str, Mapping[str, Adapted]]) -> dict[str, dict[str, Adapted]]:
        """The layers that are adapted, as `without_left_out`, and no part without any.

        Raises AdapterError for a rule that counts for no layer, and where no layer of the U-Net, or none of the text
        encoders, is left.
        """
        layers = [(part, path) for part, some in parts.items() for path in some]
        _refuse_idle(self.ranks, layers, self.rank_at, self.rate_at)
        _refuse_idle(self.rates, layers, self.rate_at, self.rank_at)
        found = self.without_excluded(parts)
        if any(part in DENOISERS and not some for part, some in found.items()):
            raise AdapterError("--rank-of and --rate-of leave no layer of the U-Net to adapt; leave fewer out.")
        texts = [some for part, some in found.items() if part not in DENOISERS]
        if texts and not any(texts):
            raise AdapterError(
                "--rank-of and --rate-of leave no layer of the text encoders to adapt; leave --train-text-encoder out."
            )
        return {part: some for part, some in found.items() if some}

    def as_network_args(self) -> dict[str, str]:
        """What a file's metadata say of them, beside the other --network_args."""
        told = {"rank_of": self.ranks, "rate_of": self.rates}
        return {name: " ".join(rule.text for rule in rules) for name, rules in told.items() if rules}


NO_LAYER_RULES = ByLayer()
"""No rules: all layers have the rank and the rate of the others."""
_RuleAt = Callable[[str, str], LayerRule | None]


def _refuse_idle(rules: Sequence[LayerRule], layers: Sequence[Target], own: _RuleAt, other: _RuleAt) -> None:
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


def _unknown(rule: LayerRule, word: str, layers: Sequence[Target]) -> str:
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


def _rank_rule(text: str) -> LayerRule:
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
    return LayerRule("--rank-of", text, pattern, rank, alpha)


def _rate_rule(text: str) -> LayerRule:
    """PATTERN=FACTOR."""
    wanted = "wanted PATTERN=FACTOR, such as up.1=0.5, or mid=0 to leave it out"
    pattern, number = _split("--rate-of", text, wanted)
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not 0 <= factor < math.inf:
        raise ConfigError(f"--rate-of {text!r:.80}: {wanted}.")
    return LayerRule("--rate-of", text, pattern, factor)


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


@dataclass(frozen=True)
class RankGroup:
    """Layers of one rank, which `given` gave, such as "--rank 4". what: they are called."""

    given: str
    rank: int
    what: str
    hosts: Sequence[BaseLayer]


def group_by_rank(
    parts: Mapping[str, Mapping[str, BaseLayer]],
    rank: int,
    conv_rank: int | None = None,
    by_layer: ByLayer = NO_LAYER_RULES,
) -> list[RankGroup]:
    """The layers by their rank. parts, conv_rank, by_layer: as of `attach`.

    Raises AdapterError where no layer has the convolutions' rank.
    """
    own: dict[LayerRule, list[BaseLayer]] = {}
    wide, others = list[BaseLayer](), list[BaseLayer]()
    for part, some in parts.items():
        for path, host in some.items():
            if (rule := by_layer.rank_at(part, path)) is not None:
                own.setdefault(rule, []).append(host)
            elif conv_rank is not None and is_spatial(host):
                wide.append(host)
            else:
                others.append(host)
    if conv_rank is not None and not wide:
        without = " without a --rank-of" if any(is_spatial(host) for some in own.values() for host in some) else ""
        raise AdapterError(
            f"--conv-rank and --conv-alpha are for convolutions of more than 1x1, and none is adapted{without}; add "
            "--targets everything, or leave them out."
        )
    found = [RankGroup(f"--rank {rank}", rank, "layer", others)]
    found += [RankGroup(f"--conv-rank {conv_rank}", conv_rank, "convolution", wide)] if conv_rank is not None else []
    found += [RankGroup(str(rule), int(rule.value), "layer", hosts) for rule, hosts in own.items()]
    return [some for some in found if some.hosts]


def is_spatial(host: nn.Module) -> bool:
    """Whether the layer is a convolution of more than 1x1, which is what has conv_dim in sd-scripts."""
    return isinstance(host, nn.Conv2d) and math.prod(host.kernel_size) > 1


def narrow_notes(some: RankGroup) -> list[str]:
    """A line on the layers that are narrower than their rank.

    Raises AdapterError where all are: the update would hold more numbers than the layers, and learn no more.
    """
    widths = [min(host.weight.shape[0], host.weight[0].numel()) for host in some.hosts]
    narrow = [width for width in widths if width < some.rank]
    if len(narrow) == len(widths):
        raise AdapterError(
            f"{some.given}: the widest {some.what} has {max(widths)} directions, and a change of it no "
            "more; wanted at most that, of which 4 to 128 is usual."
        )
    if not narrow:
        return []
    are, least, most = "is" if len(narrow) == 1 else "are", min(narrow), max(narrow)
    between = f"{least}" if least == most else f"{least} to {most}"
    return [
        f"{some.given}: {len(narrow)} of {pluralize(len(widths), some.what)} {are} narrower ({between}), "
        "where it takes memory and learns no more"
    ]
