"""What an inpainting model is not shown of a picture: masks as a person draws them, each a function of the sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sfumato import randomness
from sfumato.data.buckets import Size

WHOLE_SHARE = 0.25
"""Of samples whose picture is hidden as a whole, as in the training of SD 1.x's and 2.x's inpainting models."""
_OWN_SHARE = 0.5
_LEAST = 0.125
"""Of a side, that of a hole; Stable Diffusion's VAEs have 8 pixels to a latent, of 512."""


@dataclass(frozen=True)
class Holes:
    """Which part of each sample's picture is hidden, (1, height, width) of ones there and zeros elsewhere.

    whole_share: of the samples, 0 to 1, of which everything is. Of the others it is a rectangle, an ellipse or a
    brush's stroke at a random place, or in half of those whose picture has a mask of its own what that shows.
    """

    whole_share: float = WHOLE_SHARE

    def draw(self, size: Size, own: Tensor | None, seed: int, step: int, place: int) -> Tensor:
        """The hidden part of a picture of this (width, height). own: its mask, (1, height/f, width/f) in [0, 1]."""
        lot = randomness.generator(seed, "hidden", step, place)
        kind, which, *shape = torch.rand(12, generator=lot).tolist()
        width, height = size
        if kind < self.whole_share:
            return torch.ones(1, height, width)
        if own is not None and which < _OWN_SHARE:
            factor = height // own.shape[-2]
            return (own > 0).float().repeat_interleave(factor, -2).repeat_interleave(factor, -1)
        return torch.from_numpy(_shape(size, shape))[None]


def _shape(size: Size, numbers: list[float]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """A hole, (height, width), told by ten numbers in [0, 1)."""
    kind, *numbers = numbers
    sheet = Image.new("1", size)
    brush = ImageDraw.Draw(sheet)
    if kind < 2 / 3:
        corners = []
        for side, length, start in zip(size, numbers[:2], numbers[2:4], strict=True):
            long = round(side * (_LEAST + (1 - _LEAST) * length))
            first = round((side - long) * start)
            corners.append((first, first + long - 1))
        (left, right), (top, bottom) = corners
        (brush.rectangle if kind < 1 / 3 else brush.ellipse)((left, top, right, bottom), fill=1)
    else:
        thick = round(min(size) * (_LEAST + _LEAST * numbers[0]))
        places = [(x * size[0], y * size[1]) for x, y in zip(numbers[1::2], numbers[2::2], strict=True)]
        brush.line(places, fill=1, width=thick, joint="curve")
        for x, y in (places[0], places[-1]):  # a brush is round
            brush.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=1)
    return np.asarray(sheet, dtype=np.float32)
