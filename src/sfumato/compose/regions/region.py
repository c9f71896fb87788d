"""What a user says of a region: where it is, which adapters count there, and what is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from PIL import Image
from torch import Tensor

from sfumato.data.images import as_mask
from sfumato.errors import AdapterError
from sfumato.weighting.adapter import Adapter, check_adapters

Box = tuple[float, float, float, float]
"""left, top, right, bottom, each a share of the picture's side, 0 to 1."""

_GRID = 512
"""Pixels on a side of a box's mask, before it is averaged down to each layer's own resolution."""


@dataclass(frozen=True, init=False)
class Region:
    """A part of the picture, its adapters, and what is drawn there.

    where: a picture that is white where the adapters count (what is grey or half transparent counts in part), or a box.
    prompt: of this region's cross-attention, read with the call's `clip_skip`; None for the call's own. Its words may
    change between the steps of `sfumato.draw`, see `sfumato.prompts.prompt_editing`. An adapter that changes the text
    encoders wants a prompt here.
    Raises AdapterError for what is no place and no adapter.
    """

    where: Image.Image | Box
    adapters: tuple[Adapter, ...]
    prompt: str | None = None

    def __init__(self, where: Image.Image | Box, *adapters: Adapter, prompt: str | None = None) -> None:
        is_box = isinstance(where, tuple | list) and len(where) == 4 and all(isinstance(side, Real) for side in where)
        if not is_box and not isinstance(where, Image.Image):
            shown = " ".join(repr(where).split())
            raise AdapterError(
                f"a region at {shown:.60}: wanted an image that is white there, or (left, top, right, bottom) as "
                "shares of the side."
            )
        check_adapters(adapters)
        if prompt is not None and not isinstance(prompt, str):
            raise AdapterError(f"a region's prompt is a text, got {prompt!r:.40}.")
        object.__setattr__(self, "where", where)
        object.__setattr__(self, "adapters", adapters)
        object.__setattr__(self, "prompt", prompt)

    def mask(self) -> Tensor:
        """(1, 1, height, width) in [0, 1]. Raises AdapterError for a region that is empty, and DataError for a picture
        whose white is unknown."""
        if isinstance(self.where, Image.Image):
            grey = as_mask(self.where)
            values = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, 1, grey.height, grey.width)
            mask = values.float() / 255
        else:
            left, top, right, bottom = self.where
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise AdapterError(f"a box is (left, top, right, bottom) as shares of the side, got {self.where}.")
            mask = torch.zeros(1, 1, _GRID, _GRID)
            rows, columns = (slice(round(a * _GRID), round(b * _GRID)) for a, b in ((top, bottom), (left, right)))
            mask[..., rows, columns] = 1
        if not mask.any():
            whose = " and ".join(each.label for each in self.adapters) or (repr(self.prompt) if self.prompt else "")
            which = f"the region of {whose:.80}" if whose else "a region"
            raise AdapterError(f"{which} is black all over; its mask is white where the adapters count.")
        return mask
