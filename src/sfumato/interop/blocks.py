"""sd-scripts' ranks, alphas and shares of the learning rate by block of the U-Net, as rules by layer.

Names, defaults and meanings are those of create_network, get_block_dims_and_alphas and get_block_lr_weight in its
networks/lora.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from sfumato.errors import ConfigError
from sfumato.interop.settings import ForeignSettings, Recipe
from sfumato.utils.formatting import format_number

OF_BLOCKS = (
    "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold",
    "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas",
)  # fmt: skip
OF_PATTERNS = ("network_reg_dims", "network_reg_lrs")
Value = TypeVar("Value")
Rank = tuple[int, float]
"""A rank and its alpha."""
NONE: Rank = (0, 0.0)
"""That of what is not adapted."""


@dataclass(frozen=True)
class Block:
    """name: as of a rule. convolutions: what matches those of more than 1x1, "" where it has none. layers: whether it
    has others, and in_transformers: whether some of these are adapted where convolutions are not."""

    name: str
    convolutions: str
    layers: bool = True
    in_transformers: bool = False


def _level(direction: str, place: int, attended: Callable[[int], bool]) -> Block:
    """Of a level's three blocks one; the third of the way down is its downsampler alone, of the way up its last layer
    with its upsampler. attended: whether a level has attention."""
    level, layer = divmod(place - 1 if direction == "down" else place, 3)
    name = f"{'IN' if direction == 'down' else 'OUT'}{place:02}"
    if direction == "down" and layer == 2:
        return Block(name, rf"down_blocks\.{level}\.downsamplers\.0\.conv", layers=False)
    convolutions = rf"{direction}_blocks\.{level}\.resnets\.{layer}\.conv[12]"
    if direction == "up" and layer == 2:
        convolutions += rf"|up_blocks\.{level}\.upsamplers\.0\.conv"
    return Block(name, convolutions, in_transformers=attended(level))


_SD = (
    None,  # its first convolution, which is not adapted
    *(_level("down", place, lambda level: level < 3) for place in range(1, 12)),
    Block("M00", r"mid_block\.resnets\.\d\.conv[12]", in_transformers=True),
    *(_level("up", place, lambda level: level > 0) for place in range(12)),
)
_SDXL = (
    None,  # the embeddings of time and size, which are not adapted
    None,
    *(_level("down", place, lambda level: level > 0) for place in range(1, 9)),
    Block("mid.resnets.0", r"mid_block\.resnets\.0\.conv[12]"),
    Block("mid.attentions.0", "", in_transformers=True),
    Block("mid.resnets.1", r"mid_block\.resnets\.1\.conv[12]"),
    *(_level("up", place, lambda level: level < 2) for place in range(9)),
    None,  # its last convolution
)
"""The blocks of their lists, by place."""


def convert_block_settings(asked: ForeignSettings, recipe: Recipe, args: dict[str, str], *, is_sdxl: bool) -> None:
    """Take what the network's arguments say of blocks and of convolutions, as ranks and rules of the recipe, whose rank
    and alpha are known. Raises ConfigError for what sd-scripts refuses."""
    given = {key: args.pop(key) for key in OF_BLOCKS if key in args}
    conv_dim = asked.as_whole("conv_dim", args.pop("conv_dim")) if "conv_dim" in args else None
    conv_alpha = asked.as_number("conv_alpha", args.pop("conv_alpha")) if "conv_alpha" in args else None
    blocks = _SDXL if is_sdxl else _SD
    weights = _weights(asked, given, recipe.notes, is_sdxl=is_sdxl)
    if weights is None and "block_dims" not in given:
        recipe.notes += [
            f"network_args {key}={value}: does nothing there without block_dims or an lr_weight"
            for key, value in given.items()
        ]
        recipe.say("targets", None, "transformers" if conv_dim is None else "everything")
        if conv_dim is not None:
            recipe.say("conv_rank", conv_dim)
            recipe.say("conv_alpha", float(conv_dim) if conv_alpha == 0 else conv_alpha, 1.0)  # 0 is the rank there
        return

    plain = _rank(int(recipe.values["rank"]), float(recipe.values["alpha"]))
    layers, wide = _ranks(asked, given, len(blocks), conv_dim, conv_alpha)
    if weights is not None:
        layers = [rank if weight else NONE for rank, weight in zip(layers, weights, strict=True)]
        wide = wide and [rank if weight else NONE for rank, weight in zip(wide, weights, strict=True)]
    adapted: dict[Block, tuple[Rank | None, Rank | None]] = {}
    rates: dict[str, float] = {}
    for place, block in enumerate(blocks):
        if block is None:
            continue
        is_there = block.in_transformers if wide is None else block.layers
        found = layers[place] if is_there else None, wide[place] if wide and block.convolutions else None
        if any(rank is not None for rank in found):
            adapted[block] = found
        if weights is not None and any(rank not in (None, NONE) for rank in found):
            rates[block.name] = weights[place]
    _say_ranks(recipe, adapted, plain)
    recipe.say("targets", None, "transformers" if wide is None else "everything")
    rules = [f"{','.join(names)}={format_number(rate)}" for rate, names in _grouped(rates) if rate != 1]
    recipe.say("rate_of", rules or None)


def _say_ranks(recipe: Recipe, adapted: Mapping[Block, tuple[Rank | None, Rank | None]], plain: Rank) -> None:
    """Rules for the ranks of the blocks' (other layers, convolutions). The first that fits a layer counts, so that
    those of convolutions stand before those of whole blocks. plain: rank and alpha of what no rule fits."""
    alike: list[Rank] = [wide for own, wide in adapted.values() if wide not in (None, NONE) and own in (None, plain)]
    # The most frequent where no rule on the whole block is: --conv-rank is for convolutions without a rule.
    usual = Counter(alike).most_common(1)[0][0] if alike else plain
    if alike:
        recipe.say("conv_rank", usual[0])
        recipe.say("conv_alpha", usual[1])
    whole: dict[str, Rank] = {}
    convolutions: dict[str, Rank] = {}
    for block, (own, wide) in adapted.items():
        of_block, otherwise = (wide, usual) if own is None else (own, plain)
        assert of_block is not None
        if of_block != otherwise:
            whole[block.name] = of_block
        if own is not None and wide is not None and wide != (own if block.name in whole else usual):
            convolutions[block.convolutions] = wide
    rules = [f"^({'|'.join(patterns)})$={_text(rank)}" for rank, patterns in _grouped(convolutions)]
    rules += [f"{','.join(names)}={_text(rank)}" for rank, names in _grouped(whole)]
    recipe.say("rank_of", rules or None)


def _ranks(
    asked: ForeignSettings, given: Mapping[str, str], count: int, conv_dim: int | None, conv_alpha: float | None
) -> tuple[list[Rank], list[Rank] | None]:
    """By place the ranks of layers, and those of convolutions of more than 1x1; None where these are not adapted."""

    def numbers(key: str, otherwise: float) -> list[float]:
        found = [asked.as_number(key, each) for each in given[key].split(",")] if key in given else [otherwise] * count
        if len(found) != count:
            raise ConfigError(f"{asked.name}: {key} has {len(found)} numbers; sd-scripts wants {count} of this model.")
        return found

    def ranks(dims: str, dim: int, alphas: str, alpha: float) -> list[Rank]:
        pairs = zip(numbers(dims, dim), numbers(alphas, alpha), strict=True)
        return [_rank(asked.as_whole(dims, own), of_it) for own, of_it in pairs]

    layers = ranks(
        "block_dims", asked.whole("network_dim") or 4, "block_alphas", asked.number("network_alpha", 1.0) or 0.0
    )
    alpha = 1.0 if conv_alpha is None else conv_alpha
    if "conv_block_dims" in given:
        return layers, ranks("conv_block_dims", 0, "conv_block_alphas", alpha)
    return layers, None if conv_dim is None else [_rank(conv_dim, alpha)] * count


def _rank(dim: int, alpha: float) -> Rank:
    """An alpha of 0 is the rank there."""
    return (dim, alpha or float(dim)) if dim else NONE


def _weights(
    asked: ForeignSettings, given: Mapping[str, str], notes: list[str], *, is_sdxl: bool
) -> list[float] | None:
    """By place what the learning rate is multiplied with; None where nothing is said of that."""
    parts = {"down_lr_weight": 9 if is_sdxl else 12, "mid_lr_weight": 3 if is_sdxl else 1}
    parts["up_lr_weight"] = parts["down_lr_weight"]
    if not parts.keys() & given.keys():
        return None
    least = asked.as_number("block_lr_zero_threshold", given.get("block_lr_zero_threshold", 0))
    found: list[float] = []
    for key, count in parts.items():
        if (text := given.get(key)) is None:
            found += [1.0] * count
            continue
        if "," in text or key == "mid_lr_weight":
            listed = [asked.as_number(key, each) if each.strip() else 0.0 for each in text.split(",")]
        elif (preset := _preset(asked, key, text, count)) is not None:
            listed = preset
        else:
            notes.append(f"network_args {key}={text}: neither numbers nor a curve's name there, and so 1 in each block")
            found += [1.0] * count
            continue
        listed = (listed + [1.0] * count)[:count]
        found += [weight if weight > least else 0.0 for weight in listed]
    return [1.0, *found, 1.0] if is_sdxl else found


def _preset(asked: ForeignSettings, key: str, text: str, count: int) -> list[float] | None:
    """The numbers of a curve, such as sine or cosine+0.5; None for what is none."""
    name, plus, base = text.partition("+")
    rising = [place / (count - 1) for place in range(count)]
    curves = {
        "sine": [math.sin(math.pi * share / 2) for share in rising],
        "cosine": [math.sin(math.pi * share / 2) for share in reversed(rising)],
        "linear": rising,
        "reverse_linear": rising[::-1],
        "zeros": [0.0] * count,
    }
    if name not in curves:
        return None
    added = asked.as_number(key, base.partition("+")[0]) if plus else 0.0
    return [number + added for number in curves[name]]


def _grouped(values: Mapping[str, Value]) -> list[tuple[Value, list[str]]]:
    """Each value, and the names that have it."""
    found: dict[Value, list[str]] = {}
    for name, value in values.items():
        found.setdefault(value, []).append(name)
    return list(found.items())


def _text(rank: Rank) -> str:
    """As in a rule."""
    return f"{rank[0]}:{format_number(rank[1])}" if rank != NONE else "0"
