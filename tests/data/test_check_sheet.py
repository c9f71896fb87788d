"""`sfumato check --sheet`: every crop, drawn on sheets."""

import io
import os

import pytest
from made_up import noise_picture
from matplotlib import font_manager, get_data_path
from PIL import Image, ImageChops
from sfumato.pipelines.check import main

from sfumato.data import Example
from sfumato.data.checks import survey
from sfumato.data.checks.survey import measure_picture
from sfumato.errors import ConfigError


def test_a_sheet_shows_every_crop(messy, tmp_path):
    main([str(messy), "--sheet", str(tmp_path / "sheet.png")])
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 8 * 192
    assert sheet.height > 2 * 192


def test_what_a_sheet_shows_takes_little_memory_and_looks_as_the_crop(tmp_path):
    colours = [Image.linear_gradient("L").rotate(turn).resize((512, 512)) for turn in (0, 90, 180)]
    crop = Image.merge("RGB", colours)
    crop.save(tmp_path / "a.png")
    look = measure_picture(Example(tmp_path / "a.png", "x"), [(512, 512)], 8, thumbnail=True)
    shown = Image.open(io.BytesIO(look.thumbnail))
    crop.thumbnail((192, 192))
    assert len(look.thumbnail) < len(crop.tobytes()) / 4
    assert shown.size == crop.size
    assert max(high for _, high in ImageChops.difference(shown, crop).getextrema()) <= 4
    assert measure_picture(Example(tmp_path / "a.png", "x"), [(512, 512)], 8).thumbnail == b""


def test_a_sheet_replaces_no_picture_but_an_earlier_sheet(messy, tmp_path, monkeypatch):
    picture = next(file for file in messy.iterdir() if file.suffix == ".png")
    before = picture.read_bytes()
    (tmp_path / "sheet-2.webp").write_bytes(before)
    assert main([str(messy), "--sheet", str(tmp_path / "sheet.webp")]) in (0, 1)  # one is enough
    monkeypatch.setattr(survey, "_PAGE", 5)
    for sheet in (picture, tmp_path / "sheet.webp"):
        with pytest.raises(ConfigError, match=r"exists, and is no sheet of crops; name another file"):
            main([str(messy), "--sheet", str(sheet)])
    assert picture.read_bytes() == before
    for suffix in ("jpg", "png"):
        for _ in range(2):
            assert main([str(messy), "--sheet", str(tmp_path / f"sheet.{suffix}")]) in (0, 1)


def test_what_does_not_fit_on_a_sheet_goes_on_the_next(messy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(survey, "_PAGE", 5)
    main([str(messy), "--sheet", str(tmp_path / "sheet.png")])
    sheets = [tmp_path / name for name in ("sheet.png", "sheet-2.png", "sheet-3.png")]
    assert [line for line in capsys.readouterr().out.splitlines() if "drawn" in line] == [
        f"crops drawn on {sheet}" for sheet in sheets
    ]
    first, _, last = (Image.open(sheet).width for sheet in sheets)
    assert last < first  # two of twelve are left


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_a_sheet_shows_names_with_line_breaks_and_signs_that_the_usual_font_lacks(tmp_path, monkeypatch):
    """U+1D81 is in STIX and not in DejaVu."""
    (tmp_path / "odd").mkdir()
    for number, name in enumerate(["a\nb.png", "a\u2029\u1d81.png"]):
        noise_picture(seed=number).save(tmp_path / "odd" / name)
    sheets = []
    for fonts in ([f"{get_data_path()}/fonts/ttf/STIXGeneral.ttf"], []):
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda fonts=fonts: fonts)
        assert main([str(tmp_path / "odd"), "--caption", "x", "--sheet", str(tmp_path / "sheet.png")]) == 0
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert sheets[0] != sheets[1]
