"""Contact sheets: rows and columns of pictures with labels, on white.

Pictures on a sheet, each with lines of its own below. Imports no torch.
"""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Cells = Sequence[Sequence[Image.Image | None]]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_INK = (25, 25, 25)
_SMALLEST_CELL_PX = 128
_LARGEST_CELL_PX = 512
_MOST_PX = 2**27
"""Of all pictures of a sheet: Pillow opens no image of more than 179 million, and few programs do."""
_LONGEST_LABEL = 2_000
"""Letters of a label that are shown. One may be a caption, of which a file has up to a million."""


def label_font(size_px: int, text: str = "") -> Font:
    """DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic, Arabic and more, where Pillow's own has ASCII.

    text: what is to be written. If it has signs that DejaVu lacks (Chinese, Japanese, Thai), the font of this machine
    that has most of it; a sign that none has is a box, in contact sheets an emoji its name.
    """
    from matplotlib import get_data_path
    from matplotlib.font_manager import findSystemFonts

    path = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    wanted = {ord(sign) for sign in text if not sign.isspace()}
    if not wanted <= _code_points_of(path):
        upright_first = sorted(findSystemFonts(), key=lambda found: ("Regular" not in found, found))
        path = max([path, *upright_first], key=lambda found: len(wanted & _code_points_of(found)))
    return ImageFont.truetype(path, size_px)


