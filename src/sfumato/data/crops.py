"""One example -> the pixels and the mask that training sees."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.data.buckets import Crop, Size, fit_crop, nearest_bucket
from sfumato.data.folder import Example
from sfumato.data.images import Picture, open_picture
from sfumato.errors import DataError


@dataclass(frozen=True)
class Cropped:
    """image: RGB of the bucket's size. mask: L, that size over the VAE's factor, or None. notes: for the person."""

    image: Image.Image
    mask: Image.Image | None
    crop: Crop
    notes: tuple[str, ...]


def crop_example(example: Example, sizes: list[Size], vae_factor: int) -> Cropped:
    """Decode an example and bring it to the nearest of `sizes`, resampled once. Raises DataError naming the file."""
    picture = open_picture(example.path)
    crop = fit_crop(picture.image.size, nearest_bucket(picture.image.size, sizes))
    image = picture.image.resize(crop.size, Image.Resampling.LANCZOS, box=crop.box)
    mask = _mask(example, picture)
    if mask is not None:
        small = (crop.size[0] // vae_factor, crop.size[1] // vae_factor)
        mask = mask.resize(small, Image.Resampling.BOX, box=crop.box)
        if mask.getextrema() == (0, 0):
            raise DataError(f"{example.path.name}: its mask is black all over, so nothing is left to learn. Mend it.")
    return Cropped(image, mask, crop, picture.notes)


def _mask(example: Example, picture: Picture) -> Image.Image | None:
    if example.mask is not None:
        mask = open_picture(example.mask).image.convert("L")
        width, height = mask.size
        if abs(width * picture.image.height - height * picture.image.width) > max(*mask.size, *picture.image.size):
            raise DataError(
                f"{example.mask.name}: {width} x {height} px, {example.path.name} has "
                f"{picture.image.width} x {picture.image.height}. Give the mask the picture's proportions."
            )
        return mask.resize(picture.image.size, Image.Resampling.BILINEAR)
    return picture.alpha if example.alpha_mask else None


def to_pixels(image: Image.Image) -> Tensor:
    """(3, height, width) fp32 in [-1, 1]."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))
    return values.permute(2, 0, 1) / 127.5 - 1


def to_mask(image: Image.Image | None, size: Size) -> Tensor:
    """(1, height, width) fp32 in [0, 1]; ones of `size` where there is no mask."""
    if image is None:
        return torch.ones(1, size[1], size[0])
    return torch.from_numpy(np.array(image, dtype=np.float32))[None] / 255
