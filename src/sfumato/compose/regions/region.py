"""What a user says of a region: where it is, which adapters count there, and what is drawn.

The regions' masks, at the resolution that each layer of the U-Net has.

Tensors that every layer of every call asks for: moved once, not at each of these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from sfumato.adapters.weights import Adapter, check_adapters
from sfumato.data.images import convert_mask
from sfumato.errors import AdapterError
from sfumato.models import calls

Box = tuple[float, float, float, float]
"""left, top, right, bottom, each a share of the picture's side, 0 to 1."""

_GRID = 512
"""Pixels on a side of a box's mask, before it is averaged down to each layer's own resolution."""


@dataclass(frozen=True, init=False)
class Region:
    """A part of the picture, its adapters, and what is drawn there.

    where: a picture that is white where the adapters count (what is grey or half transparent counts in part), or a box.
    prompt: of this region's cross-attention, read with the call's `clip_skip`; None for the call's own. Its words may
    change between the steps of `sfumato.draw`, see `sfumato.models.prompts.editing`. An adapter that changes the text
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
            grey = convert_mask(self.where)
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


class DeviceCache:
    """A tensor that is moved once to each device and dtype that it is wanted on."""

    def __init__(self, tensor: Tensor) -> None:
        self._there = {(tensor.device, tensor.dtype): tensor}
        self._tensor = tensor

    def like(self, other: Tensor) -> Tensor:
        """On the device and in the dtype of `other`."""
        key = (other.device, other.dtype)
        if key not in self._there:
            self._there[key] = self._tensor.to(*key)
        return self._there[key]


@dataclass
class Masks:
    """The masks at every resolution of the current call."""

    full: list[Tensor]
    _latents: tuple[int, int] = (0, 0)
    _known: dict[tuple[int, int], DeviceCache] = field(default_factory=dict)

    def on_unet_call(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note the size of a call's latents."""
        sample = calls.sample_of(args, options)
        self._latents = (sample.shape[-2], sample.shape[-1])

    def at(self, height: int, width: int, like: Tensor) -> Tensor:
        """(regions, height, width), on the device and in the dtype of `like`."""
        if (height, width) not in self._known:
            pooled = [adaptive_avg_pool2d(mask, (height, width))[0, 0] for mask in self.full]
            self._known[height, width] = DeviceCache(torch.stack(pooled))
        return self._known[height, width].like(like)

    def on_tokens(self, count: int, like: Tensor) -> Tensor:
        """(regions, count): the masks on the tokens of a level, whose size follows from their number."""
        height, width = self._latents
        while height * width > count:
            height, width = -(-height // 2), -(-width // 2)
        if height * width != count:
            raise AdapterError(f"{count} tokens are no level of {self._latents[0]}x{self._latents[1]} latents.")
        return self.at(height, width, like).flatten(1)
