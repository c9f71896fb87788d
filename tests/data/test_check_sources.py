"""`sfumato check` of a data set of several sources: each with its own crop, masks, class and repeats."""

from pathlib import Path

import pytest
from made_up import noise_picture
from PIL import Image
from sfumato.pipelines.check import render

from sfumato.data import prepare, read_folder
from sfumato.data.checks.report import check
from sfumato.errors import DataError
from sfumato.models.family import read_requirements
from tests.data.findings import found


@pytest.fixture
def two_folders(tmp_path) -> Path:
    """A data set of two folders with files of the same names, one of which is broken; the second is of the class."""
    for number, folder in enumerate(["dogs/a", "dogs/b"]):
        (tmp_path / folder).mkdir(parents=True)
        noise_picture(seed=number).save(tmp_path / folder / "00.png")
        noise_picture(seed=9).save(tmp_path / folder / "01.png")
    cut = (tmp_path / "dogs/b/00.png").read_bytes()[:-40]
    (tmp_path / "dogs/b/00.png").write_bytes(cut)
    (tmp_path / "dataset.toml").write_text(
        '[[source]]\npath = "dogs/a"\nwords = "x"\nrepeats = 3\n'
        '[[source]]\npath = "dogs/b"\nwords = "y"\nclass = true\n'
    )
    return tmp_path / "dataset.toml"


def test_the_crop_of_a_source_is_its_own(tmp_path):
    (tmp_path / "dogs").mkdir()
    noise_picture(200, 64).save(tmp_path / "dogs/wide.png")
    (tmp_path / "d.toml").write_text('[[source]]\npath = "dogs"\ncrop = "pad"\n')
    assert found(check(tmp_path / "dogs", read_requirements("pocket"), caption_template="x"), "cropped") == ["wide.png"]
    assert not found(check(tmp_path / "d.toml", read_requirements("pocket"), caption_template="x"), "cropped")


def test_files_of_one_name_are_told_apart(two_folders, base):
    report = check(two_folders, read_requirements("pocket"))
    assert found(report, "bad") == ["b/00.png"]
    assert next(line.text for line in report.lines if line.kind == "bad").startswith("b/00.png: ")
    assert found(report, "duplicate") == ["a/01.png", "b/01.png"]
    with pytest.raises(DataError, match=r"1 of 4 images cannot be learned from: b/00\.png: "):
        prepare(read_folder(two_folders), base, resolution=64)


def test_what_each_folder_gives_is_said(two_folders):
    report = check(two_folders, read_requirements("pocket"))
    assert report.folders == ["a: 2 images x 3", "b: 2 images of the class"]
    assert "folder   a: 2 images x 3" in render(report)
    assert report.to_dict()["folders"] == report.folders


def test_pictures_of_a_class_are_in_no_epoch(two_folders):
    """As `lora` and `dreambooth` learn from them."""
    noise_picture(96, 48).save(two_folders.parent / "dogs/a/00.png")
    report = check(two_folders, read_requirements("pocket"))
    assert (report.samples, report.buckets) == (6, {(64, 64): 3, (80, 48): 3})
    two_folders.write_text(two_folders.read_text().replace("class = true", ""))
    assert check(two_folders, read_requirements("pocket")).buckets == {(64, 64): 4, (80, 48): 3}


def test_masks_are_missed_only_where_a_source_has_them(two_folders):
    noise_picture().save(two_folders.parent / "dogs/a/00.mask.png")
    two_folders.write_text(two_folders.read_text().replace("repeats = 3", 'mask = "files"'))
    assert found(check(two_folders, read_requirements("pocket")), "mask missing") == ["a/01.png"]


