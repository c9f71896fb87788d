"""What the text states of a thing in a style are made of: the thing, the style, and the two together.

The states of "crab, noto style" are the mean of the crab's in all styles, what the style adds to all things, and a
rest, which is what is known of the two together. Of a thing that was never seen in a style the rest is a guess.

What the text encoder learns last: what a style says of all things counts more in what is said of each.

The encoder E learns to say E(thing, style) + k d(style), where d is the mean over all things of E(thing, style) less
the mean of that thing's other styles; and of what is known of the two together it learns to say a share alone. What has
no style in it stays. The U-Net is left as it is, and no picture is looked at.

What a small base's text encoder says of captions.

What the U-Net is told of a thing in a style, where what is known of the two together counts by lot.

Told all of it, it learns by heart how each thing looks in each style, and has only a guess to go by where it has not
seen the two. Told little of it, it draws by the thing and by the style.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sfumato.errors import DataError
from sfumato.training.pretrain.dataset import other_names, read_manifest, read_words
from sfumato.utils import randomness

FORMS = ("{thing}, {style} style", "a {style} style picture of a {thing}", "{style} style, {thing}")
"""Ways to name a thing in a style: the two of the captions, and one that they lack."""

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
    that are thrown together to things that nobody has drawn, if there are any."""

    styles: Sequence[str]
    concepts: Mapping[str, str]
    withheld: frozenset[tuple[str, str]]
    others: Sequence[str]
    words: Sequence[str]

    @classmethod
    def read(cls, data: Path) -> Things:
        """Those of a folder of pictures, as docs/pocket.md lays it out."""
        manifest = read_manifest(data)
        withheld = frozenset((concept, style) for concept, style in manifest["withheld"])
        words = read_words(data) if (data / "words.txt").exists() else []
        return cls(manifest["styles"], manifest["concepts"], withheld, other_names(data), words)

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


class Directions:
    """What each style adds to all things.

    encode: what gives the states of texts, (n, positions, width). length: a text's count of tokens. Raises DataError
    where nothing may be named in two styles.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], Tensor], length: Callable[[str], int], things: Things, seed: int
    ) -> None:
        self.encode, self.length, self.things, self.seed = encode, length, things, seed
        self.means = self._means()

    def of(self, form: str, thing: str) -> Tensor:
        """(shown styles, positions, width): of each style in which the thing may be named, the mean over things of the
        states of one in it less the mean of that one's other styles. It is that of the form and of things of this
        length, or of the length next to it."""
        length = self.length(thing)
        known = [count for of, count in self.means if of == form]
        return self.means[form, min(known, key=lambda count: abs(count - length))][self.things.shown_in(thing)]

    def together(self, own: Tensor, directions: Tensor) -> Tensor:
        """(styles, positions, width): what is known of a thing and of each of these styles together, of which `own` was
        said; `directions` are those of the styles."""
        count = len(self.things.styles)
        beside_style = own - directions * (count - 1) / count  # a direction is from the mean of the others, not of all
        return beside_style - beside_style.mean(0)

    def _means(self) -> dict[tuple[str, int], Tensor]:
        """By form and a thing's count of tokens, which says what lies at a position."""
        drawn = self.things.draw(4 * _MOST, randomness.generator(self.seed, "things", 0))
        alike: dict[int, list[str]] = {}
        for thing in dict.fromkeys([*self.things.concepts, *self.things.others, *drawn]):
            if len(self.things.shown_in(thing)) > 1:
                alike.setdefault(self.length(thing), []).append(thing)
        if not alike:
            raise DataError(
                "no thing has images in two styles, which style_emphasis and --style-together set apart; leave these "
                "out."
            )
        enough = {count: some for count, some in alike.items() if len(some) >= _LEAST} or alike
        return {
            (form, count): self._mean(form, [some[i] for i in _some_of(len(some), self.seed, count)])
            for form in FORMS
            for count, some in sorted(enough.items())
        }

    def _mean(self, form: str, things: Sequence[str]) -> Tensor:
        """(styles, positions, width) of things of one length."""
        places = [self.things.shown_in(thing) for thing in things]
        states = self.encode([text for thing in things for text in self.things.said(form, thing)])
        total = states.new_zeros(len(self.things.styles), *states.shape[1:])
        for shown, own in zip(places, torch.split(states, [len(shown) for shown in places]), strict=True):
            total[shown] += center_states(own)
        named = torch.tensor([sum(style in shown for shown in places) for style in range(len(total))])
        return total / named.clamp(min=1).to(total)[:, None, None]


