"""What the text encoder learns last: what a style says of all things counts more in what is said of each.

The encoder E learns to say E(thing, style) + k d(style), where d is the mean over all things of E(thing, style) less
the mean of that thing's other styles; and of what is known of the two together it learns to say a share alone. What has
no style in it stays. The U-Net is left as it is, and no picture is looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.pocket.directions import FORMS, Directions, apart

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
        return texts, torch.cat([*wanted, of_styles + self.strength * apart(of_styles), of_rest])

    def _wanted(self, own: Tensor, directions: Tensor) -> Tensor:
        """(styles, positions, width): what is to be said of a thing in its styles, of which `own` was said."""
        together = self.directions.together(own, directions)
        return own + self.strength * directions - (1 - self.together) * together
