"""Ctrl-C and SIGTERM: the step is finished and saved, the way on is said; a second one stops now."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfumato.files import read_tensors
from sfumato.runs.checkpoints import Checkpoints
from tests.runs.small import Config, train

ROOT = Path(__file__).resolve().parents[2]
CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def begin(folder, *options):
    """The small trainer in a process of its own, once its first steps are through."""
    command = [sys.executable, "-m", "tests.runs.small", "--output", str(folder), "--name", "m", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    until = time.monotonic() + 60
    while not (folder / "checkpoints/000000").exists() and time.monotonic() < until and child.poll() is None:
        time.sleep(0.02)
    time.sleep(0.2)
    return child


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_first_signal_finishes_the_step_saves_and_says_how_to_go_on(number, code, tmp_path):
    settings = {"steps": 30, "checkpoint_every": 0}
    child = begin(tmp_path / "run", "--steps", "30", "--pause-s", "0.1", "--checkpoint-every", "30")
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == code, said
    step, _ = Checkpoints(tmp_path / "run/checkpoints").newest()
    assert step is not None
    assert 0 < step < 30
    assert "stopping after this step and saving; once more to stop now" in said
    assert f"stopped after step {step} of 30, saved. Go on with: sfumato resume {tmp_path / 'run'}" in said
    assert not (tmp_path / "run/.holder.json").exists()
    whole = train(Config(output=tmp_path / "whole", name="m", **settings))
    again = train(Config(output=tmp_path / "run", name="m", pause_s=0.1, resume=True, force=True, **settings))
    assert all((tensor == read_tensors(again)[key]).all() for key, tensor in read_tensors(whole).items())


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_second_one_stops_now_and_leaves_what_was_whole(number, code, tmp_path):
    child = begin(tmp_path / "run", "--steps", "30", "--pause-s", "30", "--checkpoint-every", "1")
    child.send_signal(number)
    time.sleep(0.3)
    assert child.poll() is None
    child.send_signal(number)
    _, said = child.communicate(timeout=10)
    assert child.returncode == code, said
    assert Checkpoints(tmp_path / "run/checkpoints").newest() == (0, [])


def test_handlers_are_what_they_were_when_the_loop_is_over(tmp_path):
    before = [signal.getsignal(number) for number, _ in CODES]
    train(Config(output=tmp_path / "run"))
    assert [signal.getsignal(number) for number, _ in CODES] == before
