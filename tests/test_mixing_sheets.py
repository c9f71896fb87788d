"""The bench that draws the guide's sheets: every way to mix on every sheet, and nothing learned twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import mixing_sheets
from bench.mixing_sheets import Config, make_sheets, save_small
from sfumato.errors import ConfigError
from sfumato.merging.methods import METHODS


@pytest.fixture
def config(pocket_folder, pictures, tmp_path):
    subject = tmp_path / "creature"
    subject.mkdir()
    for file in sorted(pictures.glob("*.png"))[:2]:
        (subject / file.name).write_bytes(file.read_bytes())
        (subject / file.name).with_suffix(".txt").write_text(f"sks creature, {file.stem} style\n", encoding="utf-8")
    return Config(
        styles=(pictures,), subjects=(subject,), base=str(pocket_folder), train_steps=1, steps=1, jobs=1,
        limit_kib=2000, work=tmp_path / "work", sheets=tmp_path / "docs",
    )  # fmt: skip


@pytest.mark.slow
def test_each_pair_has_a_sheet_with_every_method_and_a_second_run_learns_nothing(config, monkeypatch):
    config = replace(config, blueprint=False)
    report = make_sheets(config)
    json.dumps(report)
    assert len(report["sheets"]) == 1
    for sheet in report["sheets"]:
        file = config.sheets / sheet["file"]
        labels = [row["label"] for row in sheet["rows"]]
        assert set(METHODS) - {"linear"} <= set(labels)
        assert {"base", "A alone", "B alone", "composite"} <= set(labels)
        assert len(set(labels)) == len(labels)
        assert file.stat().st_size <= config.limit_kib * 1024
        assert Image.open(file).height > 138 * len(labels)
        assert sheet["columns"][0]["prompt"] == "sks creature"
    files = sorted(config.work.glob("*/run/run.safetensors"))
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(files) == 2
    monkeypatch.setattr(mixing_sheets, "_draw_sheet", lambda _, *pair: pair)
    assert make_sheets(config)["sheets"][0][1] in files
    assert {file: file.stat().st_mtime_ns for file in files} == before


def test_the_blueprint_is_white_lines_on_blue(config):
    from bench.mixing_sheets import _blueprint

    drawn = Image.open(next(iter(sorted(_blueprint(config).glob("black*.png"))))).convert("RGB")
    assert drawn.getpixel((0, 0)) == (20, 60, 130)
    assert drawn.getpixel((20, 20)) == (255, 255, 255)


def test_a_sheet_loses_colours_until_it_fits(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    picture = Image.fromarray(noise).convert("RGB")
    whole = save_small(picture, tmp_path / "x.png", 99999)
    small = save_small(picture, tmp_path / "x.png", 3300)
    assert whole == 256
    assert small < 256
    assert Path(tmp_path / "x.png").stat().st_size <= 3300
    with pytest.raises(ConfigError, match="limit-kib"):
        save_small(picture, tmp_path / "y.png", 100)
    assert not (tmp_path / "y.png").exists()


def test_a_subject_with_two_names_is_refused(config):
    (config.subjects[0] / "black-square.txt").write_text("another, flat style", encoding="utf-8")
    with pytest.raises(ConfigError, match="give it one name"):
        make_sheets(replace(config, styles=(), blueprint=False))
