"""Every crop that training will see, on sheets, with its name and what is wrong with it. Imports no torch."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from PIL import Image

from sfumato.data.survey import PictureStats
from sfumato.drawing.labelled import Cell, Label, labelled_sheet

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
