"""Pictures as other hands might have drawn them, made from those that may be seen.

A decoder that has seen four styles rebuilds a fifth badly: a thin black outline comes out grey and soft. A U-Net that
has seen a thing in four styles alone takes these for what the thing is. These changes are of no set in particular. They
give outlines, hatching, gloss, other palettes and grounds, and to the decoder finer things.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Draw = Callable[..., Tensor]
"""Numbers in [0, 1) of a shape."""
Change = Callable[..., Tensor]
"""(b, 3, h, w) in [0, 1], where it is inked, and what draws numbers -> changed; it may leave [0, 1]."""


def restyle_randomly(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """(b, 3, h, w) in [-1, 1] -> the same size and range; each picture is changed with the probability `share`.

    What is done with one is drawn by lot: on average about two of the changes below, in their order.
    """

    rand = _draws(generator, pixels.device)
    drawn = _redrawn(_some(rand, 0.25, _finer, (pixels + 1) / 2), rand)
    by_others = (rand(len(pixels)) < share).view(-1, 1, 1, 1)
    return torch.where(by_others, drawn * 2 - 1, pixels)


HAND_COUNT = 96
"""How many hands have a name."""


def hand_name(hand: int) -> str:
    """The name of one of HAND_COUNT hands: two letters, such as "za"."""
    return "zxqvwjkyhufb"[hand // 8] + "aeiouyrs"[hand % 8]


def restyle(pixels: Tensor, hands: Sequence[int]) -> Tensor:
    """(b, 3, h, w) in [-1, 1] -> the same size and range; each by its hand, which changes every picture alike."""
    shades = (pixels + 1) / 2
    each = [torch.Generator().manual_seed(1000 + hand) for hand in hands]
    drawn = [_redrawn(shades[i : i + 1], _draws(generator, pixels.device)) for i, generator in enumerate(each)]
    return torch.cat(drawn) * 2 - 1


def _draws(generator: torch.Generator, device: torch.device) -> Draw:
    """The generator is the CPU's on every device, so that a hand is the same on all."""
    return lambda *shape: torch.rand(shape, generator=generator).to(device)


def _some(rand: Draw, chance: float, change: Change, plain: Tensor, *given: Any) -> Tensor:
    chosen = (rand(len(plain)) < chance).view(-1, 1, 1, 1)
    return torch.where(chosen, change(plain, *given), plain) if chosen.any() else plain


def _redrawn(drawn: Tensor, rand: Draw) -> Tensor:
    """(b, 3, h, w), both in [0, 1]; some of the changes, in their order."""
    ink = _ink_of(drawn)
    for chance, change in (
        (0.5, _recolored), (0.25, _lit), (0.15, _hatched), (0.35, _outlined), (0.3, _on_a_ground), (0.1, _grained),
    ):  # fmt: skip
        drawn = _some(rand, chance, change, drawn, ink, rand)
    return drawn.clamp(0, 1)


def _ink_of(plain: Tensor) -> Tensor:
    """(b, 1, h, w): 1 where a picture is not white, softly."""
    return ((1 - plain.amin(1, keepdim=True)) * 8).clamp(0, 1)


def _finer(plain: Tensor) -> Tensor:
    """Four pictures of the batch, each half as large."""
    small = F.avg_pool2d(plain, 2)
    rows = [torch.cat([small.roll(k, 0), small.roll(k + 1, 0).flip(3)], 3) for k in (0, 2)]
    return torch.cat(rows, 2)


def _recolored(plain: Tensor, ink: Tensor, rand: Draw) -> Tensor:
    """Another palette; white stays white: absorbances are mixed by a rotation of hue, and scaled."""
    n = len(plain)
    angle, strength = rand(n) * 2 * math.pi, (0.4 + 1.2 * rand(n)).view(-1, 1, 1)
    third = torch.tensor([0.0, 2.0, 4.0], device=plain.device) * math.pi / 3
    places = third.view(1, 3, 1) - third.view(1, 1, 3)
    mixing = (1 + 2 * torch.cos(places + angle.view(-1, 1, 1))) / 3  # around grey, by the angle
    saturation = (1.5 * rand(n)).view(-1, 1, 1)
    mixing = saturation * mixing + (1 - saturation) / 3
    absorbed = torch.einsum("bij,bjhw->bihw", mixing * strength, 1 - plain)
    return 1 - absorbed.clamp(0, 1)


