"""Sizes of images in pixels, as pipelines take them."""

from __future__ import annotations

import math


def near_side(px: float) -> int:
    """The side in pixels nearest to `px` that pipelines take, a multiple of 8."""
    return max(8, round(px / 8) * 8)


def size_like(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) in multiples of 8 with the proportions of `size`, and about the pixels of a square of `side`."""
    stretch = math.sqrt(size[0] / size[1])
    return near_side(side * stretch), near_side(side / stretch)
