"""The pictures that the pocket base is trained on, as bench/pocket_data.py lays them out and docs/pocket.md says.

The sentences that the pocket base was taught.

Prompts of all that the pocket base was taught.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.data.images import open_image
from sfumato.data.preparation.latents import to_float
from sfumato.errors import DataError
from sfumato.utils import randomness


@dataclass(frozen=True)
class Variant:
    """A lossless change of a picture: its colour channels in another order, left for right, or both."""

    channels: tuple[int, ...] = (0, 1, 2)
    mirrored: bool = False

    @property
    def words(self) -> str:
        """What a caption says of it: "bgr colors, mirrored"; nothing of a picture as it is."""
        order = "".join("rgb"[channel] for channel in self.channels)
        return ", ".join([*([] if order == "rgb" else [f"{order} colors"]), *(["mirrored"] if self.mirrored else [])])

    def of(self, pixels: Tensor) -> Tensor:
        """(..., 3, h, w) of (..., 3, h, w)."""
        ordered = pixels[..., list(self.channels), :, :]
        return ordered.flip(-1) if self.mirrored else ordered


STEP = 16
"""Pixels that a side is a multiple of: the VAE divides it by four, the U-Net halves the latents twice."""

_WHITE = 235
"""A pixel with a channel below this is ink."""

VARIANTS = [Variant(order, mirrored) for order in permutations((0, 1, 2)) for mirrored in (False, True)]
"""All twelve; the first is the picture as it is, the second its mirror image."""


@dataclass(frozen=True)
class Move:
    """A lossless change of where things lie: quarter turns, then a shift in pixels; what comes in is white."""

    turns: int
    down: int
    right: int

    def of(self, pixels: Tensor) -> Tensor:
        """(3, h, w) of (3, h, w), both uint8; a picture that is not square keeps its sides in even turns alone."""
        turned = pixels.rot90(self.turns, (1, 2))
        height, width = turned.shape[1:]
        moved = torch.full_like(turned, 255)
        rows, columns = _overlap(self.down, height), _overlap(self.right, width)
        moved[:, rows[0], columns[0]] = turned[:, rows[1], columns[1]]
        return moved


def _overlap(shift: int, side: int) -> tuple[slice, slice]:
    """Where the shifted lines go, and whence they come."""
    kept = max(side - abs(shift), 0)
    to, of = max(shift, 0), max(-shift, 0)
    return slice(to, to + kept), slice(of, of + kept)


@dataclass(frozen=True)
class Pictures:
    """What is trained on: pixels (n, 3, h, w) uint8, and for each what it shows and in which style."""

    pixels: Tensor
    names: list[tuple[str, str]]

    def floats(self, indices: Sequence[int] | Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1]."""
        return to_float(self.pixels[indices])

    def and_others(self, others: Pictures) -> Pictures:
        """These, and those after them. Raises DataError where they are of another size."""
        if not others.names:
            return self
        size, wanted = (" x ".join(map(str, some.pixels.shape[2:])) for some in (others, self))
        if size != wanted:
            raise DataError(f"the other drawings are {size} px, those of the concepts {wanted}; draw them in one size.")
        return Pictures(torch.cat([self.pixels, others.pixels]), self.names + others.names)

    def fingerprint(self) -> str:
        """Changes with any pixel or name."""
        digest = hashlib.sha256(repr((tuple(self.pixels.shape), self.names)).encode())
        digest.update(self.pixels.numpy().data)
        return digest.hexdigest()

    def some(self, indices: Sequence[int]) -> Pictures:
        """Those at `indices`."""
        return Pictures(self.pixels[list(indices)], [self.names[index] for index in indices])

    def varied(self, variant: Variant) -> Pictures:
        """The same, in this variant."""
        return Pictures(variant.of(self.pixels), self.names)


def find_partners(pictures: Pictures, least_overlap: float = 0.0) -> list[list[int]]:
    """For each picture those of the same thing in other styles that lie where it lies.

    least_overlap: of the pixels that are ink (darker than white) in either, the share that is ink in both, at least.
    """
    ink = pictures.pixels.amin(1).lt(_WHITE).flatten(1)
    same: dict[str, list[int]] = {}
    for index, (what, _) in enumerate(pictures.names):
        same.setdefault(what, []).append(index)

    def alike(one: int, other: int) -> bool:
        both, either = ink[one] & ink[other], ink[one] | ink[other]
        return int(both.sum()) >= least_overlap * int(either.sum())

    return [
        [other for other in same[what] if other != index and alike(index, other)]
        for index, (what, _) in enumerate(pictures.names)
    ]


