"""The real pictures that bench/judge.py learns from, and how they are varied while it learns."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.errors import DataError
from sfumato.utils import randomness


@dataclass(frozen=True)
class Pictures:
    """Named pictures: pixels (n, 3, 64, 64) uint8, and for each its place in `concepts` and in `styles`, (n,) long."""

    pixels: Tensor
    concept: Tensor
    style: Tensor
    concepts: tuple[str, ...]
    styles: tuple[str, ...]

    def names(self) -> list[tuple[str, str]]:
        """(concept, style) of each."""
        pairs = zip(self.concept.tolist(), self.style.tolist(), strict=True)
        return [(self.concepts[c], self.styles[s]) for c, s in pairs]

    def apart(self, cells: Collection[tuple[str, str]]) -> tuple[Pictures, Pictures]:
        """Those whose (concept, style) is not among `cells`, and those whose is."""
        inside = [name in cells for name in self.names()]
        others, these = ([i for i, is_inside in enumerate(inside) if is_inside == wanted] for wanted in (False, True))
        return self._at(others), self._at(these)

    def cells(self, cells: Sequence[tuple[str, str]]) -> Pictures:
        """One picture for each of `cells`, in their order."""
        places = {name: i for i, name in enumerate(self.names())}
        return self._at([places[cell] for cell in cells])

    def and_others(self, others: Pictures) -> Pictures:
        """These and those of other concepts, numbered after these."""
        concept = torch.cat([self.concept, others.concept + len(self.concepts)])
        style = torch.cat([self.style, torch.tensor([self.styles.index(s) for s in others.styles])[others.style]])
        pixels = torch.cat([self.pixels, others.pixels])
        return Pictures(pixels, concept, style, self.concepts + others.concepts, self.styles)

    def _at(self, places: Sequence[int]) -> Pictures:
        index = torch.tensor(places, dtype=torch.long)
        return Pictures(self.pixels[index], self.concept[index], self.style[index], self.concepts, self.styles)


def read_named(cells: Mapping[tuple[str, str], Path], concepts: Sequence[str], styles: Sequence[str]) -> Pictures:
    """Pictures from (concept, style) -> file, in that order; other sizes than 64 px are resized to it."""
    arrays = []
    for path in cells.values():
        with Image.open(path) as picture:
            arrays.append(np.asarray(picture.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)))
    pixels = np.stack(arrays) if arrays else np.zeros((0, 64, 64, 3), np.uint8)
    number = {name: i for i, name in enumerate(concepts)}
    return Pictures(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([number[concept] for concept, _ in cells], dtype=torch.long),
        torch.tensor([list(styles).index(style) for _, style in cells], dtype=torch.long),
        tuple(concepts),
        tuple(styles),
    )


def read_pictures(data: Path, styles: Sequence[str] = (), concepts: Sequence[str] = ()) -> Pictures:
    """Every picture of the styles and concepts. Raises DataError where one is missing.

    Names in `concepts` are written with spaces, their files with hyphens.
    """
    listed = read_manifest(data).get("styles")
    found = sorted(f.name for f in data.iterdir() if f.is_dir()) if data.is_dir() else []
    styles = tuple(styles or listed or found)
    if not styles:
        raise DataError(f"{data} holds no folder of pictures; give --data a folder laid out as STYLE/CONCEPT.png.")
    if not concepts:
        per_style = [{f.stem for f in (data / style).glob("*.png")} for style in styles]
        concepts = [name.replace("-", " ") for name in sorted(set.intersection(*per_style))]
    if not concepts:
        raise DataError(f"{data}: no concept has a .png in all of {', '.join(styles)}; give other --styles or --data.")
    cells = {(name, s): data / s / f"{name.replace(' ', '-')}.png" for s in styles for name in concepts}
    for (name, style), path in cells.items():
        if not path.exists():
            raise DataError(f"{path} is missing; take {name!r} off --concepts, or {style!r} off --styles.")
    return read_named(cells, concepts, styles)


def read_others(data: Path, styles: Sequence[str]) -> Pictures:
    """The pictures under DATA/other/STYLE, of concepts that no base is asked for; none without such a folder."""
    cells = {
        (f"other {path.stem}", style): path
        for style in styles
        for path in sorted((data / "other" / style).glob("*.png"))
    }
    return read_named(cells, sorted({name for name, _ in cells}), styles)


def read_manifest(data: Path) -> dict[str, Any]:
    """The data's manifest.json; empty where there is none."""
    path = data / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return manifest


