"""What each step of the pocket base's training shows, and what it says of it: a pure function of seed and step.

The latents that the pocket base learns from: of pictures as they are kept, of changed ones made when asked for.

Pictures as other hands might have drawn them, made from those that may be seen.

A decoder that has seen four styles rebuilds a fifth badly: a thin black outline comes out grey and soft. A U-Net that
has seen a thing in four styles alone takes these for what the thing is. These changes are of no set in particular. They
give outlines, hatching, gloss, other palettes and grounds, and to the decoder finer things.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.data.preparation.latents import check_finite, to_float
from sfumato.training.pretrain.dataset import VARIANTS, Move, Pictures, Variant, batch_indices, caption, other_caption
from sfumato.utils import randomness

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


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


FARTHEST = 12
"""Pixels by which a moved picture is shifted at most, either way."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How often something is done, each in [0, 1]; `sfumato train pretrain --help` says what each is.

    hands: of pictures by one hand of `style_augmentation`, whom the caption names. crossed_from: the first timestep at
    which pictures are crossed. moved_below: the first at which none is moved.
    plain_style: the style in which a concept is drawn when its name alone is said; None: each as often.
    """

    flip: float
    group: float
    plain: float
    empty: float
    others: float
    varied: float
    crossed: float
    crossed_from: int
    moved: float
    moved_below: int
    hands: float
    plain_style: str | None = None


@dataclass(frozen=True)
class PretrainBatch:
    """A step's batch. asked: the pictures that are to be drawn. seen: those that the noise is laid over, which are
    others where a picture is crossed. variants: which of VARIANTS of either. moves: how either is moved, place in the
    batch -> move. hands: by whose hand it is, place -> hand. captions: what is said.
    """

    asked: list[int]
    seen: list[int]
    variants: list[int]
    moves: dict[int, Move]
    hands: dict[int, int]
    captions: list[str]


class PretrainBatches:
    """The lessons on pictures of which the first `named` are of the concepts, and those after them others.

    names: what each shows and in which style. groups: concept -> its group. partners: for each those that it is crossed
    with.
    """

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        named: int,
        groups: Mapping[str, str],
        shares: Shares,
        seed: int,
        partners: Sequence[Sequence[int]],
    ) -> None:
        self.names, self.named, self.groups, self.shares, self.seed = names, named, groups, shares, seed
        self.partners = partners
        self.plain = plain_drawings(names[:named], shares.plain_style) if shares.plain_style else {}

    def at(self, step: int, timesteps: Tensor) -> PretrainBatch:
        """The lesson of a step. timesteps: (batch,), that of each picture."""
        shares, batch = self.shares, len(timesteps)
        others = round(batch * shares.others)
        asked = batch_indices(step, batch - others, self.named, self.seed)
        if others:
            more = batch_indices(step, others, len(self.names) - self.named, self.seed + 1)
            asked += [self.named + i for i in more]
        draw = torch.rand(3, batch, generator=randomness.generator(self.seed, "captions and flips", step))
        cross = torch.rand(4, batch, generator=randomness.generator(self.seed, "crossing", step))
        lesson = PretrainBatch(
            asked, list(asked), (draw[2] < shares.flip).long().tolist(), self._moves(step, timesteps), {}, []
        )
        by_hand = torch.rand(2, batch, generator=randomness.generator(self.seed, "hands", step))
        for place, index in enumerate(asked):
            words, form, _ = draw[:, place].tolist()
            crossed, which, varied, variant = cross[:, place].tolist()
            partners = self.partners[index]
            if partners and crossed < shares.crossed and timesteps[place] >= shares.crossed_from:
                what, style = self.names[index]
                lesson.seen[place] = partners[int(which * len(partners))]
                text = f"{what}, {style} style" if form < 0.5 else f"{style} style"
            else:
                text = self._caption(index, words, form)
                if text in self.plain:
                    lesson.asked[place] = lesson.seen[place] = self.plain[text]
            other, hand = by_hand[:, place].tolist()
            if other < shares.hands:
                lesson.hands[place] = int(hand * HAND_COUNT)
                said = f"hand {hand_name(lesson.hands[place])}"
                text = f"{text}, {said}" if text else said
            if varied < shares.varied:
                lesson.variants[place] = 1 + int(variant * (len(VARIANTS) - 1))
                said = VARIANTS[lesson.variants[place]].words
                text = f"{text}, {said}" if text else said
            lesson.captions.append(text)
        return lesson

    def _moves(self, step: int, timesteps: Tensor) -> dict[int, Move]:
        """At little noise, where what is there shows how it lies and no caption need say so."""
        generator = randomness.generator(self.seed, "moving", step)
        draw = torch.rand(4, len(timesteps), generator=generator)
        moved = (draw[0] < self.shares.moved) & (timesteps < self.shares.moved_below)
        turns = (draw[1] * 4).long()
        down, right = ((draw[2:] * 2 - 1) * FARTHEST).round().long()
        return {
            place: Move(int(turns[place]), int(down[place]), int(right[place]))
            for place in moved.nonzero().flatten().tolist()
        }

    def _caption(self, index: int, draw: float, form: float) -> str:
        what, style = self.names[index]
        empty = self.shares.empty
        if index >= self.named:
            return other_caption(what, style, draw=draw, form=form, empty_share=empty)
        shares = {"empty_share": empty, "group_share": self.shares.group, "plain_share": self.shares.plain}
        return caption(what, style, self.groups[what], draw=draw, form=form, **shares)


def plain_drawings(names: Sequence[tuple[str, str]], style: str) -> dict[str, int]:
    """Concept -> the place in `names` of its drawing in the style; of its first where that one is withheld."""
    first: dict[str, int] = {}
    for place, (concept, drawn) in enumerate(names):
        if concept not in first or drawn == style:
            first[concept] = place
    return first


class Latents:
    """Mean and deviation of the scaled latents of pictures in some variants.

    Latents can neither be mirrored nor recolored themselves, so each variant is encoded once; moves and hands are too
    many.
    """

    def __init__(
        self, vae: AutoencoderKL, pictures: Pictures, variants: Sequence[Variant], device: torch.device
    ) -> None:
        self.vae, self.pictures, self.device = vae, pictures, device
        self.scale: float = vae.config.scaling_factor
        caches = [encode_all(vae, pictures.varied(variant), device) for variant in variants]
        self.means, self.deviations = (torch.stack(pair) * self.scale for pair in zip(*caches, strict=True))

    def of(self, lesson: PretrainBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation of what the lesson asks for, and the mean of what it shows, (batch, 4, h/4, w/4) fp32."""
        mean, deviation = self.means[lesson.variants, lesson.asked], self.deviations[lesson.variants, lesson.asked]
        seen = self.means[lesson.variants, lesson.seen]
        if places := sorted({*lesson.moves, *lesson.hands}):
            mean[places], deviation[places] = self._changed(places, lesson.asked, lesson)
            seen[places] = mean[places]
            if crossed := [p for p in places if lesson.seen[p] != lesson.asked[p]]:
                seen[crossed], _ = self._changed(crossed, lesson.seen, lesson)
        return mean, deviation, seen

    def _changed(self, places: Sequence[int], indices: Sequence[int], lesson: PretrainBatch) -> tuple[Tensor, Tensor]:
        """Of pictures that are moved, by another hand, or both."""
        pictures = [VARIANTS[lesson.variants[p]].of(self.pictures.pixels[indices[p]]) for p in places]
        moved = [lesson.moves[p].of(one) if p in lesson.moves else one for p, one in zip(places, pictures, strict=True)]
        pixels = to_float(torch.stack(moved).to(self.device))
        if by_others := [row for row, p in enumerate(places) if p in lesson.hands]:
            pixels[by_others] = restyle(pixels[by_others], [lesson.hands[places[row]] for row in by_others])
        mean, deviation = encode(self.vae, pixels)
        return mean * self.scale, deviation * self.scale


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the unscaled latents of (b, 3, h, w) in [-1, 1], each (b, 4, h/4, w/4) fp32."""
    posterior = vae.encode(pixels).latent_dist
    return posterior.mean, posterior.std


def encode_all(vae: AutoencoderKL, pictures: Pictures, device: torch.device) -> tuple[Tensor, Tensor]:
    """Those of every picture, each (n, 4, h/4, w/4). Raises DataError where one is not finite."""
    means, deviations = [], []
    for chunk in torch.split(torch.arange(len(pictures.names)), 64):
        mean, deviation = encode(vae, pictures.floats(chunk).to(device))
        check_finite(mean, deviation, [" ".join(pictures.names[i]) for i in chunk.tolist()])
        means.append(mean)
        deviations.append(deviation)
    return torch.cat(means), torch.cat(deviations)
