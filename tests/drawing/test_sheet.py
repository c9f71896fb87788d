"""Contact sheets."""

import numpy as np
import pytest
from matplotlib import font_manager, get_data_path
from PIL import Image

from sfumato.utils import image_grid
from sfumato.utils.image_grid import contact_sheet, label_font, sheet_size, shrink_for_sheet


def plain(colour, size=64):
    return Image.new("RGB", (size, size), colour)


def boxes(sheet, colour):
    """(left, top, right, bottom) of everything of one colour."""
    rows, columns = np.nonzero((np.asarray(sheet) == np.array(colour)).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_small_pictures_are_enlarged_to_128_px_and_do_not_touch():
    sheet = contact_sheet([[plain((255, 0, 0)), plain((0, 0, 255))]])
    red, blue = boxes(sheet, (255, 0, 0)), boxes(sheet, (0, 0, 255))
    assert (red[2] - red[0], red[3] - red[1]) == (128, 128)
    assert blue[0] > red[2]
    assert blue[1] == red[1]


def test_a_picture_of_512_px_keeps_its_pixels():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8))
    sheet = np.asarray(contact_sheet([[picture]]))
    top, left = (sheet.shape[0] - 512) // 2, (sheet.shape[1] - 512) // 2
    assert np.array_equal(sheet[top : top + 512, left : left + 512], np.asarray(picture))


def test_a_picture_between_both_sizes_keeps_its_pixels_too():
    left, top, right, bottom = boxes(contact_sheet([[plain((255, 0, 0), 200)]]), (255, 0, 0))
    assert (right - left, bottom - top) == (200, 200)
    assert shrink_for_sheet(plain((255, 0, 0), 16), 16, 1).size == (16, 16)
    assert shrink_for_sheet(plain((255, 0, 0), 1024), 1024, 1).size == (512, 512)


def test_labels_stay_in_their_column_however_long():
    """A word of 300 letters over the first of two columns leaves the white between them white."""
    cells = [[plain((255, 0, 0)), plain((0, 0, 255))]]
    sheet = contact_sheet(cells, column_labels=["w" * 300, "short"])
    right = boxes(sheet, (255, 0, 0))[2]
    left = boxes(sheet, (0, 0, 255))[0]
    assert (np.asarray(sheet)[:, right + 1 : left - 1] == 255).all()


def test_labels_of_rows_do_not_lie_on_each_other_however_long():
    """As prompts are before and after: between two rows there is white, and none is cut."""
    cells, labels = [[plain((255, 0, 0), 16)]] * 2, ["a crab on a beach, in noto style " * 12] * 2
    alone = np.asarray(contact_sheet(cells[:1], row_labels=labels[:1]))
    both = np.asarray(contact_sheet(cells, row_labels=labels))
    assert (both != 255).any(axis=(1, 2)).sum() == 2 * (alone != 255).any(axis=(1, 2)).sum()
    _, top, _, bottom = boxes(alone, (255, 0, 0))
    assert abs(top + bottom - alone.shape[0]) <= 1


def test_a_label_that_is_one_long_word_takes_few_looks(monkeypatch):
    """As Chinese and Japanese captions are, which the samples of a training are labelled with."""
    looked = []
    monkeypatch.setattr(image_grid, "_width", lambda text, _: looked.append(len(text)) or 10 * len(text))
    assert image_grid.wrap("w" * 1000, None, 105) == ["w" * 10] * 100
    assert sum(looked) < 1_000_000
    assert "".join(image_grid.wrap("w" * 100_000, None, 105)) == "w" * 2000 + "..."


def test_every_label_and_the_title_leave_ink():
    cells = [[plain((255, 0, 0))], [plain((255, 0, 0))]]

    def ink(**labels):
        return int((np.asarray(contact_sheet(cells, **labels)).sum(axis=2) < 200).sum())

    assert ink() == 0
    assert ink(row_labels=["base", "A"]) > ink(row_labels=["base"]) > 0
    assert ink(column_labels=["crab"]) > 0
    assert ink(title="seed 7") > 0


