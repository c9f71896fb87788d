"""Every trainer: killed in the middle of a step, twice in a row, and resumed, it gives what it would have given."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from bench.runs_resume import CASES, ROOT, STEPS, command, cut, make_inputs, run
from sfumato import cli
from sfumato.runs.checkpoints import Checkpoints
from tests.runs.faults import failing

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no fork"),
    pytest.mark.usefixtures("quick"),  # which forked trainings inherit
]
QUICK = ("textual_inversion",)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_every_trainer_has_its_cases():
    assert {case.split()[0] for case in CASES} == cli.TRAINERS.keys()


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_killed_twice_and_resumed_is_the_same_to_the_bit(case, inputs, tmp_path):
    log = tmp_path / "whole.log"
    assert run(command(case, inputs, tmp_path / "whole"), log=log) == 0, log.read_text()[-2000:]
    rng = random.Random(case)
    kills = sorted(rng.choices(range(STEPS), k=2))
    assert cut(case, inputs, tmp_path / "whole", tmp_path / "cut", kills, every=rng.randint(1, 2)) == ""


def test_a_run_goes_on_from_elsewhere_and_with_pictures_that_were_moved(inputs, tmp_path, monkeypatch, capsys):
    base = Path(inputs["lora"][inputs["lora"].index("--base") + 1])
    pictures = Path(inputs["lora"][inputs["lora"].index("--images") + 1])
    shutil.copytree(pictures, tmp_path / "a/pictures")
    shutil.copytree(base, tmp_path / "a/base")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    words = ["--images", "pictures", "--base", "base", "--caption", "{caption}", "--steps", "1", "--device", "cpu"]
    quiet = ["--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "1"]
    assert cli.main(["train", "lora", "--learn", "plain", *words, *quiet, "--output", "run"]) == 0
    monkeypatch.chdir(tmp_path / "b")
    assert cli.main(["resume", "../a/run"]) == 0
    (tmp_path / "a/pictures").rename(tmp_path / "b/moved")
    assert cli.main(["resume", "../a/run", "--images", "moved"]) == 0
    (tmp_path / "b/moved/red-square.png").unlink()
    capsys.readouterr()
    assert cli.main(["resume", "../a/run", "--images", "moved"]) == 2
    assert "was trained with other things than these: data: red-square.png is gone" in capsys.readouterr().err


def test_a_run_keeps_the_prompts_of_a_file_and_not_where_it_was(inputs, tmp_path, capsys):
    file = tmp_path / "private-place/prompts.txt"
    file.parent.mkdir()
    file.write_text("a red square --d 7\na crab\n")
    words = command("lora", inputs, tmp_path / "run", "--steps", "1", "--sample-prompts", str(file))
    assert cli.main(words) == 0
    texts = ("config.toml", "run.json", "README.md", "out.safetensors")
    written = [(tmp_path / "run" / name).read_bytes() for name in texts]
    assert not any(b"private-place" in content for content in written)
    file.write_text("a fox")
    assert cli.main([*words, "--resume"]) == 2
    assert "sample_prompts ['a red square --d 7', 'a crab'] -> ['a fox']" in capsys.readouterr().err
    file.unlink()
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    kept = tomllib.loads((tmp_path / "run/config.toml").read_text())
    assert kept["sample_prompts"] == ["a red square --d 7", "a crab"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "dreambooth lora", "finetune", "textual_inversion"])
def test_two_processes_killed_and_resumed_give_what_two_give(case, inputs, tmp_path):
    """All but the first sum the gradients of two batches, too; pretrain runs in one process."""
    log = tmp_path / "whole.log"
    assert run(command(case, inputs, tmp_path / "whole"), log=log, processes=2) == 0, log.read_text()[-2000:]
    assert cut(case, inputs, tmp_path / "whole", tmp_path / "cut", [2, 3], every=2, processes=2) == ""
    said = (tmp_path / "cut.log").read_text()
    assert said.count("resuming from step 2") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("start", ["script", "command"])
def test_a_signal_ends_a_real_training_in_order(start, number, code, inputs, tmp_path):
    words = command("lora", inputs, tmp_path / "run", "--steps", "400", "--checkpoint-every", "400")
    program = [str(ROOT / "trainers/lora.py"), *words[2:]] if start == "script" else ["-m", "sfumato", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, *program], stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    while not (tmp_path / "run/checkpoints/000000").exists() and child.poll() is None:
        time.sleep(0.05)
    time.sleep(1)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code, said[-2000:]
    assert "sfumato resume " in said
    assert max(Checkpoints(tmp_path / "run/checkpoints").steps()) > 0


def test_a_disk_that_is_full_at_the_end_is_one_line_and_nothing_is_lost(inputs, tmp_path, monkeypatch, capsys):
    words = command("lora", inputs, tmp_path / "run", "--steps", "1")
    card = tmp_path / "run/README.md"
    with failing(monkeypatch, card, "rename", 0, errno.ENOSPC):
        assert cli.main(words) == 2
    line = f"sfumato: {card}: No space left on device. Make room or see to its permissions."
    kept = f" All its steps are kept; the rest is written by: sfumato resume {tmp_path / 'run'}\n"
    assert capsys.readouterr().err.endswith(line + kept)
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert "ended without finishing" not in capsys.readouterr().err
    assert card.is_file()


@pytest.mark.slow
def test_one_weight_pixel_caption_or_merge_that_changed_is_refused(tmp_path, capsys):
    """And said; what is put back goes on."""
    inputs = make_inputs(tmp_path)
    words = command("lora", inputs, tmp_path / "run", "--steps", "1")
    assert cli.main(words) == 0
    unet = tmp_path / "pocket/unet/diffusion_pytorch_model.safetensors"
    picture, caption = tmp_path / "pictures/red-square.png", tmp_path / "pictures/red-square.txt"
    whole, pixels = unet.read_bytes(), picture.read_bytes()

    def refused(said):
        assert cli.main([*words, "--resume"]) == 2
        assert f"was trained with other things than these: {said}" in capsys.readouterr().err

    place = len(whole) * 10 // 64 + 4200  # between the pages that a quick look reads
    assert place < len(whole) * 11 // 64
    unet.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    refused("base ")
    unet.write_bytes(whole)
    with Image.open(picture) as opened:
        opened.putpixel((3, 3), (255, 255, 254))
        opened.save(picture)
    refused("data: red-square.png or its mask is another.")
    picture.write_bytes(pixels)
    caption.write_text("a red square")
    refused("data: red-square.png has another caption, crop or setting.")
    caption.unlink()
    tokenizer = tmp_path / "pocket/tokenizer/tokenizer.json"
    vocabulary = json.loads(tokenizer.read_text())
    merges = vocabulary["model"]["merges"]
    tokenizer.write_text(json.dumps(vocabulary | {"model": vocabulary["model"] | {"merges": merges[:-1]}}))
    refused("base ")
    tokenizer.write_text(json.dumps(vocabulary))
    assert cli.main([*words, "--resume"]) == 0
