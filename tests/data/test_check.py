"""`sfumato check`: each flaw is found in its picture and in no other, and told as text and as JSON."""

import json
import os
import subprocess
import sys

import pytest
from made_up import noise_picture
from PIL import Image
from sfumato.pipelines.check import main, render

from sfumato.data import read_folder
from sfumato.data.checks.report import check
from sfumato.errors import ConfigError, DataError
from sfumato.models.family import read_requirements
from tests.data.findings import found


@pytest.fixture(scope="module")
def report(messy_once):
    return check(messy_once, read_requirements("pocket"), resolution=64, batch=4)


def test_each_flaw_is_found_in_its_picture_and_in_no_other(report):
    assert found(report, "bad") == ["broken.jpg"]
    assert found(report, "black") == ["black.png"]
    assert found(report, "one colour") == ["teal.png"]
    assert found(report, "blurred") == ["soft.png"]
    assert found(report, "too small") == ["tiny.png"]
    assert found(report, "cropped") == ["wide.png"]
    assert found(report, "duplicate") == ["good-0.png", "twin.png"]
    assert found(report, "near duplicate") == ["good-1.png", "near.jpg"]
    assert found(report, "caption missing") == ["good-2.png"]
    assert found(report, "caption encoding") == ["tiny.png"]
    assert [(entry.name, entry.reason) for entry in report.ignored] == [("notes.doc", "not an image by its name")]


def test_dark_pictures_are_no_copies_of_each_other_and_many_copies_are_said(tmp_path):
    for grey in range(3):
        Image.new("RGB", (64, 64), (grey, 0, 0)).save(tmp_path / f"{grey}.png")
    report = check(tmp_path, read_requirements("pocket"), caption_template="x")
    assert found(report, "black") == ["0.png", "1.png", "2.png"]
    assert not [line for line in report.lines if "duplicate" in line.kind]
    for name in ("a", "b"):
        noise_picture().save(tmp_path / f"{name}.png")
    kinds = [line.kind for line in check(tmp_path, read_requirements("pocket"), caption_template="x").lines]
    assert "duplicate" in kinds
    assert "many duplicates" not in kinds  # one of five
    noise_picture().save(tmp_path / "c.png")
    (text,) = [
        line.text
        for line in check(tmp_path, read_requirements("pocket"), caption_template="x").lines
        if line.kind == "many duplicates"
    ]
    assert text == "33% of the images repeat others; what they show is learned by heart"


def test_a_side_below_the_base_s_step_is_refused(tmp_path):
    noise_picture().save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"--resolution 8: this base takes multiples of 16 px\. Give 16 or more\."):
        check(tmp_path, read_requirements("pocket"), resolution=8)


def test_a_name_with_brackets_stays_whole(tmp_path):
    noise_picture(20, 20).save(tmp_path / "photo (1).png")
    noise_picture(200, 64, seed=1).save(tmp_path / "wide (2).png")
    report = check(tmp_path, read_requirements("pocket"), caption_template="x")
    assert found(report, "too small") == ["photo (1).png"]
    assert found(report, "cropped") == ["wide (2).png"]


def test_pictures_without_the_alpha_that_was_to_mask_them_are_told(tmp_path):
    for name in "ab":
        noise_picture().convert("RGBA" if name == "a" else "RGB").save(tmp_path / f"{name}.png")
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(tmp_path / "c.png")
    report = check(tmp_path, read_requirements("pocket"), caption_template="x", mask="alpha")
    assert found(report, "mask missing") == ["a.png", "b.png"]
    assert not any(line.kind == "note" for line in report.lines)


def test_a_finding_about_several_pictures_comes_once(tmp_path):
    for suffix in ("png", "webp"):
        noise_picture(seed=len(suffix)).save(tmp_path / f"a.{suffix}")
    (tmp_path / "a.txt").write_text("")
    report = check(tmp_path, read_requirements("pocket"), caption_template="x")
    assert [line.names for line in report.lines if line.kind == "caption"] == [("a.png", "a.webp")]


def test_what_training_will_see_is_counted(report):
    assert len(report.looks) == 12
    assert report.samples == 11
    assert sum(report.buckets.values()) == 11
    assert report.buckets[64, 64] == 9
    assert found(report, "small bucket") == []
    assert any("fewer than a batch of 4" in line.text for line in report.lines)
    assert report.stops


