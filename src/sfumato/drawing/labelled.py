"""Pictures on a sheet, each with lines of its own below. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from sfumato.drawing.sheet import Font, label_font, wrap

_CELL_PX, _LINE_PX, _GAP_PX, _COLUMNS = 192, 16, 8, 8
_INK, _EMPTY = (25, 25, 25), (235, 235, 235)


@dataclass(frozen=True)
class Label:
    """A text below a picture, cut where it takes more than so many lines."""

    text: str
    ink: tuple[int, int, int] = _INK
    lines: int = 1


@dataclass(frozen=True)
class Cell:
    """A picture, or None for a grey square, and its labels, one below the other."""

    picture: Image.Image | None
    labels: Sequence[Label]


def labelled_sheet(cells: Sequence[Cell]) -> Image.Image:
    """An RGB sheet of at least one picture, eight in a row. Small ones are enlarged by whole numbers, so that their
    pixels show, and large ones reduced."""
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    font = label_font(12, "".join(label.text for cell in cells for label in cell.labels))
    below = [[_lines(label, font) for label in cell.labels] for cell in cells]
    high = _CELL_PX + max(sum(map(len, lines)) for lines in below) * _LINE_PX + _GAP_PX
    sheet = Image.new("RGB", (columns * (_CELL_PX + _GAP_PX) + _GAP_PX, rows * high + _GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (cell, texts) in enumerate(zip(cells, below, strict=True)):
        left, top = _GAP_PX + number % columns * (_CELL_PX + _GAP_PX), _GAP_PX + number // columns * high
        if cell.picture is None:
            draw.rectangle((left, top, left + _CELL_PX, top + _CELL_PX), fill=_EMPTY)
        else:
            picture = _fitted(cell.picture)
            sheet.paste(picture, (left + (_CELL_PX - picture.width) // 2, top + (_CELL_PX - picture.height) // 2))
        at = top + _CELL_PX
        for label, lines in zip(cell.labels, texts, strict=True):
            for line in lines:
                draw.text((left, at), line, fill=label.ink, font=font)
                at += _LINE_PX
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest > _CELL_PX:
        reduced = image.copy()
        reduced.thumbnail((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS)
        return reduced
    times = _CELL_PX // longest
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST) if times > 1 else image


def _lines(label: Label, font: Font) -> list[str]:
    """As many as the label has, so that those of the next one stand side by side; the last may be cut."""
    whole = wrap(label.text, font, _CELL_PX) if label.lines > 1 else []
    if 0 < len(whole) <= label.lines:
        return whole
    kept = whole[: label.lines - 1]
    rest = " ".join(whole[label.lines - 1 :]) if whole else label.text
    return [*kept, _cut(rest, font)]


def _cut(text: str, font: Font) -> str:
    whole = " ".join(text.split())  # a file's name may hold a line break, which Pillow cannot measure
    text = whole[:_CELL_PX]  # a letter is a pixel wide at least, and a caption may have a million
    if text == whole and font.getlength(text) <= _CELL_PX:
        return text
    while text and font.getlength(f"{text} ...") > _CELL_PX:
        text = text[:-1]
    return f"{text} ..."