def center_states(states: Tensor) -> Tensor:
    """(styles, ...): each less the mean of the others."""
    count = len(states)
    return (states - states.mean(0)) * count / (count - 1)


def _one(names: Sequence[str], which: float) -> str:
    return names[int(which * len(names))]


def _some_of(count: int, seed: int, length: int) -> list[int]:
    return randomness.permutation(count, seed, "some of a length", length)[:_MOST]


_OFTEN = (0.5, 0.8)
"""Of the forms, where the second and the third begin among numbers in [0, 1)."""


class Emphasis:
    """The lessons of the text encoder: texts, and the states that it is to learn for them.

    directions: of the encoder as it was before. strength: k above. together: the share that stays of what is known of a
    thing and a style together.
    """

    def __init__(self, directions: Directions, *, strength: float, together: float, seed: int) -> None:
        self.directions, self.things = directions, directions.things
        self.strength, self.together, self.seed = strength, together, seed

    def lesson(self, step: int, count: int) -> tuple[list[str], Tensor]:
        """(texts, their states) of a step: `count` things in all their styles, the styles alone, and as much in which
        there is no style."""
        generator = randomness.generator(self.seed, "sayings", step)
        chances = torch.rand(count, generator=generator).tolist()
        forms = [FORMS[sum(chance >= start for start in _OFTEN)] for chance in chances]
        named = list(zip(forms, self.things.draw(count, generator), strict=True))
        styled = [self.things.said(form, thing) for form, thing in named]
        alone = [f"{style} style" for style in self.things.styles]
        plain = ["", *self.things.draw(count, generator)]
        texts = [*(text for texts in styled for text in texts), *alone, *plain]
        states = self.directions.encode(texts)
        *said, of_styles, of_rest = torch.split(states, [*map(len, styled), len(alone), len(plain)])
        wanted = [self._wanted(own, self.directions.of(*names)) for names, own in zip(named, said, strict=True)]
        return texts, torch.cat([*wanted, of_styles + self.strength * center_states(of_styles), of_rest])

    def _wanted(self, own: Tensor, directions: Tensor) -> Tensor:
        """(styles, positions, width): what is to be said of a thing in its styles, of which `own` was said."""
        together = self.directions.together(own, directions)
        return own + self.strength * directions - (1 - self.together) * together


def encode_text(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: Sequence[str], device: torch.device) -> Tensor:
    """(len(texts), positions, width) hidden states; each distinct text is encoded once."""
    distinct = sorted(set(texts))
    tokens = tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt").input_ids
    hidden: Tensor = encoder(tokens.to(device)).last_hidden_state
    return hidden[[distinct.index(text) for text in texts]]


def directions_of(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, things: Things, seed: int, device: torch.device
) -> Directions:
    """What each style adds to all things, as a text encoder at rest says it."""

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        return encode_text(encoder, tokenizer, texts, device)

    return Directions(encode, lambda text: len(tokenizer(text).input_ids), things, seed)


class PairDropout:
    """The states of captions. most: the share of what is known of a thing and a style together that counts at most."""

    def __init__(self, directions: Directions, *, most: float, seed: int) -> None:
        self.directions, self.most, self.seed = directions, most, seed
        things, groups = directions.things, set(directions.things.concepts.values())
        self.named = {
            form.format(thing=thing, style=things.styles[style]): (form, thing, place)
            for form in FORMS
            for thing in dict.fromkeys([*things.concepts, *things.others, *sorted(groups)])
            for place, style in enumerate(things.shown_in(thing))
        }

    def states(self, captions: Sequence[str], step: int) -> Tensor:
        """(len(captions), positions, width): those of a step. Of each caption that names a thing in a style, what is
        known of the two together has a share between 0 and `most`, by lot."""
        named = [self.named.get(caption) for caption in captions]
        pairs = list(dict.fromkeys(names[:2] for names in named if names))
        said = [self.directions.things.said(*pair) for pair in pairs]
        states = self.directions.encode([*captions, *(text for texts in said for text in texts)])
        plain, *own = torch.split(states, [len(captions), *map(len, said)])
        together = {
            pair: self.directions.together(states, self.directions.of(*pair))
            for pair, states in zip(pairs, own, strict=True)
        }
        gone = torch.stack([together[names[:2]][names[2]] if names else torch.zeros_like(plain[0]) for names in named])
        shares = self.most * torch.rand(len(captions), generator=randomness.generator(self.seed, "loosened", step))
        return plain - (1 - shares).to(gone)[:, None, None] * gone