def read_pictures(data: Path) -> Pictures:
    """The pictures of the concepts that the base draws, without the withheld ones. Raises DataError for one that is
    missing or no picture, and for sizes that no base of these shapes takes."""
    manifest = read_manifest(data)
    hidden = {tuple(cell) for cell in manifest["withheld"]}
    cells = [(c, s) for s in manifest["styles"] for c in manifest["concepts"] if (c, s) not in hidden]
    if not cells:
        raise DataError(f"{data / 'manifest.json'}: every image is withheld; leave some to learn from.")
    paths = [data / style / f"{concept.replace(' ', '-')}.png" for concept, style in cells]
    for cell, path in zip(cells, paths, strict=True):
        if not path.is_file():
            raise DataError(f'{path} is missing; add it, or add {json.dumps(cell)} to manifest.json\'s "withheld".')
    pictures = _read(paths, cells)
    height, width = pictures.pixels.shape[2:]
    if height != width or height % STEP:
        raise DataError(
            f"{data}: its images are {width} x {height} px; wanted squares of a multiple of {STEP} px, such as 64."
        )
    return pictures


def read_others(data: Path) -> Pictures:
    """The sets' other pictures, named as their files are; none where the data was built without them. Raises DataError
    for one that shows what is withheld."""
    paths = _others(data)
    names = [(_shown(path), path.parent.name) for path in paths]
    withheld = {(concept, style) for concept, style in read_manifest(data)["withheld"]}
    for path, name in zip(paths, names, strict=True):
        if name in withheld:
            raise DataError(f"{path} shows what manifest.json withholds, {json.dumps(name)}; take either away.")
    return _read(paths, names)


def seen_pictures(data: Path, others_share: float) -> tuple[Pictures, int]:
    """What a U-Net is shown, and how many of it, the first ones, are of the concepts and not other drawings.

    Raises DataError where there are none of these, of which there is to be a share.
    """
    pictures = read_pictures(data)
    named = len(pictures.names)
    if others_share:
        pictures = pictures.and_others(read_others(data))
        if len(pictures.names) == named:
            raise DataError(
                f"{data} holds no other drawings, --others-share is {others_share}; put some into other/STYLE/, as "
                "docs/pocket.md says, or leave the share at 0."
            )
    return pictures, named


def other_names(data: Path) -> list[str]:
    """What the sets' other pictures show, each once, in order."""
    return sorted({_shown(path) for path in _others(data)})


def _others(data: Path) -> list[Path]:
    return [path for style in read_manifest(data)["styles"] for path in sorted((data / "other" / style).glob("*.png"))]


def _shown(path: Path) -> str:
    return path.stem.replace("-", " ")


def _read(paths: Sequence[Path], names: list[tuple[str, str]]) -> Pictures:
    arrays = [_opened(path) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            size, first = (f"{width} x {height}" for height, width, _ in (array.shape, arrays[0].shape))
            raise DataError(f"{path} is {size} px, {paths[0]} {first}; bring all to one size.")
    pixels = np.stack(arrays) if arrays else np.empty((0, 64, 64, 3), np.uint8)
    return Pictures(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), names)


def _opened(path: Path) -> NDArray[np.uint8]:
    """(h, w, 3)."""
    try:
        return np.asarray(open_image(path))
    except DataError as error:  # which names the file, and there is one of the name in every style
        raise DataError(f"{path.parent.as_posix()}/{error}") from None


