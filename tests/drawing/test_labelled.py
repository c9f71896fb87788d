"""Pictures on a sheet, each above its own lines."""

import numpy as np
import pytest
from PIL import Image

from sfumato.utils import image_grid
from sfumato.utils.image_grid import Cell, Label, labelled_sheet

RED = (255, 0, 0)


def box(sheet, colour):
    """(left, top, right, bottom) of everything of one colour."""
    rows, columns = np.nonzero((np.asarray(sheet) == np.array(colour)).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize(("size", "shown"), [((64, 32), (192, 96)), ((1024, 512), (192, 96)), ((100, 100), (100, 100))])
def test_a_picture_is_enlarged_by_whole_numbers_or_reduced_to_its_cell(size, shown):
    left, top, right, bottom = box(labelled_sheet([Cell(Image.new("RGB", size, RED), [])]), RED)
    assert (right - left, bottom - top) == shown


def test_a_long_caption_takes_its_lines_and_is_cut_after_them():
    def inked(*labels):
        sheet = np.asarray(labelled_sheet([Cell(None, labels)]))[200:]
        rows = (sheet != 255).any(axis=(1, 2))
        return int((np.diff(rows.astype(int)) == 1).sum()), len(sheet)

    words = "wwww " * 100
    assert [inked(Label(words, lines=lines)) for lines in (1, 2, 5)] == [(1, 24), (2, 40), (5, 88)]
    assert inked(Label("wwww", lines=5)) == (1, 24)
    assert inked(Label("wwww"), Label(words, lines=2), Label("wwww")) == (4, 72)
    font = image_grid.label_font(12)
    assert image_grid._lines(Label("wwww", lines=5), font) == ["wwww"]
    assert image_grid._lines(Label(words, lines=3), font)[-1].endswith(" ...")


def test_nine_pictures_take_two_rows():
    cells = [Cell(Image.new("RGB", (64, 64), RED), [Label("a")]) for _ in range(9)]
    assert labelled_sheet(cells).size == (8 * 200 + 8, 2 * (192 + 16 + 8) + 8)


def test_a_caption_without_end_is_measured_by_what_a_cell_shows():
    class Font:
        looked = 0

        def getlength(self, text):
            self.looked += len(text)
            return 7 * len(text)

    font = Font()
    assert image_grid._cut("a crab " * 3000, font) == "a crab a crab a crab a  ..."  # of 27 letters
    assert font.looked < 192**2
    assert image_grid._cut("a crab", font) == "a crab"
