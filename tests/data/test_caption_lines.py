"""Captions of several lines: one caption, or one each, of which a sample takes any."""

import json
from collections import Counter

import pytest
from made_up import noise_picture
from sfumato.pipelines.check import main as check

from sfumato.data import prepare, read_folder
from sfumato.data.checks.repair import repair_folder
from sfumato.data.dataset_config import read_sources
from sfumato.data.listing import list_folder
from sfumato.data.placeholder_captions import insert_placeholders
from sfumato.errors import DataError
from sfumato.training.methods.subject import Subject, read_subject, with_caption

TOLD = (
    "1 caption of several lines is read as one, such as a.txt; with --caption-lines each line is a caption of its own"
)


@pytest.fixture
def folder(tmp_path):
    """Two pictures, of which the first has two captions."""
    place = tmp_path / "drawings"
    place.mkdir()
    for number, name in enumerate("ab"):
        noise_picture(seed=number).save(place / f"{name}.png")
    (place / "a.txt").write_text("crab, red, beach\n\na red crab  on a beach\r\n")
    (place / "b.txt").write_text("a house\n")
    return place


def read(folder, **options):
    return read_folder(folder, caption_lines=True, **options)


def drawn(data, samples, *, seed=0):
    """How often each caption comes in so many samples."""
    return Counter(caption for step in range(samples // 4) for caption in data.batch(seed, step, 4).captions)


def test_lines_are_one_caption_and_that_is_told(folder):
    found = read_folder(folder)
    assert [example.captions for example in found] == [("crab, red, beach a red crab on a beach",), ("a house",)]
    assert found.notes == (TOLD,)


def test_each_line_is_a_caption(folder):
    found = read(folder)
    assert [example.captions for example in found] == [("crab, red, beach", "a red crab on a beach"), ("a house",)]
    assert found.captions == ["crab, red, beach", "a red crab on a beach", "a house"]
    assert found.notes == ()


@pytest.mark.parametrize(
    ("more", "notes"),
    [
        ("", ["caption_lines changes nothing: no caption has several lines"]),
        ('[[source]]\npath = "drawings"\n', []),  # whose caption has them
        ('[[source]]\npath = "drawings"\ncaption_lines = false\n', [
            "caption_lines changes nothing: no caption has several lines",
        ]),
        ('[[source]]\npath = "drawings"\nclass = true\n', [
            "caption_lines changes nothing: no caption has several lines",
            TOLD.replace("--caption-lines", "caption_lines = true in the source of their class"),
        ]),
    ],
)  # fmt: skip
def test_of_several_sources_that_is_told_which_holds_of_them(folder, tmp_path, more, notes, capsys):
    """No option is for a class, and a source that says false wants what it gets."""
    houses = tmp_path / "houses"
    houses.mkdir()
    noise_picture(seed=3).save(houses / "house.png")
    (houses / "house.txt").write_text("a house")
    (tmp_path / "all.toml").write_text('[[source]]\npath = "houses"\n' + more)
    assert [note for note in read(tmp_path / "all.toml").notes if "line" in note] == notes
    check([str(tmp_path / "all.toml"), "--caption-lines", "--base", "pocket"])
    said = capsys.readouterr().out
    assert all(note in said for note in notes)
    assert said.count("no caption has several lines") == sum("no caption" in note for note in notes)


def test_each_goes_through_the_template(folder):
    (folder / "b.txt").write_text("[trigger] house\nzwx house\n")
    found = read(folder, caption_template="{caption}, {trigger} style", trigger="zwx")
    assert found[0].captions == ("crab, red, beach, zwx style", "a red crab on a beach, zwx style")
    assert found[1].captions == ("zwx house, zwx style",)  # once, since both say the same


def test_one_that_takes_no_captions_takes_no_lines(folder):
    for options in ({}, {"caption_lines": True}):
        found = read_folder(folder, caption_template="a drawing", **options)
        assert found.captions == ["a drawing", "a drawing"]
    assert found.notes == ("caption_lines changes nothing: no caption has several lines",)
    assert read_folder(folder, caption_template="a drawing").notes == ()


def test_a_list_of_captions_may_have_lines(folder):
    (folder / "b.txt").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a house\\nbuilding, roof"}')
    assert read(folder)[1].captions == ("a house", "building, roof")
    assert read_folder(folder)[1].captions == ("a house building, roof",)


def test_a_source_says_it_for_itself_and_the_first_lines_not_for_the_class(folder, tmp_path):
    for name, text in (
        ("one", '[[source]]\npath = "drawings"\ncaption_lines = true\n'),
        ("all", 'caption_lines = true\n[[source]]\npath = "drawings"\n'),
        ("class", 'caption_lines = true\n[[source]]\npath = "drawings"\nclass = true\n'),
    ):
        (tmp_path / f"{name}.toml").write_text(text)
    assert len(read_folder(tmp_path / "one.toml")[0].captions) == 2
    assert len(read_folder(tmp_path / "all.toml")[0].captions) == 2
    assert len(read_folder(tmp_path / "class.toml")[0].captions) == 1
    (tmp_path / "plain.toml").write_text('[[source]]\npath = "drawings"\n')
    assert len(read(tmp_path / "plain.toml")[0].captions) == 2


def test_a_sample_takes_each_as_often(folder, base):
    found = drawn(prepare(read(folder), base, resolution=64), 800)
    assert found["a house"] == 400
    assert 160 < found["crab, red, beach"] < 240
    assert found["crab, red, beach"] + found["a red crab on a beach"] == 400


def test_which_one_is_a_function_of_seed_step_and_place(folder, base):
    data = prepare(read(folder), base, resolution=64)
    assert data.batch(3, 5, 4, 2, 2).captions == data.batch(3, 5, 4).captions[2:]
    assert drawn(data, 40, seed=1) == drawn(data, 40, seed=1) != drawn(data, 40, seed=2)


def test_tags_are_shuffled_within_the_line(folder, base):
    data = prepare(read(folder), base, resolution=64, shuffle_tags=True, keep_tags=1)
    found = set(drawn(data, 200))
    assert found == {"crab, red, beach", "crab, beach, red", "a red crab on a beach", "a house"}


def test_all_are_embedded_beforehand_or_those_that_will_be_drawn(folder, base):
    whole = prepare(read(folder), base, resolution=64)
    assert sorted(base.prompts) == ["a house", "a red crab on a beach", "crab, red, beach"]
    base.prompts.clear()
    known = prepare(read(folder), base, resolution=64, will_draw=(0, 1, 2))
    assert set(base.prompts) == set(known.batch(0, 0, 2).captions) == set(whole.batch(0, 0, 2).captions)
    batch = whole.batch(3, 5, 4)
    assert batch.text.hidden.flatten().tolist() == [len(caption) for caption in batch.captions]


def test_what_is_measured_is_told_by_the_first(folder, base):
    data = prepare(read(folder), base, resolution=64)
    assert data.captions == ["crab, red, beach", "a house"]
    assert [batch.captions for batch in data.middles(2, 10**6)] == [["crab, red, beach", "a house"]]


def test_the_fingerprint_knows_all_of_them(folder, base):
    def fingerprint(**options):
        return prepare(read_folder(folder, **options), base, resolution=64).fingerprint

    before = fingerprint(caption_lines=True)
    assert before != fingerprint()
    (folder / "a.txt").write_text("crab, red, beach\na blue crab\n")
    assert fingerprint(caption_lines=True) != before
    (folder / "a.txt").write_text("crab, red, beach\n")
    assert fingerprint(caption_lines=True) == fingerprint()


def test_a_long_line_is_told_and_two_short_ones_are_not(folder, base, monkeypatch):
    monkeypatch.setattr(base, "cut_off", lambda text: text[30:])
    assert not any("longer" in note for note in prepare(read(folder), base, resolution=64).notes)
    assert any("longer" in note for note in prepare(read_folder(folder), base, resolution=64).notes)
    (folder / "b.txt").write_text("a house\na house that is much longer than all others\n")
    (note,) = (note for note in prepare(read(folder), base, resolution=64).notes if "longer" in note)
    assert note.startswith("b.png: the caption is longer")


def test_a_trigger_is_looked_for_in_every_line(folder, base):
    (folder / "b.txt").write_text("a house\na zwx house\n[trigger]\n")
    assert not any("no caption holds" in note for note in read(folder, trigger="zwx").notes)
    notes = prepare(read(folder), base, resolution=64).notes
    assert any("1 caption holds [trigger]" in note for note in notes)


def test_a_new_word_stands_in_every_line(folder):
    found = insert_placeholders(read(folder), ["<crab>", "<house>"], ["crab", "house"])
    assert found[0].captions == ("<crab>, red, beach", "a red <crab> on a beach")
    (folder / "a.txt").write_text("crab, red, beach\na red lobster\n")
    with pytest.raises(DataError, match="1 of 3 captions hold no placeholder, first 'a red lobster'"):
        insert_placeholders(read(folder), ["<crab>", "<house>"], ["crab", "house"])


def test_a_subjects_class_has_each_of_its_captions(folder):
    (folder / "a.txt").write_text("sks crab, flat\nsks crab, glossy\n")
    found = read_subject(folder, "sks crab", caption_lines=True)
    assert Subject("sks crab", "crab").class_prompts(found.captions) == ["crab", "crab, flat", "crab, glossy"]
    assert with_caption(found, "sks crab").captions == ["sks crab", "sks crab"]


def test_a_mended_copy_has_the_same_lines(folder, tmp_path):
    repair_folder(folder, read_sources(folder), tmp_path / "mended", leave_out={})
    assert (tmp_path / "mended" / "a.txt").read_text() == "crab, red, beach\na red crab on a beach\n"


def test_the_check_shows_each_line_as_training_will_see_it(folder, capsys):
    assert check([str(folder), "--caption-lines"]) == 0
    said = capsys.readouterr().out
    assert "3 different, such as 'crab, red, beach'" in said
    assert "several lines" not in said
    check([str(folder), "--json", "--caption-lines"])
    files = json.loads(capsys.readouterr().out)["files"]
    assert [file["further_captions"] for file in files] == [["a red crab on a beach"], []]
    check([str(folder)])
    assert TOLD in capsys.readouterr().out


def test_lines_elsewhere_do_not_say_otherwise(folder):
    (folder / "a.caption").write_text("crab, red, beach a red crab on a beach")
    assert list_folder(folder).notes == ()