def read_manifest(data: Path) -> dict[str, Any]:
    """The manifest of a folder of pictures: "styles", "concepts", each with its group, and "withheld".

    Raises DataError where there is none, or one that does not say these.
    """
    path = data / "manifest.json"
    if not path.exists():
        raise DataError(
            f"{path} is missing; build the images with python -m bench.pocket_data --out {data}, or lay out your own "
            "as docs/pocket.md says."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({' '.join(str(error).split())}); mend that place.") from None
    if problem := _problem_of(manifest):
        raise DataError(f"{path}: {problem}; docs/pocket.md shows one.")
    found: dict[str, Any] = {**manifest, "withheld": manifest.get("withheld") or []}
    return found


def _problem_of(manifest: Any) -> str:
    """What a manifest lacks; nothing of one that is as it should be."""

    def words(of: Any) -> bool:
        return bool(of) and all(isinstance(word, str) and word for word in of)

    if not isinstance(manifest, dict):
        return 'wanted an object with "styles" and "concepts"'
    styles, concepts, withheld = (manifest.get(name) for name in ("styles", "concepts", "withheld"))
    if not isinstance(styles, list) or not words(styles):
        return '"styles" must be a list of names'
    if not isinstance(concepts, dict) or not words(concepts) or not words(concepts.values()):
        return '"concepts" must be an object, concept: what it is one of'
    if not isinstance(withheld or [], list):
        return '"withheld" must be a list of [concept, style]'
    for cell in withheld or []:
        if not isinstance(cell, list) or len(cell) != 2 or cell[0] not in [*concepts] or cell[1] not in styles:
            return f'"withheld" has {json.dumps(cell)}, which is no [concept, style] of these'
    return ""


def batch_indices(step: int, batch: int, n: int, seed: int) -> list[int]:
    """Which pictures step `step` sees: every picture once an epoch, each epoch in an order of its own."""
    places = range(step * batch, (step + 1) * batch)
    orders = {epoch: randomness.permutation(n, seed, "order", epoch) for epoch in {place // n for place in places}}
    return [orders[place // n][place % n] for place in places]


def caption(
    concept: str,
    style: str,
    group: str,
    *,
    draw: float,
    form: float,
    empty_share: float,
    group_share: float,
    plain_share: float,
) -> str:
    """One caption for a picture; `draw` and `form` are uniform in [0, 1).

    `draw` decides between no words, the group and the concept; `form` between the ways to put it: `plain_share`
    "{concept}", a third of the rest "a {style} style picture of a {concept}", the others "{concept}, {style} style".
    Of the groups twice that share is plain.
    """
    if draw < empty_share:
        return ""
    if draw < empty_share + group_share:
        return f"{group}, {style} style" if form < 1 - 2 * plain_share else group
    if form >= 1 - plain_share:
        return concept
    first = form < (1 - plain_share) * 2 / 3
    return f"{concept}, {style} style" if first else f"a {style} style picture of a {concept}"


def other_caption(name: str, style: str, *, draw: float, form: float, empty_share: float) -> str:
    """One caption for a picture of something that the base is not asked for; `draw` and `form` as for `caption`.

    A third name the style alone: what its hand is, whatever it draws.
    """
    if draw < empty_share:
        return ""
    return f"{style} style" if form < 1 / 3 else f"{name}, {style} style"


def all_captions(manifest: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """Every caption that training can meet, and `words` besides: what the tokenizer is learned from."""
    styles, concepts = manifest["styles"], manifest["concepts"]
    texts = [f"{concept}, {style} style" for concept in concepts for style in styles]
    texts += [f"a {style} style picture of {group}" for group in concepts.values() for style in styles]
    return texts + list(words)


def captions_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Changes with any name of a concept, a group or a style, and with their order."""
    told = [list(manifest["styles"]), list(manifest["concepts"].items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def read_words(data: Path) -> list[str]:
    """The plain words that the tokenizer learns besides those of the captions."""
    try:
        return (data / "words.txt").read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(
            f"{data / 'words.txt'} cannot be read ({reason}); build the pictures with python -m "
            f"bench.pocket_data --out {data}, or write one: words of prompts besides the captions', one a line."
        ) from None


def known_prompts() -> list[str]:
    """Each concept in each style, and with no style named."""
    concepts, styles = (
        json.loads(resources.files("sfumato.models.pocket").joinpath(name).read_text(encoding="utf-8"))
        for name in ("concepts.json", "manifest.json")
    )
    named = [f"{concept}, {style} style" for concept in concepts for style in styles["styles"]]
    return named + list(concepts)
