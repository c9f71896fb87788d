"""What the U-Net is told of a thing in a style, where what is known of the two together counts by lot.

Told all of it, it learns by heart how each thing looks in each style, and has only a guess to go by where it has not
seen the two. Told little of it, it draws by the thing and by the style.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.pocket.directions import FORMS, Directions


class Loosened:
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