def test_masks_of_one_source_are_not_missed_in_another_of_the_same_folder(tmp_path):
    (tmp_path / "dogs").mkdir()
    noise_picture().save(tmp_path / "dogs" / "a.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "dogs" / "a.mask.png")
    shared = '[[source]]\npath = "dogs"\nwords = "x"\n'
    (tmp_path / "d.toml").write_text(f'{shared}mask = "files"\n{shared}crop = "pad"\n')
    assert read_folder(tmp_path / "d.toml")[0].mask is not None
    report = check(tmp_path / "d.toml", read_requirements("pocket"))
    assert not report.stops
    assert found(report, "no masks") == found(report, "mask missing") == []


def test_files_are_told_apart_wherever_their_folders_are_named_from(two_folders, monkeypatch):
    monkeypatch.chdir(two_folders.parent)
    text = two_folders.read_text().replace('"dogs/b"', f'"{two_folders.parent}/dogs/b"')
    Path("dataset.toml").write_text(text)
    assert found(check(Path("dataset.toml"), read_requirements("pocket")), "bad") == ["b/00.png"]
    monkeypatch.chdir("dogs/b")
    Path("01.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 2 images in b cannot be learned from"):
        read_folder(Path("."), caption_template="x")


@pytest.mark.parametrize(
    ("toml", "what"),
    [
        ('[[source]]\npath = "dogs"\nmask = "files"\n', "no masks in it"),
        ('[[source]]\npath = "dogs"\n[[source]]\npath = "empty"\n', "no images in it"),
        ('[[source]]\npath = "dogs"\nclass = true\n', "no images to learn, but of a class"),
    ],
)
def test_what_training_refuses_stops_it_in_the_report(toml, what, tmp_path):
    for name in ("dogs", "empty"):
        (tmp_path / name).mkdir()
    noise_picture().save(tmp_path / "dogs/a.png")
    (tmp_path / "dogs/a.txt").write_text("a dog")
    (tmp_path / "d.toml").write_text(toml)
    report = check(tmp_path / "d.toml", read_requirements("pocket"))
    assert [what in line.text for line in report.lines if line.stops] == [True]
    assert not any("learned whole" in line.text for line in report.lines)


def test_who_has_no_masks_of_the_class_is_told_how_it_is_learned_whole(tmp_path):
    for name in ("dogs", "class"):
        (tmp_path / name).mkdir()
        noise_picture().save(tmp_path / name / "a.png")
        (tmp_path / name / "a.txt").write_text("a dog")
    noise_picture().convert("L").save(tmp_path / "dogs/a.mask.png")
    text = '[[source]]\npath = "dogs"\n[[source]]\npath = "class"\nclass = true\n'
    (tmp_path / "d.toml").write_text(text)
    with pytest.raises(DataError, match=r'class: no masks in it\..*write mask = "none" in its source'):
        read_folder(tmp_path / "d.toml", mask="files")
    (tmp_path / "d.toml").write_text(f'{text}mask = "none"\n')
    assert [example.mask is None for example in read_folder(tmp_path / "d.toml", mask="files")] == [False, True]


@pytest.mark.parametrize(
    ("second", "found"),
    [
        ('caption = "a dog"', []),  # a folder with two prompts, as SimpleTuner has them
        ('caption = "sks dog"', ["in several sources with the same caption: a.png, b.png"]),
        ("class = true\ncaption = 'a dog'", ["the same image: a.png, a.png", "the same image: b.png, b.png"]),
    ],
)
def test_a_file_that_several_sources_name_is_no_duplicate_of_itself(second, found, tmp_path):
    (tmp_path / "dogs").mkdir()
    for seed, name in enumerate("ab"):
        noise_picture(seed=seed).save(tmp_path / f"dogs/{name}.png")
    (tmp_path / "d.toml").write_text(
        f'[[source]]\npath = "dogs"\ncaption = "sks dog"\n[[source]]\npath = "dogs"\n{second}\n'
    )
    report = check(tmp_path / "d.toml", read_requirements("pocket"))
    kinds = ("duplicate", "near duplicate", "named twice")
    assert [line.text for line in report.lines if line.kind in kinds] == found
    assert any(line.kind == "many duplicates" for line in report.lines) == ("class" in second)
