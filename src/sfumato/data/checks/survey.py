"""Looking at every picture once: what training will see of it, and whether there is anything to see.

Memory does not grow with the pictures: a look is a few hundred bytes. Imports no torch.

Pictures that are there twice, exactly or nearly. Imports no torch.

Every crop that training will see, on sheets, with its name and what is wrong with it. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from sfumato.data.buckets import Crop, Size, Sizes, crop_example, sizes_of_resolution
from sfumato.data.checksums import check_files
from sfumato.data.folder import Example
from sfumato.data.images import pixels_of
from sfumato.data.preparation.prefetch import prefetch
from sfumato.errors import DataError
from sfumato.utils.image_grid import Cell, Label, labelled_sheet

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
            example, sizes_of_resolution(sizes, example.options.resolution), vae_factor, thumbnail=thumbnails
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


NEAR_BITS = 20
"""Of the 128 gradient signs, how many may differ."""
NEAR_VALUES = 6.0
"""Mean difference, of 255, that two pictures of 16 x 16 may have."""
_BLOCK, _PAIRS = 512, 8192
_Places: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.intp]]"


def find_duplicates(looks: Sequence[PictureStats]) -> tuple[list[list[int]], list[list[int]]]:
    """(groups of equal crops, groups of nearly equal ones), as places in `looks`; those that failed are passed over.

    Near groups hold one of each group of equals. Gradients find them (dHash, rows and columns), small pictures confirm.
    """
    equal: dict[bytes, list[int]] = {}
    for place, look in enumerate(looks):
        if not look.error:
            equal.setdefault(look.content, []).append(place)
    exact = [places for places in equal.values() if len(places) > 1]
    # Black ones and empty ones are alike, which is said of them already.
    alone = [places[0] for places in equal.values() if not looks[places[0]].flaws]
    return exact, _near(looks, alone)


def _near(looks: Sequence[PictureStats], places: Sequence[int]) -> list[list[int]]:
    if len(places) < 2:
        return []
    signs = np.frombuffer(b"".join(looks[place].gradients for place in places), dtype=np.uint64).reshape(-1, 2)
    small = np.frombuffer(b"".join(looks[place].small for place in places), dtype=np.uint8).reshape(-1, 256)
    firsts: _Places = np.arange(len(places), dtype=np.intp)  # of each one's group the first

    for start in range(0, len(places), _BLOCK):
        rows = signs[start : start + _BLOCK]
        differing = sum(_bits(rows[:, None, word] ^ signs[None, start:, word]) for word in range(2))
        pairs = np.argwhere(np.triu(differing <= NEAR_BITS, 1)) + start  # columns begin where rows do
        for some in (pairs[place : place + _PAIRS] for place in range(0, len(pairs), _PAIRS)):
            apart = some[firsts[some[:, 0]] != firsts[some[:, 1]]]  # of many that are alike, few pairs
            alike = _differences(small[apart[:, 0]], small[apart[:, 1]]) <= NEAR_VALUES
            firsts = _joined(firsts, apart[alike])
    groups: dict[int, list[int]] = {}
    for place, first in zip(places, firsts.tolist(), strict=True):
        groups.setdefault(first, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _joined(firsts: _Places, pairs: _Places) -> _Places:
    """The first of each one's group once both of every pair are in one."""
    while True:
        ends = np.sort(firsts[pairs], axis=1)
        ends = ends[ends[:, 0] != ends[:, 1]]
        if not len(ends):
            return firsts
        firsts = firsts.copy()
        np.minimum.at(firsts, ends[:, 1], ends[:, 0])
        while (firsts[firsts] != firsts).any():
            firsts = firsts[firsts]


def _bits(words: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """How many bits of each word are set; numpy has a function for it from version 2 on."""
    if hasattr(np, "bitwise_count"):
        counts: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = np.bitwise_count(words)
        return counts
    table = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)
    summed: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = table[words[..., None].view(np.uint8)].sum(
        axis=-1, dtype=np.uint8
    )
    return summed


def _differences(
    first: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], second: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The mean difference of each pair of rows."""
    apart: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.abs(
        first.astype(np.int16) - second.astype(np.int16)
    ).mean(axis=1)
    return apart


_PAGE = 200
_WARNING = (190, 30, 20)


def crop_sheets(looks: Sequence[PictureStats], names: Sequence[str], captions: Sequence[str]) -> Iterator[Image.Image]:
    """RGB sheets of at most 200 crops, one at a time. looks: made with thumbnails. names, captions: the lines below."""
    cells = list(zip(looks, names, captions, strict=True))
    for start in range(0, len(cells), _PAGE):
        yield _sheet(cells[start : start + _PAGE])


def sheets_of(count: int) -> int:
    """How many sheets `crop_sheets` makes of so many crops."""
    return -(-count // _PAGE)


def _sheet(cells: Sequence[tuple[PictureStats, str, str]]) -> Image.Image:
    shown = []
    for look, name, caption in cells:
        wrong = look.error.removeprefix(f"{look.path.name}: ") or ", ".join(_flaws(look))
        picture = Image.open(io.BytesIO(look.thumbnail)) if look.thumbnail else None
        shown.append(Cell(picture, [Label(name), Label(caption), Label(wrong, _WARNING)]))
    return labelled_sheet(shown)


def _flaws(look: PictureStats) -> list[str]:
    found = list(look.flaws)
    if look.crop is not None and look.crop.enlarges:
        found.append(f"enlarged x {look.crop.scale:.1f}")
    if look.crop is not None and look.crop.loses_much:
        found.append(f"{look.crop.kept:.0%} kept")
    return found