def test_a_missing_cell_is_white():
    sheet = contact_sheet([[plain((255, 0, 0)), None], [None, plain((255, 0, 0))]])
    left, top, right, bottom = boxes(sheet, (255, 0, 0))
    assert (np.asarray(sheet)[top : top + 100, right - 100 : right] == 255).all()
    assert (np.asarray(sheet)[bottom - 100 : bottom, left : left + 100] == 255).all()


def test_no_picture_at_all_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([[None]])


def test_signs_that_the_usual_font_lacks_are_written_in_another_of_the_machine(monkeypatch):
    """U+1D81 is in STIX and not in DejaVu; what no font has changes nothing, nor does a font that has all as boxes."""
    fonts = [f"{get_data_path()}/fonts/ttf/{name}.ttf" for name in ("LastResortHE-Regular", "cmr10", "STIXGeneral")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [*fonts, "/there/is/no.ttf"])
    assert label_font(12, "a crab").getname()[0] == "DejaVu Sans"
    assert label_font(12, "a \u1d81").getname()[0] == "STIXGeneral"
    assert label_font(12, "\u732b").getname()[0] == "DejaVu Sans"
    sheet = contact_sheet([[plain((255, 0, 0))]], column_labels=["\u1d81"])
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    assert sheet.tobytes() != contact_sheet([[plain((255, 0, 0))]], column_labels=["\u1d81"]).tobytes()


def test_an_emoji_that_no_font_has_is_written_by_its_name(monkeypatch):
    """A snowman (U+2603) is in DejaVu, a crab is not; all the boxes of missing signs are alike."""
    monkeypatch.setattr(font_manager, "findSystemFonts", list)

    def sheet(label):
        return contact_sheet([[plain((255, 0, 0))]], column_labels=[label]).tobytes()

    assert sheet("a \U0001f980") == sheet("a [crab]")
    assert sheet("a \u2603") != sheet("a [snowman]")


def test_the_size_is_known_before_there_are_pictures():
    labels = {"row_labels": ["one", "two\nlines", "w" * 80], "column_labels": ["a prompt " * 9, "b"]}
    picture = Image.new("RGB", (96, 64))
    assert contact_sheet([[picture] * 2] * 3, **labels).size == sheet_size((96, 64), **labels)


@pytest.mark.parametrize("size", [(400, 200), (200, 400)])
def test_pictures_that_are_not_square_lie_below_each_other_in_their_own_height(size):
    sheet = contact_sheet([[Image.new("RGB", size, "red")], [Image.new("RGB", size, "blue")]])
    (left, top, right, bottom), below = (boxes(sheet, colour) for colour in ((255, 0, 0), (0, 0, 255)))
    assert (right - left, bottom - top) == (below[2] - below[0], below[3] - below[1]) == size
    assert bottom < below[1] < bottom + 50


@pytest.mark.parametrize("size", [(8, 8192), (8192, 8)])
def test_a_very_narrow_picture_keeps_a_pixel(size):
    picture = Image.new("RGB", size, "red")
    assert sorted(shrink_for_sheet(picture, 8192, 2).size) == [1, 512]
    left, top, right, bottom = boxes(contact_sheet([[picture]]), (255, 0, 0))
    assert sorted((right - left, bottom - top)) == [1, 512]


@pytest.mark.parametrize(("rows", "columns"), [(50, 50), (5, 1000), (100, 100)])
def test_a_sheet_of_very_many_is_one_that_programs_open(rows, columns):
    labels = {"row_labels": ["0.5"] * rows, "column_labels": ["a"] * columns}
    width, height = sheet_size((512, 512), **labels)
    assert 2**26 < width * height < 2 * Image.MAX_IMAGE_PIXELS
    kept = shrink_for_sheet(Image.new("RGB", (512, 512)), 512, rows * columns)
    assert width > columns * kept.width > 0.5 * width


def test_what_is_kept_for_a_sheet_makes_the_same_sheet():
    pictures = [Image.effect_noise((700, 600), 60).convert("RGB") for _ in range(2)]
    kept = [shrink_for_sheet(picture, 700, 2) for picture in pictures]
    assert kept[0].size == (512, 439)
    assert contact_sheet([kept]).tobytes() == contact_sheet([pictures]).tobytes()
