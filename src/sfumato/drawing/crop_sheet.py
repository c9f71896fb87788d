"""Every crop that training will see, on sheets, with its name and what is wrong with it. Imports no torch."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

from sfumato.data.survey import PictureStats
from sfumato.drawing.sheet import label_font

_CELL_PX, _LINE_PX, _GAP_PX, _COLUMNS, _PAGE = 192, 16, 8, 8, 200
_INK, _WARNING, _EMPTY = (25, 25, 25), (190, 30, 20), (235, 235, 235)


def crop_sheets(looks: Sequence[PictureStats], names: Sequence[str], captions: Sequence[str]) -> Iterator[Image.Image]:
    """RGB sheets of at most 200 crops, one at a time. looks: made with thumbnails. names, captions: the lines below."""
    cells = list(zip(looks, names, captions, strict=True))
    for start in range(0, len(cells), _PAGE):
        yield _sheet(cells[start : start + _PAGE])


def sheets_of(count: int) -> int:
    """How many sheets `crop_sheets` makes of so many crops."""
    return -(-count // _PAGE)


def _sheet(cells: Sequence[tuple[PictureStats, str, str]]) -> Image.Image:
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    high = _CELL_PX + 3 * _LINE_PX + _GAP_PX
    sheet = Image.new("RGB", (columns * (_CELL_PX + _GAP_PX) + _GAP_PX, rows * high + _GAP_PX), "white")
    draw, font = ImageDraw.Draw(sheet), label_font(12, "".join(name + caption for _, name, caption in cells))
    for number, (look, name, caption) in enumerate(cells):
        left, top = _GAP_PX + number % columns * (_CELL_PX + _GAP_PX), _GAP_PX + number // columns * high
        if not look.thumbnail:
            draw.rectangle((left, top, left + _CELL_PX, top + _CELL_PX), fill=_EMPTY)
        else:
            picture = _fitted(Image.open(io.BytesIO(look.thumbnail)))
            corner = (left + (_CELL_PX - picture.width) // 2, top + (_CELL_PX - picture.height) // 2)
            sheet.paste(picture, corner)
        wrong = look.error.removeprefix(f"{look.path.name}: ") or ", ".join(_flaws(look))
        for line, (text, ink) in enumerate(((name, _INK), (caption, _INK), (wrong, _WARNING))):
            draw.text((left, top + _CELL_PX + line * _LINE_PX), _short(text, font), fill=ink, font=font)
    return sheet


def _flaws(look: PictureStats) -> list[str]:
    found = list(look.flaws)
    if look.crop is not None and look.crop.enlarges:
        found.append(f"enlarged x {look.crop.scale:.1f}")
    if look.crop is not None and look.crop.loses_much:
        found.append(f"{look.crop.kept:.0%} kept")
    return found


def _fitted(image: Image.Image) -> Image.Image:
    """Small pictures are enlarged by whole numbers, so that their pixels show."""
    times = max(1, _CELL_PX // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST) if times > 1 else image


def _short(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    whole = " ".join(text.split())  # a file's name may hold a line break, which Pillow cannot measure
    text = whole[:_CELL_PX]  # a letter is a pixel wide at least, and a caption may have a million
    if text == whole and font.getlength(text) <= _CELL_PX:
        return text
    while text and font.getlength(f"{text} ...") > _CELL_PX:
        text = text[:-1]
    return f"{text} ..."
