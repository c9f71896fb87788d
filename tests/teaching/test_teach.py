"""`sfumato teach` as a person calls it, on pocket, with a few steps."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfumato import cli

DATASETS = Path(__file__).parents[2] / "datasets"
QUICK = ["--steps", "2", "--no-sheet", "--no-measure"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1760000000")  # files hold their date
    shutil.copytree(DATASETS / "line-style", "line")
    return tmp_path


def numbered(folder, count=3):
    folder.mkdir()
    for number, path in enumerate(sorted((DATASETS / "line-style").glob("*.png"))[:count]):
        shutil.copyfile(path, folder / f"IMG_{number:04d}.png")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_command_that_is_printed_gives_the_same_bytes(here, capsys):
    before = contents(here / "line")
    assert cli.main(["teach", "line", "ink", *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "a style: 16 pictures are named after 16 different things" in shown
    (typed,) = [line for line in shown.splitlines() if line.startswith("$ ") and " train " in line]
    learned = (here / "runs/ink/ink.safetensors").read_bytes()
    assert (here / "runs/ink/samples/000000").is_dir()
    assert contents(here / "line") == before
    shutil.rmtree(here / "runs")
    assert cli.main(shlex.split(typed)[2:]) == 0
    assert (here / "runs/ink/ink.safetensors").read_bytes() == learned


def test_a_second_one_says_that_it_is_done_or_what_has_changed(here, capsys):
    assert cli.main(["teach", "line", "ink", *QUICK]) == 0
    learned = here / "runs/ink/ink.safetensors"
    at = learned.stat().st_mtime_ns
    capsys.readouterr()
    assert cli.main(["teach", "line", "ink", *QUICK]) == 0
    assert "taught already" in (shown := capsys.readouterr().out)
    assert str(Path("runs/ink/ink.safetensors")) in shown
    (here / "line/bug.png").unlink()
    shutil.copyfile(here / "line/lion.png", here / "line/camel.png")
    assert cli.main(["teach", "line", "ink", *QUICK, "--seed", "3"]) == 2
    said = capsys.readouterr().err
    for part in ("gone bug.png", "changed camel.png", "--seed 3, then 7", "--overwrite", "another --output"):
        assert part in said
    assert len(said.splitlines()) == 1
    assert learned.stat().st_mtime_ns == at
    assert cli.main(["teach", "line", "ink", *QUICK, "--overwrite"]) == 0
    assert learned.stat().st_mtime_ns > at
    assert "bug.png" not in json.loads((here / "runs/ink/teach.json").read_text())["pictures"]


def test_a_training_that_was_typed_is_left_alone(here, capsys):
    words = ["train", "lora", "lora-style.toml", "--images", "line", "--steps", "1", "--sample-every", "0"]
    assert cli.main([*words, "--output", "runs/ink"]) == 0
    assert cli.main(["teach", "line", "ink", *QUICK]) == 2
    assert "did not begin" in capsys.readouterr().err


def test_what_cannot_be_told_is_refused_without_a_terminal_and_asked_at_one(here, capsys, monkeypatch):
    numbered(here / "photos")
    assert cli.main(["teach", "photos", "rex"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--style, --subject or --word" in line
    assert not (here / "runs").exists()
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "word")
    assert cli.main(["teach", "photos", "rex", "--dry-run"]) == 0
    assert "textual_inversion" in capsys.readouterr().out
    assert not (here / "runs/rex").exists()


def test_a_style_called_by_numbers_wants_a_captioner_which_writes_into_the_output(here, capsys, monkeypatch):
    photos = numbered(here / "photos")
    (photos / "IMG_0001.txt").write_text("a camel")
    before = contents(photos)
    assert cli.main(["teach", "photos", "ink", "--style", *QUICK]) == 2
    assert "--captioner florence-community/Florence-2-base" in capsys.readouterr().err
    monkeypatch.setattr("sfumato.data.captioners.load_captioner", lambda *_: lambda images: ["a thing"] * len(images))
    assert cli.main(["teach", "photos", "ink", "--style", "--captioner", "mine", *QUICK]) == 0
    assert contents(photos) == before
    texts = {path.name: path.read_text().strip() for path in Path("runs/ink/pictures").glob("*.txt")}
    assert texts == {"000-IMG_0000.txt": "a thing", "001-IMG_0001.txt": "a camel", "002-IMG_0002.txt": "a thing"}
    assert str(Path("runs/ink/pictures")) in capsys.readouterr().out
    assert Path("runs/ink/ink.safetensors").is_file()


def test_an_interrupted_one_goes_on_to_the_same_bytes(here):
    call = [sys.executable, "-P", "-m", "sfumato", "teach", "line", "ink", "--steps", "4", "--no-sheet", "--no-measure"]
    whole = subprocess.run([*call, "--output", "whole/ink"], capture_output=True, text=True, check=True)
    assert "taught already" not in whole.stdout
    piped = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    begun = subprocess.Popen([*call, "--output", "cut/ink"], **piped, creationflags=flags)
    deadline = time.monotonic() + 120
    while not list(Path("cut/ink/checkpoints").glob("[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    begun.send_signal(signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGINT)
    _, said = begun.communicate(timeout=120)
    assert begun.returncode != 0
    again = next(line for line in said.splitlines() if "this goes on: " in line)
    words = shlex.split(again.partition("this goes on: ")[2])[1:]
    on = subprocess.run([sys.executable, "-P", "-m", "sfumato", *words, "--no-sheet"], capture_output=True, text=True)
    assert on.returncode == 0, on.stderr
    assert "goes on with what was stopped" in on.stdout
    assert Path("cut/ink/ink.safetensors").read_bytes() == Path("whole/ink/ink.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("photos", "name", "learned", "sheet"),
    [
        ("line-style", "line style", "line-style.safetensors", "sheet.png"),
        ("flamingo", "flamingo", "flamingo.safetensors", "sheet.png"),
        ("teddy-bear", "<teddy>", "teddy.safetensors", "sheet/grid.png"),
    ],
)
def test_all_of_it_down_to_the_commands_it_names(photos, name, learned, sheet, here, capsys):
    assert cli.main(["teach", str(DATASETS / photos), name, "--steps", "4", "--output", "out/it"]) == 0
    shown = capsys.readouterr().out
    assert all(any(line.startswith(word) for line in shown.splitlines()) for word in ("time", "memory", "disk"))
    assert Path("out/it/seen.png").is_file()
    assert Path("out/it", sheet).is_file()
    commands = [line.strip() for line in shown.partition("Try next:")[2].splitlines() if line.startswith("  ")]
    assert len(commands) == 3
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0


def test_a_full_disk_is_told_before_anything_is_written(here, capsys, monkeypatch):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2**20))
    assert cli.main(["teach", "line", "ink", *QUICK]) == 2
    assert "Make room" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_pictures_that_cannot_be_read_are_told_with_what_mends_them(here, capsys):
    (here / "line/broken.png").write_bytes(b"no picture")
    assert cli.main(["teach", "line", "ink", *QUICK]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "broken.png" in line
    assert "sfumato check line --fix NEW" in line
