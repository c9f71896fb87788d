"""Every config in trainers/configs runs for a step or two by its program, with the paths and sizes of a test alone."""

import json
import tomllib

import pytest
from PIL import Image

from sfumato import cli
from sfumato.files import inspect_file
from sfumato.models import load_base
from tests.logged import log_in
from tests.tiny import CPU

CONFIGS = cli.source("sfumato.trainers.lora").parent / "configs"
FILES = {file.stem: file for file in sorted(CONFIGS.glob("*.toml"))}
PROGRAMS = {
    "lora": "lora",
    "dreambooth": "dreambooth",
    "finetune": "finetune",
    "slider": "slider",
    "lcm": "lcm",
    "word": "textual_inversion",
    "pocket": "pretrain",
}
"""By the first word of a config's name."""
POCKET = CONFIGS.parents[1] / "src/sfumato/models/pocket"


def first_word(name):
    return name.split("-")[0]


def test_the_first_word_of_a_config_names_its_program():
    assert {first_word(name) for name in FILES} == PROGRAMS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if first_word(name) != "pocket"])
def test_a_recipe_learns_from_pictures(name, pocket_folder, tmp_path, quick):
    images = tmp_path / "images"
    images.mkdir()
    for hand, colour in (("noto", "red"), ("twemoji", "gold")):
        Image.new("RGB", (64, 64), colour).save(images / f"{hand}.png")
        (images / f"{hand}.txt").write_text(f"sks cat, {hand} style")
    words = ["--output", str(tmp_path / "run"), "--base", str(pocket_folder), "--steps", "2", "--batch", "2"]
    program = PROGRAMS[first_word(name)]
    words += ["--drawn", "2"] if program in ("slider", "lcm") else ["--images", str(images)]
    words += ["--prompts", "a cat"] if program == "lcm" else []
    if program == "dreambooth":
        words += ["--class-name", "cat", "--class-count", "2"]
    if program == "textual_inversion":
        words += ["--placeholder", "<x>", "--stands-for", "sks cat"]
    if name == "lora-pivotal":
        words += ["--train-words", "<x>", "--stands-for", "sks cat"]
    assert cli.main(["train", program, str(FILES[name]), *words]) == 0
    rows = log_in(tmp_path / "run")
    assert len([row for row in rows if "loss" in row]) == 2
    if name in ("dreambooth-subject-full", "finetune-style"):
        assert load_base(str(tmp_path / "run/run"), precision=CPU).family.name == "pocket"
    else:
        assert inspect_file(tmp_path / "run/run.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if first_word(name) == "pocket"])
def test_a_recipe_of_the_base_takes_a_step(name, tmp_path):
    data = tmp_path / "data"
    for style, left in (("noto", 8), ("flat", 20)):
        (data / style).mkdir(parents=True)
        for concept, colour in (("crab", "red"), ("key", "gold")):
            picture = Image.new("RGB", (64, 64), "white")
            picture.paste(colour, (left, 10, 50, 40))
            picture.save(data / style / f"{concept}.png")
        (data / "other" / style).mkdir(parents=True)
        picture.save(data / "other" / style / "hammer.png")
    manifest = {"styles": ["noto", "flat"], "concepts": {"crab": "a sea animal", "key": "a tool"}, "withheld": []}
    (data / "manifest.json").write_text(json.dumps(manifest))
    (data / "words.txt").write_text("picture\nof\n")
    words = ["--data", str(data), "--output", str(tmp_path / "run"), "--steps", "1", "--fall-at", "0", "--batch", "2"]
    words += ["--warmup", "0", "--checkpoint-every", "0", "--sample-every", "0"]
    settings = tomllib.loads(FILES[name].read_text())
    words += ["--vae", str(POCKET / "vae")] if "vae" in settings else []
    words += [word for name in ("init", "base") if name in settings for word in (f"--{name}", str(POCKET))]
    words += ["--no-compile"] if "compile" in settings else []  # a minute, and a compiler
    assert cli.main(["train", "pretrain", str(FILES[name]), *words]) == 0
    assert list((tmp_path / "run/model").rglob("*.safetensors"))
