"""Tensors that every layer of every call asks for: moved once, not at each of these."""

from __future__ import annotations

from torch import Tensor


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
