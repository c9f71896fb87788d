"""The log, the bar and the sheet of samples: what is shown of a training."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from sfumato.options import RunOptions
from sfumato.runs import Run, signals
from sfumato.runs import log as logs
from sfumato.runs.log import Log
from sfumato.runs.progress import Progress
from sfumato.runs.samples import Samples
from sfumato.runs.signals import Stop
from tests.runs.faults import failing

# Log


@pytest.fixture
def said():
    return []


@pytest.fixture
def log(tmp_path, said):
    return Log(tmp_path / "log.jsonl", warn=said.append)


def written(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()] if log.path.exists() else []


def test_every_tenth_row_brings_ten_to_the_disk(log):
    for step in range(9):
        log.add({"step": step})
    assert written(log) == []
    log.add({"step": 9})
    assert written(log) == [{"step": step} for step in range(10)]


def test_numbers_have_six_digits_and_whole_ones_stay_whole(log):
    log.add({"step": 7, "loss": torch.tensor(0.123456789), "rate": 0.00012345678})
    log.close()
    assert log.path.read_text() == '{"step": 7, "loss": 0.123457, "rate": 0.000123457}\n'


def test_a_disk_that_fills_is_said_once_each_time_and_the_rows_wait(log, said, tmp_path, monkeypatch):
    for turn in (1, 2):
        log.add({"step": turn})
        for _ in range(2):
            with failing(monkeypatch, tmp_path, "write", 0, 28):
                log.flush()
        assert len(said) == turn
        assert log.rows() == [{"step": step} for step in range(1, turn + 1)]
    assert written(log) == [{"step": 1}, {"step": 2}]


def test_rows_that_wait_are_rows(log, tmp_path, monkeypatch):
    log.add({"step": 1})
    with failing(monkeypatch, tmp_path, "write", 0, 28):
        assert log.rows() == [{"step": 1}]


def test_half_a_line_is_taken_back(log, tmp_path, monkeypatch):
    """Else what is written after it would be joined to it, and be lost with it."""
    log.add({"step": 1})
    log.flush()

    class Half:
        def __init__(self, file):
            self.file, self.count = file, 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            self.count += 1
            if self.count > 1:
                raise OSError(28, "No space left on device")
            return self.file.write(content[:5])

    real = type(log.path).open
    with monkeypatch.context() as patched:
        patched.setattr(type(log.path), "open", lambda *a, **k: Half(real(*a, **k)))
        log.add({"step": 2})
        log.flush()
    assert written(log) == [{"step": 1}]
    log.flush()
    assert written(log) == [{"step": 1}, {"step": 2}]


def test_a_line_that_a_killed_process_left_half_written_ends_the_rows(log):
    log.path.write_text('{"step": 1}\n{"st')
    assert log.rows() == [{"step": 1}]
    log.path.write_text('{"step": 1}\n7\n{"step": 2}\n')
    assert log.rows() == [{"step": 1}]


def test_cutting_keeps_the_step_and_forgets_what_came_after(log, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    for step in (1, 2, 3):
        log.add({"step": step})
    log.flush()
    log.add({"step": 2, "fit": 0.5})
    with monkeypatch.context() as patched:
        patched.setattr(logs, "_append", full)  # so that a row waits
        log.cut(2)
    wanted = [{"step": 1}, {"step": 2}, {"step": 2, "fit": 0.5}]
    assert written(log) == wanted
    log.flush()
    assert written(log) == wanted


# Progress


def test_the_bar_begins_where_the_run_does_and_goes_back_with_it(capsys):
    progress = Progress(shown=True)
    with progress.begin(3, 10) as bar:
        assert (bar.n, bar.total) == (3, 10)
        progress.step()
        assert bar.n == 4
        progress.go_back_to(2)
        assert bar.n == 2
    assert "training" in capsys.readouterr().err


def test_the_loss_that_is_shown_is_a_running_mean():
    progress = Progress(shown=False)
    progress.loss(9.0)  # before there is a bar
    progress = Progress(shown=True)
    with progress.begin(0, 10) as bar:
        progress.loss(1.0)
        progress.loss(2.0)
        assert bar.postfix == "loss 1.1000"


@pytest.mark.parametrize("quiet", [True, False])
def test_of_several_processes_one_says_that_it_stops(quiet, monkeypatch):
    said = []
    monkeypatch.setattr(signals.os, "write", lambda number, text: said.append(number))
    with Stop(quiet=quiet) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert said == ([] if quiet else [2])


# Samples


@pytest.fixture
def samples(tmp_path):
    def make(step=0, is_main=True, seed=3):
        def draw(prompts, seeds):
            drawn.append((list(prompts), list(seeds)))
            return [Image.new("RGB", (16, 16), (len(drawn), place, 0)) for place in range(len(prompts))]

        run = SimpleNamespace(folder=tmp_path, step=step, is_main=is_main)
        return Samples(run, None, ["a", "b"], seed, draw=draw)

    drawn = make.drawn = []
    return make


def test_each_prompt_has_the_run_s_seed_every_time(samples):
    sheet = samples()
    sheet.draw(0)
    sheet.draw(5)
    assert samples.drawn == [(["a", "b"], [3, 3])] * 2
    assert [[picture.getpixel((0, 0)) for picture in row] for row in sheet.rows] == [
        [(1, 0, 0), (1, 1, 0)],
        [(2, 0, 0), (2, 1, 0)],
    ]


def test_a_row_of_which_a_killed_process_drew_half_is_none(samples, tmp_path):
    sheet = samples()
    sheet.draw(0)
    sheet.draw(5)
    (tmp_path / "samples/000005/1.png").unlink()
    assert len(sheet.rows) == 1


@pytest.mark.parametrize(("step", "left"), [(0, []), (4, ["000000", "000004"]), (8, ["000000", "000004", "000008"])])
def test_a_resumed_run_forgets_the_rows_that_it_will_draw_again(step, left, samples, tmp_path):
    sheet = samples()
    for drawn in (0, 4, 8):
        sheet.draw(drawn)
    (tmp_path / "samples/mine").mkdir()
    samples(step=step, is_main=False)
    assert len(list((tmp_path / "samples").iterdir())) == 4
    samples(step=step)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [*left, "mine"]


def test_other_processes_draw_nothing(samples, tmp_path):
    samples(is_main=False).draw(0)
    assert samples.drawn == []
    assert not (tmp_path / "samples").exists()


def test_several_processes_are_told_to_go_on_as_several(tmp_path, capsys):
    class Two:
        is_main, count = True, 2

        def wait(self):
            pass

        def largest(self, number):
            return number

    run = Run.start(RunOptions(output=tmp_path / "my run"), program="test", processes=Two())
    steps = run.steps(5)
    next(steps)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        next(steps)
    assert ended.value.code == 143
    again = f"accelerate launch --num_processes 2 -m sfumato resume '{tmp_path / 'my run'}'"
    assert f"stopped after step 1 of 5, saved. Go on with: {again}\n" in capsys.readouterr().err
