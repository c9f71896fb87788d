"""One example -> the pixels and the mask that training sees. Imports no torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sfumato.data.buckets import Crop, Size, fit_crop, nearest_bucket
from sfumato.data.folder import Example
from sfumato.data.images import Picture, open_mask, open_picture
from sfumato.errors import DataError

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


def crop_of(example: Example, original: Size, sizes: list[Size], vae_factor: int) -> Crop:
    """The crop of an example whose picture is of size `original`: the nearest of `sizes`, as its options want it."""
    return fit_crop(original, nearest_bucket(original, sizes), example.options.crop or "center", vae_factor)


def crop_example(example: Example, sizes: list[Size], vae_factor: int) -> Cropped:
    """Decode an example and bring it to its crop, resampled once. Raises DataError naming the file."""
    picture = open_picture(example.path)
    crop = crop_of(example, picture.image.size, sizes, vae_factor)
    mask = _mask(example, picture)
    small = (crop.resized[0] // vae_factor, crop.resized[1] // vae_factor)
    if crop.inside is not None:
        image, mask = _padded(picture.image, crop), _padded_mask(mask, crop, small)
    else:
        image = picture.image.resize(crop.resized, Image.Resampling.LANCZOS, box=crop.box)
        mask = None if mask is None else mask.resize(small, Image.Resampling.BOX, box=crop.box)
    if mask is not None and mask.getextrema() == (0, 0):
        raise DataError(f"{example.path.name}: its mask is black all over, so nothing is left to learn. Mend it.")
    opaque = [f"{example.path.name}: {OPAQUE}"] if example.alpha_mask and picture.alpha is None else []
    return Cropped(image, mask, crop, (*picture.notes, *opaque))


def _padded(image: Image.Image, crop: Crop) -> Image.Image:
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