def _smooth(n: int, channels: int, cells: int, size: tuple[int, ...], rand: Draw) -> Tensor:
    """(n, channels, *size) of smooth noise around 0, to about 0.5."""
    return F.interpolate(rand(n, channels, cells, cells) - 0.5, size=size, mode="bicubic", align_corners=False)


def _lit(plain: Tensor, ink: Tensor, rand: Draw) -> Tensor:
    """Light and shade over what is inked, with a white gloss where there is most light."""
    light = _smooth(len(plain), 1, 5, plain.shape[2:], rand)
    gloss = ((light - 0.28) * 12).clamp(0, 1)
    return plain + ink * (0.8 * light * (0.3 + plain) + gloss * (1 - plain))


def _hatched(plain: Tensor, ink: Tensor, rand: Draw) -> Tensor:
    """Stripes over what is inked, 3 to 10 pixels apart."""
    n, height, width = len(plain), *plain.shape[2:]
    angle, period = rand(n) * math.pi, 3 + 7 * rand(n)
    rows, columns = (torch.arange(float(side), device=plain.device) for side in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    across = x * angle.cos().view(-1, 1, 1) + y * angle.sin().view(-1, 1, 1)
    wave = torch.sin(2 * math.pi * across / period.view(-1, 1, 1)).unsqueeze(1)
    strength = (0.5 * rand(n)).view(-1, 1, 1, 1)
    return plain - ink * strength * (wave * 2).clamp(0, 1)


def _outlined(plain: Tensor, ink: Tensor, rand: Draw) -> Tensor:
    """Lines where colors meet, one to two and a half pixels wide, often black, over the colors or over blank paper."""
    n, size = len(plain), plain.shape[2:]
    large = F.interpolate(plain, scale_factor=2.0, mode="bilinear", align_corners=False)
    step = F.max_pool2d(large, 3, 1, 1) + F.max_pool2d(-large, 3, 1, 1)
    line = ((step.amax(1, keepdim=True) - 0.12 - 0.2 * rand(n).view(-1, 1, 1, 1)) * 10).clamp(0, 1)
    wide = F.avg_pool2d(F.max_pool2d(line, 3, 1, 1), 2)
    line = torch.where((rand(n) < 0.5).view(-1, 1, 1, 1), wide, F.avg_pool2d(line, 2)).reshape(n, 1, *size)
    color = torch.where((rand(n) < 0.6).view(-1, 1, 1, 1), 0.0, rand(n, 3, 1, 1) * 0.7)
    fill = torch.where((rand(n) < 0.3).view(-1, 1, 1, 1), torch.ones_like(plain), plain)
    return fill + line * (color - fill)


def _on_a_ground(plain: Tensor, ink: Tensor, rand: Draw) -> Tensor:
    """A plain, shaded or mottled ground in place of the white paper."""
    n, size = len(plain), plain.shape[2:]
    ground = rand(n, 3, 1, 1) + (rand(n) < 0.5).view(-1, 1, 1, 1) * _smooth(n, 3, 4, size, rand)
    ground = ground + (rand(n) < 0.3).view(-1, 1, 1, 1) * 0.6 * _smooth(n, 3, 20, size, rand)
    return plain + (1 - ink) * (ground - plain)


def _grained(plain: Tensor, ink: Tensor, rand: Draw) -> Tensor:
    """Noise at several scales, as photographs and paper have."""
    n, size = len(plain), plain.shape[2:]
    strength = 0.6 * rand(n).view(-1, 1, 1, 1)
    return plain + strength * sum(_smooth(n, 3, cells, size, rand) for cells in (12, 24, 48)) / 2
