"""Defaults by method and family, identifiers and captions, and wrong use in one line."""

import json
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
from sfumato.trainers.dreambooth import Config, resolve

from sfumato import cli, data
from sfumato.files import read_header
from sfumato.models.family import FAMILIES
from tests.dreambooth.subject import CLASS

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    ("method", "family", "wanted"),
    [
        ("full", "pocket", (1e-4, 240, 4, 64)),
        ("lora", "pocket", (6e-4, 240, 4, 64)),
        *[("full", family, (5e-6, 800, 1, 200)) for family in ("sd1", "sd2", "sdxl")],
        *[("lora", family, (1e-4, 500, 1, 200)) for family in ("sd1", "sd2", "sdxl")],
    ],
)
def test_each_method_has_its_own_defaults_in_each_family(method, family, wanted, tmp_path):
    one = FAMILIES[family]
    base = SimpleNamespace(family=one, defaults=one.defaults, alpha_bar=range(1000))
    config = Config(images=tmp_path, output=tmp_path, class_name=CLASS, method=method)
    config, _ = resolve(config, base, data.ExampleSet(()), 1)
    assert (config.learning_rate, config.steps, config.batch, config.class_count) == wanted


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fused", "--accumulate", "2"], "--accumulate 2"),
        (["--class-name", None], "--class-name is unset"),
        (["--method", "lora", "--save", "folder"], "--save folder"),
        (["--keep-energy", "0.9"], "--keep-energy belongs"),
        (["--prior-weight", "-1"], "--prior-weight is -1"),
        (["--conv-rank", "2"], "--conv-rank has no effect without --method lora"),
        (["--rank-of", "mid=1"], "--rank-of has no effect without --method lora"),
        (["--rate-of", "mid=1"], "--rate-of has no effect without --method lora"),
        (["--method", "lora", "--rate-of", "IN11=0.5"], "--rate-of IN11=0.5: names none of the"),
        (["--save-every", "1"], "--save-every has no effect without --method lora"),
        (["--dropout", "0.1"], "--dropout has no effect without --method lora"),
        (["--rank-dropout", "0.1"], "--rank-dropout has no effect without --method lora"),
        (["--module-dropout", "0.1"], "--module-dropout has no effect without --method lora"),
        (
            ["--method", "lora", "--module-dropout", "0.1", "--targets", r"mid_block.*attn2\.to_q"],
            "--module-dropout 0.1: one layer is adapted, and it is never left out",
        ),
        (["--drift-limit", "0.1"], "--measure-every 0"),
        (["--identifier", " "], "--identifier is empty"),
        (["--class-prompt", " "], "--class-prompt is empty"),
        (["--class-prompt", ""], "--class-prompt is empty"),
        (["--instance-prompt", "", "--identifier", "sks"], "--instance-prompt is empty"),
        (["--caption", "{caption}"], "--instance-prompt and --caption"),
        (["--class-images", "nowhere", "--class-count", None], "nowhere"),
        (["--class-images", "nowhere"], "--class-count has no effect without --prior-prompts beside --class-images"),
        (["--identifier", "zwx"], "--identifier has no effect without it in --instance-prompt"),
    ],
)
def test_wrong_use_is_one_line(options, said, train, capsys, tmp_path):
    train("run", *options, status=2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfumato: ")]
    assert len(error) == 1
    assert said in error[0]
    assert not (tmp_path / "run/run.safetensors").exists()


def test_pictures_with_captions_keep_them_and_the_class_has_their_form(train, pictures, tmp_path, capsys):
    folder = tmp_path / "captioned"
    shutil.copytree(pictures, folder)
    for place, file in enumerate(sorted(folder.glob("*.png"))):
        if place:
            file.with_suffix(".txt").write_text("zwx square, flat style")
    options = ("--method", "lora", "--steps", "1", "--instance-prompt", None)
    train("run", "--images", folder, "--identifier", "zwx", *options)
    said = capsys.readouterr().err
    assert "class images: 3 of square, square, flat style" in said
    about = sorted(json.loads(file.read_text())["prompt"] for file in (tmp_path / "class").glob("*/about.json"))
    assert about == ["square", "square, flat style"]


def test_captions_may_bind_the_subject_to_another_word_than_the_default(train, pictures, tmp_path, capsys):
    """Which the file then names, and the class has the captions' forms; an identifier that is given must be in one."""
    folder = tmp_path / "captioned"
    shutil.copytree(pictures, folder)
    for file in folder.glob("*.png"):
        file.with_suffix(".txt").write_text("zwx square, flat style")
    options = ("--method", "lora", "--steps", "1", "--instance-prompt", None, "--images", folder)
    path = train("run", *options)
    said = capsys.readouterr().err
    assert "identifier 'zwx'" in said
    assert "class images: 3 of square, square, flat style" in said
    assert read_header(path).metadata["modelspec.trigger_phrase"] == "zwx square"
    train("other", *options, "--identifier", "ohwx", status=2)
    assert "--identifier has no effect without it in a caption" in capsys.readouterr().err


def test_the_run_tells_how_the_identifier_is_cut_and_warns_of_a_word(train, capsys):
    options = ("--method", "lora", "--prior", "none", "--steps", "1", "--instance-prompt", None)
    train("run", "--identifier", "dog", *options)
    said = capsys.readouterr().err
    assert "identifier 'dog': 3 pieces (d + o + g)" in said
    assert "'dog' is an ordinary word" in said
    train("other", *options)
    assert "ordinary" not in capsys.readouterr().err


def test_a_copy_of_the_program_runs(pocket_folder, pictures, tmp_path, monkeypatch):
    """As a script does; tests/lora/test_lora_again.py has a copy run in a process of its own."""
    assert cli.main(["cp", "dreambooth", str(tmp_path / "mine.py")]) == 0
    words = ["--images", str(pictures), "--base", str(pocket_folder), "--output", str(tmp_path / "run")]
    words += ["--class-name", "square", "--prior", "base", "--method", "lora", "--steps", "1"]
    words += ["--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "0"]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "mine.py"), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tmp_path / "mine.py"), run_name="__main__")
    assert ended.value.code == 0
    assert (tmp_path / "run/run.safetensors").is_file()