@cache
def _code_points_of(path: str) -> frozenset[int]:
    """The code points that a font has; none of one whose signs are pictures, or that stands in for missing ones."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    if not font.scalable or "Resort" in font.family_name:
        return frozenset()
    return frozenset(font.get_charmap())


def read_image_or_none(path: Path) -> Image.Image | None:
    """The picture that was drawn into this PNG, RGB; None where there is none, or what a broken disk left of one."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def contact_sheet(
    cells: Cells,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """An RGB sheet of the pictures, each row one list; None leaves a cell white, and rows may differ in length.

    Small pictures are enlarged by whole numbers to 128 px and large ones reduced to 512 px, or further where there are
    hundreds. Labels are wrapped to the cells' width, and a row is no lower than its label. Raises ValueError without
    any picture.
    """
    pictures = [picture for row in cells for picture in row if picture is not None]
    if not pictures:
        raise ValueError("a contact sheet needs at least one image")
    largest = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    shape = len(cells), max(len(row) for row in cells)
    at = _layout(largest, shape, row_labels, column_labels, title)
    sheet = Image.new("RGB", at.size, "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, at.titles, (at.gap, at.gap), at.line_px, at.font)
    for column, lines in enumerate(at.heads):
        # Short labels stand on their pictures, whatever the longest one needs.
        corner = at.left + column * (at.cell[0] + at.gap), at.tops[0] - at.gap // 2 - len(lines) * at.line_px
        _write(draw, lines, corner, at.line_px, at.font)
    for number, row in enumerate(cells):
        middle = (at.tops[number] + at.tops[number + 1] - at.gap) // 2
        if number < len(at.sides):
            lines = at.sides[number]
            _write(draw, lines, (at.gap, middle - len(lines) * at.line_px // 2), at.line_px, at.font)
        for column, picture in enumerate(row):
            if picture is not None:
                corner = at.left + column * (at.cell[0] + at.gap), middle - at.cell[1] // 2
                sheet.paste(_resized(picture, at.scale), corner)
    return sheet


def sheet_size(picture: tuple[int, int], *, row_labels: Sequence[str], column_labels: Sequence[str]) -> tuple[int, int]:
    """The pixels of a sheet of pictures of this size, one for each row and column."""
    return _layout(picture, (len(row_labels), len(column_labels)), row_labels, column_labels, "").size


@dataclass(frozen=True)
class _Layout:
    """Where all is on a sheet, in pixels. scale: of the pictures. cell: the size of one. left: where the first is.
    tops: of the rows, and of one below the last. titles, heads, sides: the lines of the labels."""

    scale: float
    cell: tuple[int, int]
    font: Font
    gap: int
    line_px: int
    left: int
    tops: list[int]
    titles: list[str]
    heads: list[list[str]]
    sides: list[list[str]]
    size: tuple[int, int]


def _layout(
    picture: tuple[int, int],
    shape: tuple[int, int],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
) -> _Layout:
    """Of a sheet of so many rows and columns; picture: the largest width and height."""
    rows, columns = shape
    scale = _scale(max(picture), rows * columns)
    cell = _scaled(picture, scale)
    size_px = min(28, max(14, cell[0] // 10))
    font = label_font(size_px, "".join([title, *column_labels, *row_labels]))
    gap = max(10, cell[0] // 20)
    heads = [wrap(label, font, cell[0]) for label in column_labels[:columns]]
    sides = [wrap(label, font, max(120, cell[0])) for label in row_labels[:rows]]
    side_px = max((_width(line, font) for lines in sides for line in lines), default=0)
    left = gap + (side_px + gap if side_px else 0)
    line_px = round(size_px * 1.3)
    width = left + columns * (cell[0] + gap)
    titles = wrap(title, font, width - 2 * gap) if title else []
    head_top = gap + (len(titles) * line_px + gap if titles else 0)
    top = head_top + (max((len(lines) for lines in heads), default=0) * line_px + gap // 2 if heads else 0)
    highs = [max(cell[1], len(lines) * line_px) for lines in sides] + [cell[1]] * (rows - len(sides))
    tops = list(accumulate((high + gap for high in highs), initial=top))
    return _Layout(scale, cell, font, gap, line_px, left, tops, titles, heads, sides, (width, tops[-1]))


def _scale(side: int, count: int) -> float:
    """Pixels of the sheet to a pixel of a picture with this longest side, one of so many."""
    largest = min(_LARGEST_CELL_PX, math.isqrt(_MOST_PX // count))
    if side < _SMALLEST_CELL_PX <= largest:
        return -(-_SMALLEST_CELL_PX // side)
    return min(1.0, largest / side)


def shrink_for_sheet(picture: Image.Image, side: int, count: int) -> Image.Image:
    """The picture no larger than a contact sheet shows it, one of so many of this longest side: enough to keep."""
    return _resized(picture, min(1.0, _scale(side, count)))


def _resized(picture: Image.Image, scale: float) -> Image.Image:
    rgb = picture.convert("RGB")
    if scale == 1:
        return rgb
    return rgb.resize(_scaled(rgb.size, scale), Image.Resampling.LANCZOS)


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Of a picture at this scale; one of 8 x 8192 pixels would have no width."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _emoji_as_names(text: str, font: Font) -> str:
    """The text, with signs that are pictures and that the font lacks, emoji above all, by their names: [crab]."""
    known = _code_points_of(str(font.path)) if isinstance(font, ImageFont.FreeTypeFont) else frozenset()
    return "".join(
        f"[{unicodedata.name(sign, 'picture').lower()}]"
        if ord(sign) not in known and unicodedata.category(sign) == "So"
        else sign
        for sign in text
    )


def wrap(text: str, font: Font, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words, or within one that is longer. Of a text
    without end the beginning."""
    lines: list[str] = []
    text = text if len(text) <= _LONGEST_LABEL else f"{text[:_LONGEST_LABEL]} ..."
    for paragraph in _emoji_as_names(text, font).splitlines():
        line = ""
        for word in paragraph.split():
            if line and _width(f"{line} {word}", font) <= width:
                line = f"{line} {word}"
                continue
            if line:
                lines.append(line)
            line = word
            while _width(line, font) > width and len(line) > 1:
                # By halves: Chinese and Japanese captions are one word, which else takes the cube of its length.
                fits = max(1, bisect_right(range(len(line)), width, key=lambda n: _width(line[:n], font)) - 1)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return lines


def _width(text: str, font: Font) -> int:
    return int(-(-font.getlength(text) // 1))


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    corner: tuple[int, int],
    line_px: int,
    font: Font,
) -> None:
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * line_px), line, fill=_INK, font=font)


_CELL_PX, _LINE_PX, _GAP_PX, _COLUMNS = 192, 16, 8, 8
_LABEL_INK, _EMPTY = (25, 25, 25), (235, 235, 235)


@dataclass(frozen=True)
class Label:
    """A text below a picture, cut where it takes more than so many lines."""

    text: str
    ink: tuple[int, int, int] = _LABEL_INK
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
