"""Ctrl-C and SIGTERM: the step is finished and saved, the way on is said; a second one stops now."""

import errno
import io
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from sfumato.cli import guarded
from sfumato.files import read_tensors
from sfumato.runs.checkpoints import Checkpoints
from sfumato.runs.progress import StopSignal
from tests.runs.faults import failing
from tests.runs.said import Processes, lines, start
from tests.runs.small import Config, main, train

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), *([(signal.SIGHUP, 129)] if hasattr(signal, "SIGHUP") else [])]


class Child:
    """The small trainer in a fork of this process, which saves the seconds that torch takes to be imported.

    tests/test_resume.py sends signals to trainings that were started by the system.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        """Comes back once the first checkpoint is written."""
        self._log = folder.with_suffix(".said")
        words = ["--output", str(folder), "--name", "m", *options]
        self.process = multiprocessing.get_context("fork").Process(target=self._train, args=(words,), daemon=True)
        self.process.start()
        until = time.monotonic() + 60
        while not (folder / "checkpoints/000000").exists() and time.monotonic() < until and self.process.is_alive():
            time.sleep(0.02)
        time.sleep(0.2)

    def _train(self, words: list[str]) -> None:
        os.dup2(os.open(self._log, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        sys.exit(guarded(main, words))

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, timeout_s: float) -> tuple[int | None, str]:
        """Its exit code, None if it is still there, and what it has said."""
        self.process.join(timeout_s)
        return self.process.exitcode, self._log.read_text()


def test_a_signal_is_remembered_where_nobody_reads_that_it_was_heard(tmp_path, monkeypatch):
    """`sfumato train ... 2>&1 | tee log`: Ctrl-C ends tee as well. Without errors' stream 2 is another file."""
    kept, (reading, writing) = os.dup(2), os.pipe()
    os.close(reading)
    try:
        os.dup2(writing, 2)
        unread = StopSignal()
        unread._remember(signal.SIGTERM, None)
        file = os.open(tmp_path / "weights", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 2)
        monkeypatch.setattr(sys, "stderr", None)
        without = StopSignal()
        without._remember(signal.SIGTERM, None)
    finally:
        os.dup2(kept, 2)
    assert unread.signal == without.signal == signal.SIGTERM
    assert (tmp_path / "weights").read_bytes() == b""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals and forks are POSIX's")
@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_first_signal_finishes_the_step_saves_and_says_how_to_go_on(number, code, tmp_path):
    settings = {"steps": 30, "checkpoint_every": 0}
    child = Child(tmp_path / "run", "--steps", "30", "--pause-s", "0.1", "--checkpoint-every", "30")
    child.send(number)
    ended, said = child.end(timeout_s=60)
    assert ended == code, said
    step, _ = Checkpoints(tmp_path / "run/checkpoints").newest()
    assert step is not None
    assert 0 < step < 30
    assert "stopping after this step and saving; once more to stop now" in said
    assert f"stopped after step {step} of 30, saved. Go on with: sfumato resume {tmp_path / 'run'}" in said
    assert not (tmp_path / "run/.holder.json").exists()
    whole = train(Config(output=tmp_path / "whole", name="m", **settings))
    again = train(Config(output=tmp_path / "run", name="m", resume=True, force=True, **settings))
    assert all((tensor == read_tensors(again)[key]).all() for key, tensor in read_tensors(whole).items())


@pytest.mark.skipif(sys.platform == "win32", reason="signals and forks are POSIX's")
@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_second_one_stops_now_and_leaves_what_was_whole(number, code, tmp_path):
    child = Child(tmp_path / "run", "--steps", "30", "--pause-s", "30", "--checkpoint-every", "1")
    child.send(number)
    assert child.end(timeout_s=0.3)[0] is None
    child.send(number)
    ended, said = child.end(timeout_s=10)
    assert ended == code, said
    assert Checkpoints(tmp_path / "run/checkpoints").newest() == (0, [])


def test_handlers_are_what_they_were_when_the_loop_is_over(tmp_path):
    before = [signal.getsignal(number) for number, _ in CODES]
    train(Config(output=tmp_path / "run"))
    assert [signal.getsignal(number) for number, _ in CODES] == before


def test_a_first_signal_is_remembered_and_a_second_ends():
    with StopSignal(quiet=True) as stop:
        stop._remember(signal.SIGTERM, None)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            stop._remember(signal.SIGINT, None)
        with pytest.raises(SystemExit) as ended:
            stop._remember(signal.SIGTERM, None)
        assert ended.value.code == 143
    before = signal.getsignal(signal.SIGTERM)
    with stop:
        assert signal.getsignal(signal.SIGTERM) == stop._remember
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX signal")
def test_a_closed_terminal_is_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_beneath_a_launcher_a_second_signal_is_none_of_a_person():
    """It passes on what the system sends to every process, so that each gets it twice."""
    with StopSignal(quiet=True, alone=False) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGINT


@pytest.mark.parametrize("main", [True, False])
def test_only_the_main_process_says_that_it_stops(main, tmp_path, capfd):
    steps = start(tmp_path, Processes(main=main)).steps(3)
    next(steps)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        next(steps)
    assert ended.value.code == 130
    said = capfd.readouterr().err
    assert ("\nstopping after this step and saving; once more to stop now\n" in said) is main
    assert ("stopped after step 1 of 3, saved. Go on with: accelerate" in said) is main


def test_one_process_is_told_to_go_on_as_one(tmp_path, capsys):
    steps = start(tmp_path).steps(3)
    next(steps)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit):
        next(steps)
    again = f"sfumato resume {tmp_path / 'run'}"
    assert lines(capsys)[-2:] == [
        f"stopped after step 1 of 3, saved. Go on with: {again}",
        f"Or end it here, with what is learned so far: {again} --finish",
    ]


def test_stopped_on_a_full_disk(tmp_path, monkeypatch, capsys):
    run = start(tmp_path, checkpoint_every=0)
    steps = run.steps(3)
    next(steps)
    signal.raise_signal(signal.SIGTERM)
    with failing(monkeypatch, tmp_path / "run/checkpoints", "fsync", 0, errno.ENOSPC), pytest.raises(SystemExit):
        next(steps)
    assert lines(capsys)[-2:] == [
        "the checkpoint of step 1 could not be written: No space left on device.",
        "stopped after step 1 of 3; this step could not be saved.",
    ]
