"""Looking at every picture once: what training will see of it, and whether there is anything to see.

Memory does not grow with the pictures: a look is a few hundred bytes. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.data.buckets import Crop, Size, Sizes, of_resolution
from sfumato.data.checksums import check_files
from sfumato.data.crops import crop_example
from sfumato.data.folder import Example
from sfumato.data.images import pixels_of
from sfumato.data.prefetch import prefetch
from sfumato.errors import DataError

DARK, FLAT, SOFT = 6.0, 3.0, 0.006
"""Mean brightness and deviation, of 255, of a black picture and of one of one colour; sharpness of a blurred one."""
_AHEAD = 64
_THUMBNAIL_PX = 192


@dataclass(frozen=True)
class PictureStats:
    """One picture as training sees it, or why it cannot (error).

    content: hash of the crop's pixels. gradients: 128 signs of neighbouring differences, rows and columns (dHash).
    small: (256,) grey values of the crop in 16 x 16. brightness, contrast: mean and deviation, of 255. sharpness:
    variance of the Laplacian over the variance of the picture. thumbnail: the crop as a small JPEG, if it was asked
    for.
    """

    path: Path
    error: str = ""
    crop: Crop | None = None
    notes: tuple[str, ...] = ()
    content: bytes = b""
    gradients: bytes = b""
    small: bytes = b""
    brightness: float = 0.0
    contrast: float = 0.0
    sharpness: float = 0.0
    thumbnail: bytes = b""

    @property
    def flaws(self) -> tuple[str, ...]:
        """What is wrong with the picture itself: black, one colour, blurred."""
        if self.crop is None:
            return ()
        if self.contrast < FLAT:
            return ("black",) if self.brightness < DARK else ("one colour",)
        return ("blurred",) if self.sharpness < SOFT else ()


def survey(
    examples: Sequence[Example],
    sizes: Sizes,
    vae_factor: int,
    *,
    thumbnails: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[PictureStats]:
    """A look at each example, in order, on all cores, at its own resolution. progress: called with (looked at, all)."""

    def look(example: Example) -> PictureStats:
        return measure_picture(
            example, of_resolution(sizes, example.options.resolution), vae_factor, thumbnail=thumbnails
        )

    looks = prefetch(examples, look, window=_AHEAD, pixels=lambda example: pixels_of(example.path))
    for done, found in enumerate(looks, start=1):
        yield found
        if progress:
            progress(done, len(examples))


def measure_picture(example: Example, sizes: list[Size], vae_factor: int, *, thumbnail: bool = False) -> PictureStats:
    """Decode one example as training does."""
    try:
        check_files(example.files, example.checksums)
        cropped = crop_example(example, sizes, vae_factor)
    except DataError as error:
        return PictureStats(example.path, str(error))
    crop, image = cropped.crop, cropped.image
    rows, columns = crop.window(crop.middle)
    image = image.crop((columns.start, rows.start, columns.stop, rows.stop))
    grey = image.convert("L")
    values = np.asarray(grey, dtype=np.float32)
    small = grey.resize((16, 16), Image.Resampling.BOX)
    return PictureStats(
        example.path,
        "",
        crop,
        cropped.notes,
        hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest(),
        _gradients(grey),
        small.tobytes(),
        float(values.mean()),
        float(values.std()),
        _sharpness(values),
        _thumbnail(image) if thumbnail else b"",
    )


def _thumbnail(image: Image.Image) -> bytes:
    shown, file = image.copy(), io.BytesIO()
    shown.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    shown.save(file, "JPEG", quality=95, subsampling=0)  # of which no eye sees a difference
    return file.getvalue()


def _gradients(grey: Image.Image) -> bytes:
    rows = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    columns = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), dtype=np.int16)
    signs = np.concatenate([(np.diff(rows, axis=1) > 0).ravel(), (np.diff(columns, axis=0) > 0).ravel()])
    return np.packbits(signs).tobytes()


def _sharpness(values: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> float:
    """Variance of the Laplacian over that of the picture, less what rounding to whole grey values makes of it."""
    laplacian = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * values[1:-1, 1:-1]
    if not laplacian.size:
        return 0.0
    # Rounding has a variance of 1/12, and the squares of the Laplacian's weights sum up to 20.
    return max(0.0, float(laplacian.var()) - 20 / 12) / max(float(values.var()), 1e-6)
