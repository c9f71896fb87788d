"""What each step of the pocket base's training shows, and what it says of it: a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.pocket.captions import caption, other_caption
from sfumato.pocket.pictures import VARIANTS, Move, batch_indices
from sfumato.pocket.style_augmentation import HAND_COUNT, hand_name

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
class Lesson:
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


class Lessons:
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

    def at(self, step: int, timesteps: Tensor) -> Lesson:
        """The lesson of a step. timesteps: (batch,), that of each picture."""
        shares, batch = self.shares, len(timesteps)
        others = round(batch * shares.others)
        asked = batch_indices(step, batch - others, self.named, self.seed)
        if others:
            more = batch_indices(step, others, len(self.names) - self.named, self.seed + 1)
            asked += [self.named + i for i in more]
        draw = torch.rand(3, batch, generator=randomness.generator(self.seed, "captions and flips", step))
        cross = torch.rand(4, batch, generator=randomness.generator(self.seed, "crossing", step))
        lesson = Lesson(
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
