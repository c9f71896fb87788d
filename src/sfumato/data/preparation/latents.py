"""Crops -> latents, for every variant of a picture that training may draw, or pixels to be encoded in the loop.

What an inpainting model is not shown of a picture: masks as a person draws them, each a function of the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sfumato.data.buckets import Crop, Cropped, Size, to_array
from sfumato.data.options import Options
from sfumato.data.preparation.cache import Entry
from sfumato.data.tags import KeptTags, unshuffled_captions
from sfumato.errors import DataError
from sfumato.utils import randomness

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels (batch, 3, height, width) in [-1, 1] -> (mean, deviation), as `Base.encode_pixels`."""

Decoder = Callable[[Tensor], Tensor]
"""Latents (batch, channels, height/f, width/f) -> pixels, as `Base.decode`."""

Noise = Callable[[int, tuple[int, ...]], Tensor]
"""(row of the batch, shape) -> standard normal numbers of that shape."""

_ENCODED_AT_A_TIME_PX = 2**20


@dataclass
class PreparedPicture:
    """One picture's share of the data set. options: none unset. flip: whether it has mirrored variants. further:
    captions of which a sample takes one as often as `caption`. kept_tags: as of `Example`.

    tensors, or the entry of the cache that holds them: mean and deviation, (variants, channels, height/f, width/f),
    unless they are encoded in the loop; `pixels`, (3, height, width) uint8 of all positions, where they are, and for an
    inpainting model; mask: (1, height/f, width/f) of all positions, uint8, if there is one. A picture that nothing asks
    for has none. Variant p is the crop at position p; with flip, 2 p and 2 p + 1 are the crop and its mirror image.
    """

    name: str
    caption: str
    options: Options
    crop: Crop
    flip: bool
    tensors: Mapping[str, Tensor] | None
    entry: Entry | None = None
    further: tuple[str, ...] = ()
    kept_tags: Mapping[str, KeptTags] = field(default_factory=dict)

    @property
    def captions(self) -> tuple[str, ...]:
        """All of its captions."""
        return self.caption, *self.further

    @property
    def said(self) -> list[str]:
        """Its captions as samples have them, each alternative of a wildcard in one of them at least."""
        return [text for caption in self.captions for text in unshuffled_captions(caption, self.options)]

    def load(self) -> Mapping[str, Tensor]:
        """The tensors, from memory or from the mapped file."""
        if self.tensors is not None:
            return self.tensors
        assert self.entry is not None
        return self.entry.tensors()

    @property
    def variants(self) -> int:
        return self.crop.variants(self.flip)

    def place_of(self, variant: int) -> tuple[int, bool]:
        """(position of the crop, whether it is mirrored)."""
        return (variant // 2, bool(variant % 2)) if self.flip else (variant, False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tensors or {}).values())


def crop_view(pixels: Tensor, crop: Crop, position: int, mirrored: bool, factor: int = 1) -> Tensor:
    """One variant of (channels, height, width) over all positions. factor: pixels to one element of `pixels`."""
    rows, columns = crop.window(position)
    part = pixels[..., _over(rows, factor), _over(columns, factor)]
    return part.flip(-1) if mirrored else part


def _over(part: slice, factor: int) -> slice:
    return slice(part.start // factor, part.stop // factor)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 -> fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def encode_crops(
    cropped: Sequence[Cropped],
    names: Sequence[str],
    flips: Sequence[bool],
    encoder: Encoder,
    shown: Callable[[float], None] = lambda _: None,
) -> list[dict[str, Tensor]]:
    """Each crop's mean, deviation and mask, fp32 on the CPU. Raises DataError, with names, for what is not finite.

    shown: told again and again which part is done, 0 to 1.
    """
    pixels = [torch.from_numpy(to_array(result.image)) for result in cropped]
    jobs: dict[Size, list[tuple[int, int, bool]]] = {}
    for place, result in enumerate(cropped):
        for position in range(result.crop.positions):
            for mirrored in (False, True) if flips[place] else (False,):
                jobs.setdefault(result.crop.size, []).append((place, position, mirrored))
    means: list[list[Tensor]] = [[] for _ in cropped]
    deviations: list[list[Tensor]] = [[] for _ in cropped]
    done, count = 0, sum(map(len, jobs.values()))
    for (width, height), wanted in jobs.items():
        most = encode_batch_size(width, height)
        for start in range(0, len(wanted), most):
            chunk = wanted[start : start + most]
            views = [crop_view(pixels[i], cropped[i].crop, position, mirrored) for i, position, mirrored in chunk]
            mean, deviation = encoder(to_float(torch.stack(views)))
            check_finite(mean, deviation, [names[i] for i, _, _ in chunk])
            for row, (i, _, _) in enumerate(chunk):
                means[i].append(mean[row].float().cpu())
                deviations[i].append(deviation[row].float().cpu())
            done += len(chunk)
            shown(done / count)
    return [
        {"mean": torch.stack(mean), "deviation": torch.stack(deviation), **mask_tensor(result)}
        for result, mean, deviation in zip(cropped, means, deviations, strict=True)
    ]


def keep_pixels(cropped: Cropped) -> dict[str, Tensor]:
    """A crop's pixels over all positions and its mask."""
    return {"pixels": torch.from_numpy(to_array(cropped.image)), **mask_tensor(cropped)}


def encode_batch_size(width: int, height: int) -> int:
    """How many pictures of so many pixels the VAE encodes at once."""
    return max(1, _ENCODED_AT_A_TIME_PX // (width * height))


def check_finite(mean: Tensor, deviation: Tensor, names: Sequence[str]) -> None:
    """Raises DataError that names the pictures."""
    if not torch.isfinite(mean).all() or not torch.isfinite(deviation).all():
        shown = ", ".join(list(dict.fromkeys(names))[:3])
        raise DataError(f"{shown}: the VAE's latents are not finite. Use --precision fp32, or another --vae.")


def mask_tensor(cropped: Cropped) -> dict[str, Tensor]:
    """{"mask": (1, height/f, width/f) uint8} where there is a mask."""
    if cropped.mask is None:
        return {}
    return {"mask": torch.from_numpy(np.array(cropped.mask, dtype=np.uint8))[None]}


def sample_latents(
    items: Sequence[PreparedPicture], variants: Sequence[int], noise: Noise | None, encoder: Encoder
) -> tuple[Tensor, Tensor | None]:
    """(latents of the items' variants, masks or None), on the CPU; without noise the means."""
    loaded = [item.load() for item in items]
    in_loop = [row for row, tensors in enumerate(loaded) if "mean" not in tensors]
    means: dict[int, tuple[Tensor, Tensor]] = {}
    if in_loop:
        views = pixels_of([items[row] for row in in_loop], [variants[row] for row in in_loop])
        most = encode_batch_size(views.shape[-1], views.shape[-2])
        for start in range(0, len(views), most):
            chunk = in_loop[start : start + most]
            mean, deviation = encoder(views[start : start + most])
            check_finite(mean, deviation, [items[row].name for row in chunk])
            means |= {row: (mean[i].float().cpu(), deviation[i].float().cpu()) for i, row in enumerate(chunk)}
    for row, tensors in enumerate(loaded):
        if row not in means:
            means[row] = (tensors["mean"][variants[row]], tensors["deviation"][variants[row]])
    rows = range(len(items))
    latents = torch.stack([_sample(row, *means[row], noise) for row in rows])
    if all("mask" not in tensors for tensors in loaded):
        return latents, None
    return latents, torch.stack([_mask(items[row], loaded[row], variants[row], latents) for row in rows])


def pixels_of(items: Sequence[PreparedPicture], variants: Sequence[int]) -> Tensor:
    """The items' variants, (batch, 3, height, width) in [-1, 1], of those that keep their pixels."""
    views = [
        crop_view(item.load()["pixels"], item.crop, *item.place_of(variant))
        for item, variant in zip(items, variants, strict=True)
    ]
    return to_float(torch.stack(views))


def _sample(row: int, mean: Tensor, deviation: Tensor, noise: Noise | None) -> Tensor:
    return mean if noise is None else mean + deviation * noise(row, tuple(mean.shape))


def _mask(item: PreparedPicture, tensors: Mapping[str, Tensor], variant: int, latents: Tensor) -> Tensor:
    if "mask" not in tensors:
        return torch.ones(1, *latents.shape[-2:])
    position, mirrored = item.place_of(variant)
    factor = item.crop.size[0] // latents.shape[-1]
    return crop_view(tensors["mask"].float() / 255, item.crop, position, mirrored, factor)


WHOLE_SHARE = 0.25
"""Of samples whose picture is hidden as a whole, as in the training of SD 1.x's and 2.x's inpainting models."""
_OWN_SHARE = 0.5
_LEAST = 0.125
"""Of a side, that of a hole; Stable Diffusion's VAEs have 8 pixels to a latent, of 512."""


@dataclass(frozen=True)
class InpaintingMasks:
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
        return torch.from_numpy(_random_mask(size, shape))[None]


def _random_mask(size: Size, numbers: list[float]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
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