def test_the_text_names_what_stops_training_first(report):
    text = render(report)
    assert "11 of 12 images can be learned from" in text
    assert text.index("stops training") < text.index("broken.jpg") < text.index("to look at") < text.index("black.png")


def test_what_the_check_calls_fine_training_takes(pictures):
    report = check(pictures, read_requirements("pocket"), caption_template="{caption}")
    assert not report.stops
    assert [e.caption for e in report.examples] == [
        e.caption for e in read_folder(pictures, caption_template="{caption}")
    ]


@pytest.mark.parametrize(("batch", "said"), [(2, None), (3, "once in 2 epochs"), (4, "once in 2 epochs"), (5, "in 3")])
def test_shapes_of_fewer_pictures_than_a_batch_are_told(batch, said, tmp_path):
    for number in range(2):
        noise_picture(seed=number).save(tmp_path / f"{number}.png")
    report = check(tmp_path, read_requirements("pocket"), batch=batch, caption_template="x")
    texts = [line.text for line in report.lines if line.kind == "small bucket"]
    assert len(texts) == (said is not None)
    assert said is None or (said in texts[0] and f"2 samples an epoch, fewer than a batch of {batch}" in texts[0])


def test_json_holds_every_picture_and_finding_and_the_exit_code_is_1(messy, capsys):
    assert main([str(messy), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["pictures"] == 12
    assert {"bad", "duplicate", "blurred"} <= {finding["kind"] for finding in printed["findings"]}
    assert [entry["file"] for entry in printed["files"] if entry["error"]] == [(messy / "broken.jpg").as_posix()]


def test_many_findings_of_a_kind_hide_no_other(tmp_path, capsys):
    (tmp_path / "dogs").mkdir()
    for number in range(23):
        noise_picture(20, 20, seed=number).save(tmp_path / "dogs" / f"{number:02}.png")
        (tmp_path / "dogs" / f"{number:02}.txt").write_bytes(f"café {number}".encode("cp1252") + b", very" * 90)
    main([str(tmp_path / "dogs")])
    said = capsys.readouterr().out
    assert "23 captions are longer than 75 tokens; their ends are not seen, such as of 00.png: ..." in said
    assert said.count("longer than") == 1
    assert "smaller than is learned" in said
    assert said.count("\n") < 60


def test_a_folder_without_pictures_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no images in it"):
        main([str(tmp_path)])
    (tmp_path / "dogs").mkdir()
    noise_picture().save(tmp_path / "dogs" / "a.png")
    with pytest.raises(DataError, match=r"no images in it, but in its folders dogs\. Name one"):
        main([str(tmp_path)])
    (tmp_path / "img").mkdir()
    (tmp_path / "dogs").rename(tmp_path / "img" / "10_dog")
    with pytest.raises(DataError, match=rf"in folders with repeats within img\. Name .* --images {tmp_path / 'img'}\."):
        main([str(tmp_path)])


@pytest.mark.slow
def test_a_console_without_letters_shows_their_numbers_and_nothing_loads_torch(pictures, tmp_path):
    """Both of one process, since starting one takes longest."""
    (pictures / "crab.txt").write_text("краб на пляже", encoding="utf-8")
    program = (
        "import sys, transformers.models.clip.tokenization_clip; theirs = 'torch' in sys.modules;"  # before 5.18
        "from sfumato.cli import main; main(['check', *sys.argv[1:]]); assert theirs or 'torch' not in sys.modules"
    )
    words = [str(pictures), "--caption", "{caption}", "--trigger", "zwx", "--sheet", str(tmp_path / "sheet.png")]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert (done.returncode, "\\u043a\\u0440\\u0430\\u0431" in done.stdout) == (0, True), done.stderr
    assert (tmp_path / "sheet.png").is_file()


def test_a_files_name_does_not_command_the_terminal(tmp_path):
    for name in ("\x1b]0;x\x07\x1b[2Jb.png", "a.png"):
        noise_picture(64, 64).save(tmp_path / "new.png")
        (tmp_path / "new.png").rename(tmp_path / name)
    (tmp_path / "\x1b[31mnote\nb.xyz").touch()
    text = render(check(tmp_path, read_requirements("pocket"), caption_template="x"))
    assert r"\x1b[31mnote\nb.xyz: not an image by its name" in text
    assert r"\x1b]0;x\x07\x1b[2Jb.png" in text
    assert "\x1b" not in text
