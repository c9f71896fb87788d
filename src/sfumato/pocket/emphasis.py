"""What the text encoder learns last: what a style says of all things counts more in what is said of each.

The text states of "crab, noto style" hold the thing, the style, and what is known of the two together. Of a thing that
was never seen in a style the last is a guess. So the encoder E learns to say E(thing, style) + k d(style), where d is
the mean over all things of E(thing, style) less the mean of that thing's other styles; and of what is known of the two
together it learns to say a share alone. What has no style in it stays. The U-Net is left as it is, and no picture is
looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.errors import DataError

FORMS = ("{thing}, {style} style", "a {style} style picture of a {thing}", "{style} style, {thing}")
"""Ways to name a thing in a style: the two of the captions, and one that they lack."""

_OFTEN = (0.5, 0.8)
"""Of the forms, where the second and the third begin among numbers in [0, 1)."""
_SHARES = (0.45, 0.75, 0.95)
"""Of the things of a step, where other drawings' names, words thrown together and groups begin: a rule that is to hold
for all things is learned on more than the concepts."""
_LEAST, _MOST = 20, 100
"""Things of one length in tokens that a direction is the mean over."""
_LONGEST = 4
"""Words thrown together at most."""


@dataclass(frozen=True)
class Things:
    """What is named. withheld: the (concept, style) that are never said. others: names of other drawings. words: those
    that are thrown together to things that nobody has drawn."""

    styles: Sequence[str]
    concepts: Mapping[str, str]
    withheld: frozenset[tuple[str, str]]
    others: Sequence[str]
    words: Sequence[str]

    def fingerprint(self) -> str:
        """Changes with any name."""
        told = (list(self.styles), sorted(self.concepts.items()), sorted(self.withheld), self.others, self.words)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def shown_in(self, thing: str) -> list[int]:
        """The places of the styles in which it may be named."""
        return [place for place, style in enumerate(self.styles) if (thing, style) not in self.withheld]

    def said(self, form: str, thing: str) -> list[str]:
        """It in each of these styles."""
        return [form.format(thing=thing, style=self.styles[place]) for place in self.shown_in(thing)]

    def draw(self, count: int, generator: torch.Generator) -> list[str]:
        """`count` things by lot: concepts, others' names, thrown-together words, groups."""
        concepts, groups = list(self.concepts), sorted(set(self.concepts.values()))
        things = []
        for kind, which in torch.rand(count, 2, generator=generator, dtype=torch.float64).tolist():
            if kind >= _SHARES[2]:
                things.append(_one(groups, which))
            elif kind >= _SHARES[1] and self.words:
                places = torch.randint(len(self.words), (1 + int(which * _LONGEST),), generator=generator).tolist()
                things.append(" ".join(self.words[place] for place in places))
            else:
                things.append(_one((self.others if kind >= _SHARES[0] else ()) or concepts, which))
        return things


class Emphasis:
    """The lessons of the text encoder: texts, and the states that it is to learn for them.

    encode: what gives the states of texts, (n, positions, width), as they were before. length: a text's count of
    tokens. strength: k above. together: the share that stays of what is known of a thing and a style together. Raises
    DataError where nothing may be named in two styles.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Tensor],
        length: Callable[[str], int],
        things: Things,
        *,
        strength: float,
        together: float,
        seed: int,
    ) -> None:
        self.encode, self.length, self.things = encode, length, things
        self.strength, self.together, self.seed = strength, together, seed
        self.directions = self._directions()

    def lesson(self, step: int, count: int) -> tuple[list[str], Tensor]:
        """(texts, their states) of a step: `count` things in all their styles, the styles alone, and as much in which
        there is no style."""
        generator = randomness.generator(self.seed, "sayings", step)
        chances = torch.rand(count, generator=generator).tolist()
        forms = [FORMS[sum(chance >= start for start in _OFTEN)] for chance in chances]
        named = list(zip(forms, self.things.draw(count, generator), strict=True))
        styled = [text for form, thing in named for text in self.things.said(form, thing)]
        alone = [f"{style} style" for style in self.things.styles]
        plain = ["", *self.things.draw(count, generator)]
        states = self.encode([*styled, *alone, *plain])
        of_things, of_styles, of_rest = torch.split(states, [len(styled), len(alone), len(plain)])
        places = [self.things.shown_in(thing) for _, thing in named]
        said = torch.split(of_things, [len(shown) for shown in places])
        wanted = [
            self._wanted(own, self._direction(form, thing)[shown])
            for (form, thing), shown, own in zip(named, places, said, strict=True)
        ]
        of_styles = of_styles + self.strength * apart(of_styles)
        return [*styled, *alone, *plain], torch.cat([*wanted, of_styles, of_rest])

    def _wanted(self, own: Tensor, directions: Tensor) -> Tensor:
        """(styles, positions, width): what is to be said of a thing in its styles, of which `own` was said."""
        count = len(self.things.styles)
        beside_style = own - directions * (count - 1) / count  # d is from the mean of the others, not of all
        together = beside_style - beside_style.mean(0)
        return own + self.strength * directions - (1 - self.together) * together

    def _direction(self, form: str, thing: str) -> Tensor:
        """(styles, positions, width): d of the form, of things of this length, or of the length next to it."""
        length = self.length(thing)
        known = [count for of, count in self.directions if of == form]
        return self.directions[form, min(known, key=lambda count: abs(count - length))]

    def _directions(self) -> dict[tuple[str, int], Tensor]:
        """By form and a thing's count of tokens, which says what lies at a position."""
        drawn = self.things.draw(4 * _MOST, randomness.generator(self.seed, "things", 0))
        alike: dict[int, list[str]] = {}
        for thing in dict.fromkeys([*self.things.concepts, *self.things.others, *drawn]):
            if len(self.things.shown_in(thing)) > 1:
                alike.setdefault(self.length(thing), []).append(thing)
        if not alike:
            raise DataError("no thing has pictures in two styles, which --stage text sets apart; leave this stage out.")
        enough = {count: some for count, some in alike.items() if len(some) >= _LEAST} or alike
        return {
            (form, count): self._mean_direction(form, [some[i] for i in _some_of(len(some), self.seed, count)])
            for form in FORMS
            for count, some in sorted(enough.items())
        }

    def _mean_direction(self, form: str, things: Sequence[str]) -> Tensor:
        """(styles, positions, width) of things of one length."""
        places = [self.things.shown_in(thing) for thing in things]
        states = self.encode([text for thing in things for text in self.things.said(form, thing)])
        total = states.new_zeros(len(self.things.styles), *states.shape[1:])
        for shown, own in zip(places, torch.split(states, [len(shown) for shown in places]), strict=True):
            total[shown] += apart(own)
        named = torch.tensor([sum(style in shown for shown in places) for style in range(len(total))])
        return total / named.clamp(min=1).to(total)[:, None, None]


def apart(states: Tensor) -> Tensor:
    """(styles, ...): each less the mean of the others."""
    count = len(states)
    return (states - states.mean(0)) * count / (count - 1)


def _one(names: Sequence[str], which: float) -> str:
    return names[int(which * len(names))]


def _some_of(count: int, seed: int, length: int) -> list[int]:
    return randomness.permutation(count, seed, "some of a length", length)[:_MOST]