def withheld_cells(data: Path) -> set[tuple[str, str]]:
    """The (concept, style) cells that neither the base nor the judge may learn from."""
    return {(concept, style) for concept, style in read_manifest(data).get("withheld", [])}


def chosen_tenth(pictures: Pictures) -> set[tuple[str, str]]:
    """One cell in ten, drawn by lot, for a judge's own test."""
    cells = [(concept, style) for concept in pictures.concepts for style in pictures.styles]
    return {cells[place] for place in randomness.permutation(len(cells), 0, "judge withheld")[: len(cells) // 10]}


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted, scaled, turned, mirrored, softened copies of (b, 3, h, w) in [-1, 1], in their own colours on white.

    Softness matters: it keeps the judge from mistaking a decoder's for another style. Half are softened as a whole, and
    independently half in their colours alone, as a picture is that was squeezed through fewer numbers.
    """
    draw = _Draw(len(pixels), generator)
    turn, scale = draw(-0.17, 0.17), draw(0.85, 1.2)
    mirror = torch.where(draw(0, 1) < 0.5, 1.0, -1.0)
    rows = [turn.cos() * scale * mirror, -turn.sin() * scale, draw(-0.12, 0.12)]
    columns = [turn.sin() * scale * mirror, turn.cos() * scale, draw(-0.12, 0.12)]
    affine = torch.stack([torch.stack(rows, 1), torch.stack(columns, 1)], 1)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels - 1, grid, align_corners=False) + 1
    moved = moved.lerp(_soft(moved, 2), draw(0, 1, 1, 1, 1) * draw.maybe(0.5))
    colour = moved - moved.mean(1, keepdim=True)
    moved = moved + (_soft(colour, 4) - colour) * draw(0, 0.7, 1, 1, 1) * draw.maybe(0.5)
    speckle = torch.randn(moved.shape, generator=generator)
    blotch = _soft(torch.randn(moved.shape, generator=generator), 4)
    return (moved + speckle * draw(0, 0.03, 1, 1, 1) + blotch * draw(0, 0.15, 1, 1, 1) * draw.maybe(0.5)).clamp(-1, 1)


def recolour(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Copies of (b, 3, h, w) in [-1, 1] with other colours on white, and half of them with a hole."""
    draw = _Draw(len(pixels), generator)
    ink = 1 - pixels
    ink = ink.lerp(ink.mean(1, keepdim=True).expand_as(ink), draw(0, 1, 1, 1, 1) * draw.maybe(0.5))
    order = torch.stack([torch.randperm(3, generator=generator) for _ in range(len(pixels))])
    exchanged = ink.gather(1, order[:, :, None, None].expand_as(ink))
    ink = ink.lerp(exchanged, draw(0, 1, 1, 1, 1) * draw.maybe(0.4))
    ink = ink * draw(0.8, 1.2, 1, 1, 1) * draw(0.8, 1.2, 3, 1, 1)
    side = pixels.shape[-1]
    along = torch.arange(side).expand(len(pixels), side)
    holes = [(along - draw(0, side, 1)).abs() < draw(side / 16, side / 4.5, 1) for _ in range(2)]
    hole = holes[0][:, None, :, None] & holes[1][:, None, None, :] & (draw.maybe(0.5) > 0)
    return (1 - ink.masked_fill(hole, 0.0)).clamp(-1, 1)


class _Draw:
    """Uniform numbers for each picture of a batch."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator

    def __call__(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(self.count, *shape, generator=self.generator)

    def maybe(self, chance: float) -> Tensor:
        """(b, 1, 1, 1): 1 with this chance, else 0."""
        return (self(0, 1, 1, 1, 1) < chance).float()


def _soft(pixels: Tensor, factor: int) -> Tensor:
    """The pictures at 1/factor of their size and back."""
    small = F.avg_pool2d(pixels, factor)
    return F.interpolate(small, scale_factor=factor, mode="bilinear", align_corners=False)
