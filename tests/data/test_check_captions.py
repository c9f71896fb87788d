"""`sfumato check`: captions that say nothing or are too long, and triggers as they tokenize."""

import re

import pytest
from made_up import FakeBase, noise_picture, smooth_noise
from sfumato.pipelines.caption import Config

from sfumato.config import parse
from sfumato.data import prepare, read_folder
from sfumato.data.checks.report import check
from sfumato.models.family import read_requirements
from tests.data.findings import found


def test_names_that_say_nothing_are_told_and_not_recommended(tmp_path):
    for number in range(3):
        smooth_noise(number).save(tmp_path / f"IMG_{number}.png")
    (tmp_path / "IMG_0.txt").write_text("a dog")
    report = check(tmp_path, read_requirements("pocket"), trigger="sks dog")
    assert report.stops
    (text,) = (line.text for line in report.lines if line.kind == "caption missing")
    assert "{caption}" not in text
    assert '--caption "sks dog" as the caption of all. `dreambooth` and `textual_inversion` give them' in text
    words = re.search("`sfumato caption (.*?)`", text)[1].split()
    assert parse(Config, words, program="caption", first_may_be_config=False).write
    report = check(tmp_path, read_requirements("pocket"), caption_template="{caption}")
    assert found(report, "caption says nothing") == ["IMG_1.png", "IMG_2.png"]
    assert not report.stops


def test_the_end_of_a_long_caption_is_shown(pictures):
    (pictures / "crab.txt").write_text("crab, " + "very " * 75 + "end of it")
    report = check(pictures, read_requirements("sd1"), caption_template="{caption}")
    cut = [line for line in report.lines if line.kind == "caption cut"]
    assert cut[0].names == ("crab.png",)
    assert "end of it'; --max-tokens 225" in cut[0].text
    assert "75 tokens" in cut[0].text
    report = check(pictures, read_requirements("sd1", max_tokens=150), caption_template="{caption}")
    assert not [line for line in report.lines if line.kind == "caption cut"]


def test_a_very_long_end_is_shortened(pictures):
    (pictures / "crab.txt").write_text("crab, " + "very " * 300)
    report = check(pictures, read_requirements("sd1"), caption_template="{caption}")
    (cut,) = [line.text for line in report.lines if line.kind == "caption cut"]
    assert len(cut) < 200


@pytest.mark.parametrize(
    ("word", "kind", "text"),
    [
        ("dog", "trigger ordinary", "'dog' is one token, number 1,929: an ordinary word"),
        ("tangerine", "trigger ordinary", "'tangerine' is one token, number 42,045"),
        ("sks", "trigger", "'sks' is one rare token, number 48,136"),
        ("zwxq", "trigger", "tokens: "),
    ],
)
def test_a_trigger_is_shown_as_it_tokenizes(pictures, word, kind, text):
    report = check(pictures, read_requirements("sd1"), caption_template="{caption}, {trigger}", trigger=word)
    assert any(text in line.text for line in report.lines if line.kind == kind)


def test_a_placeholder_that_no_trigger_takes_the_place_of_is_told(tmp_path):
    for number, caption in enumerate(["[trigger] on grass", "a dog"]):
        noise_picture(seed=number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    report, data = (
        check(tmp_path, read_requirements("pocket")),
        prepare(read_folder(tmp_path), FakeBase(), resolution=64),
    )
    (line,) = (line for line in report.lines if line.kind == "trigger missing")
    assert line.names == ("0.png",)
    assert line.text == "1 caption holds [trigger], and there is no trigger: 0.png; pass --trigger WORD"
    assert line.text in data.notes
    report = check(tmp_path, read_requirements("pocket"), trigger="zwx")
    assert not [line for line in report.lines if line.kind == "trigger missing"]


def test_the_class_beside_a_rare_word_is_no_flaw(pictures):
    report = check(pictures, read_requirements("sd1"), caption_template="{trigger}", trigger="sks dog")
    assert not [line for line in report.lines if line.kind == "trigger ordinary"]
    assert any("'dog' is an ordinary word, as the class" in line.text for line in report.lines)
