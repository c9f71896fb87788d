"""Aspect-ratio buckets: pictures of many shapes, cropped as little as possible, in batches of one shape.

Sizes are (width, height) in pixels, as in Pillow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class Crop:
    """The part of a picture that is learned from, and the size it gets.

    box: (left, top, right, bottom) in the picture's own pixels, centred, with the proportions of `size`.
    offset: (left, top) of the crop in pixels of the resized picture, as SDXL's condition counts it.
    """

    original: Size
    box: tuple[float, float, float, float]
    size: Size
    offset: Size

    @property
    def scale(self) -> float:
        """Side in the result over side in the picture; above 1 the picture is enlarged."""
        return self.size[0] / (self.box[2] - self.box[0])

    @property
    def kept(self) -> float:
        """Share of the picture that is seen."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top) / (self.original[0] * self.original[1])


def bucket_sizes(resolution: int, step: int, *, largest_ratio: float = 2.0) -> list[Size]:
    """The shapes with about as many pixels as a square of `resolution`, never more, in multiples of `step`.

    Widths run from narrow to wide; sides differ by at most `largest_ratio` times.
    """
    square = max(step, resolution // step * step)
    sizes = {(square, square)}
    for width in range(step, int(square * largest_ratio) + step, step):
        height = square * square // width // step * step
        if height and max(width, height) <= largest_ratio * min(width, height):
            sizes |= {(width, height), (height, width)}
    # A shape that fits into another one only throws pixels away.
    largest = [a for a in sizes if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in sizes)]
    return sorted(largest, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose proportions are nearest, by ratio; of equals the one with more pixels."""

    def distance(bucket: Size) -> tuple[float, int]:
        ratio = math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1])
        return round(abs(ratio), 9), -bucket[0] * bucket[1]

    return min(sizes, key=distance)


def fit_crop(original: Size, size: Size) -> Crop:
    """The largest centred part of a picture with the proportions of `size`."""
    scale = max(size[0] / original[0], size[1] / original[1])
    width, height = min(size[0] / scale, original[0]), min(size[1] / scale, original[1])
    left, top = (original[0] - width) / 2, (original[1] - height) / 2
    return Crop(original, (left, top, left + width, top + height), size, (round(left * scale), round(top * scale)))
