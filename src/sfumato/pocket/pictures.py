"""The pictures that the pocket base is trained on, as bench/pocket_data.py lays them out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato import randomness
from sfumato.data.latents import to_floats
from sfumato.errors import DataError


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
        return to_floats(self.pixels[indices])

    def and_others(self, others: Pictures) -> Pictures:
        """These, and those after them."""
        return Pictures(torch.cat([self.pixels, others.pixels]), self.names + others.names)

    def fingerprint(self) -> str:
        """Changes with any pixel or name."""
        digest = hashlib.sha256(repr((tuple(self.pixels.shape), self.names)).encode())
        digest.update(self.pixels.numpy().data)
        return digest.hexdigest()

    def varied(self, variant: Variant) -> Pictures:
        """The same, in this variant."""
        return Pictures(variant.of(self.pixels), self.names)


def partners_of(pictures: Pictures, least_overlap: float = 0.0) -> list[list[int]]:
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
    """The pictures of the concepts that the base draws, without the withheld ones."""
    manifest = read_manifest(data)
    hidden = {tuple(cell) for cell in manifest["withheld"]}
    cells = [(c, s) for s in manifest["styles"] for c in manifest["concepts"] if (c, s) not in hidden]
    return _read([data / style / f"{concept.replace(' ', '-')}.png" for concept, style in cells], cells)


def read_others(data: Path) -> Pictures:
    """The sets' other pictures, named as their files are; none where the data was built without them."""
    paths = [path for style in read_manifest(data)["styles"] for path in sorted((data / "other" / style).glob("*.png"))]
    return _read(paths, [(path.stem.replace("-", " "), path.parent.name) for path in paths])


def _read(paths: Sequence[Path], names: list[tuple[str, str]]) -> Pictures:
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    pixels = np.stack(arrays) if arrays else np.empty((0, 64, 64, 3), np.uint8)
    return Pictures(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), names)


def read_manifest(data: Path) -> dict[str, Any]:
    """The manifest of a folder that bench/pocket_data.py built; raises DataError where there is none."""
    path = data / "manifest.json"
    if not path.exists():
        raise DataError(f"{path} is missing; build the pictures with python -m bench.pocket_data --out {data}.")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def batch_indices(step: int, batch: int, n: int, seed: int) -> list[int]:
    """Which pictures step `step` sees: every picture once an epoch, each epoch in an order of its own."""
    places = range(step * batch, (step + 1) * batch)
    orders = {epoch: randomness.permutation(n, seed, "order", epoch) for epoch in {place // n for place in places}}
    return [orders[place // n][place % n] for place in places]
