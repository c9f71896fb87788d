"""Aspect-ratio buckets: pictures of many shapes, cropped as little as possible, in batches of one shape.

Sizes are (width, height) in pixels, as in Pillow.

One example -> the pixels and the mask that training sees. Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from sfumato.data.folder import Example
from sfumato.data.images import Picture, open_mask, open_picture
from sfumato.data.options import CropMode
from sfumato.errors import ConfigError, DataError

_LARGEST = 8192
"""Pixels of a side. Every bucket of a resolution is counted, and of a million there are more than memory holds."""

Size = tuple[int, int]
Box = tuple[float, float, float, float]
Sizes = Mapping[int, list[Size]]
"""The shapes that images of each resolution may get."""

MAX_POSITIONS = 8
"""Places that a random crop is taken from: each is encoded once, and more teach nothing new."""


@dataclass(frozen=True)
class Crop:
    """The part of a picture that is learned from, and the size it gets.

    box: (left, top, right, bottom) in the picture's own pixels; it takes the place `inside` of the result (all of it if
    that is None; the rest is white). offset: (left, top) of the crop in pixels of the resized picture, as SDXL's
    condition counts it. With `positions` above 1 the box is longer than the result along one side, by (positions - 1)
    times `stride` pixels of the result, and a crop starts at a multiple of `stride` in it.
    """

    original: Size
    box: Box
    size: Size
    offset: Size
    inside: tuple[int, int, int, int] | None = None
    positions: int = 1
    stride: int = 0

    @property
    def resized(self) -> Size:
        """Size of the box in the result's pixels: what every position lies in."""
        spare = (self.positions - 1) * self.stride
        return (self.size[0] + spare, self.size[1]) if self.is_wide else (self.size[0], self.size[1] + spare)

    @property
    def is_wide(self) -> bool:
        """Whether it is the width that is longer than the bucket's."""
        return self.original[0] * self.size[1] >= self.original[1] * self.size[0]

    def variants(self, flip: bool | None) -> int:
        """How many crops there are; with `flip` each has its mirror image."""
        return self.positions * (2 if flip else 1)

    def at(self, position: int, mirrored: bool = False) -> Size:
        """(left, top) of the crop at a position, as `offset`; mirrored, of what it shows in the mirrored picture."""
        if mirrored and self.is_wide:  # the box is centred, so the positions count from its other end
            position = self.positions - 1 - position
        shift = position * self.stride
        return (self.offset[0] + shift, self.offset[1]) if self.is_wide else (self.offset[0], self.offset[1] + shift)

    def window(self, position: int) -> tuple[slice, slice]:
        """The rows and columns of `resized` that the crop at a position holds."""
        shift = position * self.stride
        left, top = (shift, 0) if self.is_wide else (0, shift)
        return slice(top, top + self.size[1]), slice(left, left + self.size[0])

    @property
    def middle(self) -> int:
        """The position nearest to the centre."""
        return (self.positions - 1) // 2

    @property
    def scale(self) -> float:
        """Side in the result over side in the picture; above 1 the picture is enlarged."""
        left, _, right, _ = self.inside or (0, 0, *self.resized)
        return (right - left) / (self.box[2] - self.box[0])

    @property
    def kept(self) -> float:
        """Share of the picture that is seen, at one time or another."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top) / (self.original[0] * self.original[1])

    @property
    def enlarges(self) -> bool:
        """Whether the picture is smaller than what is learned of it."""
        return self.scale > 1

    @property
    def loses_much(self) -> bool:
        """Whether more than a quarter of the picture is cut off, of which a person is told."""
        return self.kept < 0.75


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


def checked_sizes(resolution: int, step: int, *, buckets: bool) -> list[Size]:
    """`bucket_sizes`, or without `buckets` the square alone. Raises ConfigError for a resolution below a step, or
    beyond what any base draws."""
    if resolution < step:
        raise ConfigError(f"--resolution {resolution}: this base takes multiples of {step} px. Give {step} or more.")
    if resolution > _LARGEST:
        raise ConfigError(
            f"--resolution {resolution}: is the side of a square in pixels; wanted at most {_LARGEST}, of which 512 to "
            "1024 is usual."
        )
    return bucket_sizes(resolution, step, largest_ratio=2.0 if buckets else 1.0)


def sizes_of_resolution(sizes: Sizes, resolution: int | None) -> list[Size]:
    """Those of an example's resolution, which is set by then."""
    assert resolution is not None
    return sizes[resolution]


