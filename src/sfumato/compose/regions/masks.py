"""The regions' masks, at the resolution that each layer of the U-Net has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from sfumato import unet_calls
from sfumato.compose.regions.device_cache import DeviceCache
from sfumato.errors import AdapterError


@dataclass
class Masks:
    """The masks at every resolution of the current call."""

    full: list[Tensor]
    _latents: tuple[int, int] = (0, 0)
    _known: dict[tuple[int, int], DeviceCache] = field(default_factory=dict)

    def on_unet_call(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note the size of a call's latents."""
        sample = unet_calls.sample_of(args, options)
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