def side_step(vae_factor: int, unet_levels: int, resolution: int) -> int:
    """Pixels that a side must be a multiple of: the U-Net halves the latents at each level but the last."""
    halved: int = vae_factor * 2 ** (unet_levels - 1)
    return max(halved, resolution // 16 // halved * halved)


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose proportions are nearest, by ratio; of equals the one with more pixels."""

    def distance(bucket: Size) -> tuple[float, int]:
        ratio = math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1])
        return round(abs(ratio), 9), -bucket[0] * bucket[1]

    return min(sizes, key=distance)


def fit_crop(original: Size, size: Size, mode: CropMode = "center", factor: int = 8) -> Crop:
    """How a picture becomes one of `size`.

    center: its largest centred part of that shape. random: the same at up to eight positions, a multiple of `factor`
    pixels of the result apart. pad: the whole picture, centred, with white beside it.
    """
    if mode == "pad":
        return _padded(original, size)
    scale = max(size[0] / original[0], size[1] / original[1])
    spare = max(round(original[0] * scale) - size[0], round(original[1] * scale) - size[1])
    stride = factor * max(1, math.ceil(spare / (factor * (MAX_POSITIONS - 1))))
    positions = spare // stride + 1 if mode == "random" else 1
    crop = Crop(original, (0, 0, 0, 0), size, (0, 0), None, positions, stride if positions > 1 else 0)
    wide, high = crop.resized
    width, height = min(wide / scale, original[0]), min(high / scale, original[1])
    left, top = (original[0] - width) / 2, (original[1] - height) / 2
    offset = round(left * scale), round(top * scale)
    return replace(crop, box=(left, top, left + width, top + height), offset=offset)


def _padded(original: Size, size: Size) -> Crop:
    scale = min(size[0] / original[0], size[1] / original[1])
    width, height = (max(1, min(side, round(own * scale))) for own, side in zip(original, size, strict=True))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return Crop(original, (0, 0, *original), size, (0, 0), (left, top, left + width, top + height))


OPAQUE = "nothing of it is transparent, so all of it is learned"
"""The end of the note on a picture whose alpha was to be its mask."""
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Cropped:
    """image: RGB of `crop.resized` (the bucket's size, if the crop has one position). mask: L, that size over the VAE's
    factor, or None. notes: for the person."""

    image: Image.Image
    mask: Image.Image | None
    crop: Crop
    notes: tuple[str, ...]


def choose_crop(example: Example, original: Size, sizes: list[Size], vae_factor: int) -> Crop:
    """The crop of an example whose picture is of size `original`: the nearest of `sizes`, as its options want it."""
    return fit_crop(original, nearest_bucket(original, sizes), example.options.crop or "center", vae_factor)


def crop_example(example: Example, sizes: list[Size], vae_factor: int) -> Cropped:
    """Decode an example and bring it to its crop, resampled once. Raises DataError naming the file."""
    picture = open_picture(example.path)
    crop = choose_crop(example, picture.image.size, sizes, vae_factor)
    mask = _mask(example, picture)
    small = (crop.resized[0] // vae_factor, crop.resized[1] // vae_factor)
    if crop.inside is not None:
        image, mask = _padded_image(picture.image, crop), _padded_mask(mask, crop, small)
    else:
        image = picture.image.resize(crop.resized, Image.Resampling.LANCZOS, box=crop.box)
        mask = None if mask is None else mask.resize(small, Image.Resampling.BOX, box=crop.box)
    if mask is not None and mask.getextrema() == (0, 0):
        raise DataError(f"{example.path.name}: its mask is black all over, so nothing is left to learn. Mend it.")
    opaque = [f"{example.path.name}: {OPAQUE}"] if example.alpha_mask and picture.alpha is None else []
    return Cropped(image, mask, crop, (*picture.notes, *opaque))


def _padded_image(image: Image.Image, crop: Crop) -> Image.Image:
    assert crop.inside is not None
    left, top, right, bottom = crop.inside
    sheet = Image.new("RGB", crop.size, "white")
    sheet.paste(image.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
    return sheet


def _padded_mask(mask: Image.Image | None, crop: Crop, small: Size) -> Image.Image:
    """Black where a latent sees any of the white beside the picture."""
    assert crop.inside is not None
    left, top, right, bottom = crop.inside
    seen = (mask or Image.new("L", crop.original, 255)).resize((right - left, bottom - top), Image.Resampling.BOX)
    whole = Image.new("L", crop.size, 0)
    whole.paste(seen, (left, top))
    values = np.asarray(whole.resize(small, Image.Resampling.BOX))
    inside = np.zeros(crop.size[::-1], dtype=np.uint8)
    inside[top:bottom, left:right] = 255
    whole_cells = np.asarray(Image.fromarray(inside).resize(small, Image.Resampling.BOX)) == 255
    return Image.fromarray((values * whole_cells).astype(np.uint8))


def _mask(example: Example, picture: Picture) -> Image.Image | None:
    if example.mask is not None:
        mask = open_mask(example.mask)
        width, height = mask.size
        if abs(width * picture.image.height - height * picture.image.width) > max(*mask.size, *picture.image.size):
            raise DataError(
                f"{example.mask.name}: {width} x {height} px, {example.path.name} has "
                f"{picture.image.width} x {picture.image.height}. Give the mask the image's proportions."
            )
        return mask.resize(picture.image.size, Image.Resampling.BILINEAR)
    return picture.alpha if example.alpha_mask else None


def to_array(image: Image.Image) -> Pixels:
    """(3, height, width), 0 to 255."""
    return np.array(image, dtype=np.uint8).transpose(2, 0, 1)
