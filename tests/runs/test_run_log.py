"""The log, the bar and the sheet of samples: what is shown of a training."""

import importlib
import io
import json
import re
import signal
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sfumato.runs import progress
from sfumato.runs import progress as signals
from sfumato.runs.folder import remove_samples
from sfumato.runs.progress import PreparationBars, Progress, StopSignal
from sfumato.runs.reporting import log as logs
from sfumato.runs.reporting import plot
from sfumato.runs.reporting import samples as sheets
from sfumato.runs.reporting.log import Log
from sfumato.runs.reporting.samples import Samples
from sfumato.runs.run import Run
from sfumato.training.options import RunOptions
from sfumato.training.sampling import make_sampler
from sfumato.utils.image_grid import contact_sheet
from tests.runs.faults import failing
from tests.runs.said import Processes, problem, start

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


def test_rows_without_a_step_are_of_the_beginning(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for row in ({"note": 1}, {"step": 0, "a": 2}, {"step": 1, "a": 3}):
        log.add(row)
    log.cut(0)
    assert log.rows() == [{"note": 1}, {"step": 0, "a": 2}]


@pytest.mark.parametrize("line", ["[2]", '{"step": "2"}', '{"step": null}', '{"step": Infinity}', "[" * 5000])
def test_what_is_no_row_ends_the_rows(line, tmp_path):
    log = Log(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    assert log.rows() == [{"step": 1}]
    log.cut(9)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


def test_the_board_gets_each_number_at_its_step(tmp_path, monkeypatch):
    given = []
    board = SimpleNamespace(add_scalar=lambda *row: given.append(row), flush=lambda: given.append("flushed"))
    monkeypatch.setattr(logs, "_board", lambda folder: lambda: board if folder == tmp_path else None)
    log = Log(tmp_path / "log.jsonl", tensorboard=True)
    log.add({"step": 3, "loss": torch.tensor(0.5), "rate": 0.1})
    log.close()
    assert sorted(map(str, given)) == ["('loss', 0.5, 3)", "('rate', 0.1, 3)", "flushed"]


def test_tensorboard_is_opened_beside_the_log_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda place: [place]))
    assert logs._board(tmp_path)() == [str(tmp_path / "tensorboard")]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert problem(lambda: start(tmp_path, tensorboard=True)) == (
        '--tensorboard: the package is not installed; pip install "sfumato[tensorboard]".'
    )
    start(tmp_path, Processes(main=False), tensorboard=True).close()


def test_a_tensorboard_that_is_broken_is_no_matter_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / "brokenboard.py").write_text("raise OSError('libboard.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(logs, "_board", lambda folder: importlib.import_module("brokenboard"))
    with pytest.raises(OSError, match="libboard"):
        start(tmp_path / "run", tensorboard=True)


def test_a_training_goes_on_without_a_plot_where_matplotlib_is_broken(tmp_path, monkeypatch):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('numpy.core.multiarray failed to import')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    run = start(tmp_path / "run")
    run.log_file.add({"step": 1, "loss": 0.5})
    run.plot()
    assert not (run.folder / "plot.png").exists()
    run.close()


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


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (False, True), (True, False)])
def test_a_terminal_sees_what_is_prepared_and_a_log_what_takes_long(terminal, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with PreparationBars(shown=shown) as told:
        for done in range(4):
            told("images", done, 3)
        told("captions", 2, 2)
        assert [bar.n for bar in told._bars.values()] == ([3, 2] if shown else [0, 0])
    error = capsys.readouterr().err
    assert ("encoding images" in error, "encoding captions" in error) == (terminal and shown, terminal and shown)


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
    with StopSignal(quiet=quiet) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert said == ([] if quiet else [2])


def test_the_whole_bar_of_a_run_that_is_shown(tmp_path, capsys):
    run = start(tmp_path)
    for step in run.steps(2):
        step.done(loss=torch.tensor(0.25, requires_grad=True))
    run.close()
    assert re.search(r"training: 100%.* 2/2 .*loss 0\.2500\]", capsys.readouterr().err)


@pytest.mark.parametrize(("terminal", "pause_s"), [(True, 0.2), (False, 10.0)])
def test_the_bar_is_one_of_a_terminal_or_of_a_log_file(terminal, pause_s, monkeypatch):
    made = []
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(progress, "tqdm", lambda **options: made.append(options) or "bar")
    assert Progress(shown=True).begin(7, 5) == "bar"
    assert made == [
        {
            **{"total": 5, "initial": 5, "file": stream, "disable": False, "mininterval": pause_s},
            **{"maxinterval": pause_s, "dynamic_ncols": True, "desc": "training", "unit": "step"},
        }
    ]
    Progress(shown=False).begin(1, 5)
    assert (made[1]["disable"], made[1]["initial"]) == (True, 1)


def test_the_loss_is_written_without_drawing_the_bar_anew():
    given = []
    bar = Progress(shown=True)
    bar.loss(4.0)  # before the loop there is no bar
    bar._bar = SimpleNamespace(set_postfix_str=lambda *text, **how: given.append((text, how)))
    bar.loss(2.0)
    assert given == [(("loss 3.8000",), {"refresh": False})]


def test_a_line_goes_to_stderr(capsys):
    progress.say("a line")
    assert capsys.readouterr() == ("", "a line\n")
    progress.say("1 ignored: \x1b[2Jb.xyz\nand more")
    assert capsys.readouterr() == ("", "1 ignored: \\x1b[2Jb.xyz\nand more\n")


# Samples


@pytest.fixture
def samples(tmp_path):
    def make(step=0, is_main=True, seed=3):
        def draw(prompts, seeds):
            drawn.append((list(prompts), list(seeds)))
            return [Image.new("RGB", (16, 16), (len(drawn), place, 0)) for place in range(len(prompts))]

        run = SimpleNamespace(folder=tmp_path, step=step, is_main=is_main, show=lambda *_: None)
        return Samples(run, ["a", "b"], seed, draw)

    drawn = make.drawn = []
    return make


def test_each_prompt_has_the_run_s_seed_every_time(samples):
    sheet = samples()
    sheet.draw(0)
    sheet.draw(5)
    assert samples.drawn == [(["a", "b"], [3, 3])] * 2
    assert [[picture.getpixel((0, 0)) for picture in row] for row in sheet.ends] == [
        [(1, 0, 0), (1, 1, 0)],
        [(2, 0, 0), (2, 1, 0)],
    ]


def test_pictures_of_other_prompts_are_neither_on_the_sheet_nor_before(samples, monkeypatch):
    """Of a run that goes on by --force with others, whose column they would be in."""
    samples().draw(0)
    others, labels = samples(), []
    others.prompts = ["a", "c"]
    assert others.ends == []
    others.draw(5)
    monkeypatch.setattr(sheets, "contact_sheet", lambda rows, **said: labels.append(said["row_labels"]) or rows[0][0])
    others.draw(9)
    assert labels == [["step 5", "step 9"]]
    assert [[picture.getpixel((0, 0)) for picture in row] for row in others.ends] == [[(3, 0, 0), (3, 1, 0)]]


def test_what_lies_on_the_sheet_already_is_held_at_its_size_there(samples, monkeypatch):
    """Of many rows of large pictures a training would else hold every pixel."""
    sheet, held = samples(), []
    monkeypatch.setattr(
        "sfumato.runs.reporting.samples.contact_sheet", lambda rows, **_: held.extend(rows) or rows[0][0]
    )
    large = Image.effect_noise((1024, 768), 64).convert("RGB")
    sheet._draw = lambda prompts, seeds: [large, large.crop((0, 0, 512, 512))]
    sheet.draw(0)
    assert [picture.size for picture in held[0]] == [(512, 384), (256, 256)]
    whole, reduced = (contact_sheet([row], row_labels=["step 0"]) for row in ([large], [held[0][0]]))
    assert np.array_equal(np.asarray(whole), np.asarray(reduced))


def test_a_row_of_which_a_killed_process_drew_half_is_none(samples, tmp_path):
    sheet = samples()
    sheet.draw(0)
    sheet.draw(5)
    (tmp_path / "samples/000005/1.png").unlink()
    assert len(sheet.ends) == 1


@pytest.mark.parametrize("end", [0, 40])
def test_a_row_with_a_broken_picture_is_none_and_stops_no_other(end, samples, tmp_path):
    sheet = samples()
    sheet.draw(0)
    broken = tmp_path / "samples/000000/1.png"
    broken.write_bytes(broken.read_bytes()[:end])
    sheet.draw(5)
    assert [row[0].getpixel((0, 0)) for row in sheet.ends] == [(2, 0, 0)]


@pytest.mark.parametrize(
    ("step", "left"),
    [(-1, []), (0, ["000000"]), (4, ["000000", "000004"]), (8, ["000000", "000004", "000008"])],
)
def test_a_resumed_run_forgets_the_rows_that_it_will_draw_again(step, left, samples, tmp_path):
    sheet = samples()
    for drawn in (0, 4, 8):
        sheet.draw(drawn)
    (tmp_path / "samples/mine").mkdir()
    (tmp_path / "samples/20240115").mkdir()
    (tmp_path / "samples/20240115/beach.png").touch()
    samples(step=step)
    assert len(list((tmp_path / "samples").iterdir())) == 5
    remove_samples(tmp_path, step)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [*left, "20240115", "mine"]
    assert (tmp_path / "samples/20240115/beach.png").exists()


def test_other_processes_draw_nothing(samples, tmp_path):
    samples(is_main=False).draw(0)
    assert samples.drawn == []
    assert not (tmp_path / "samples").exists()


def test_the_sheet_has_a_row_a_step_and_a_column_a_prompt(tmp_path, monkeypatch):
    made = []

    def sheet(rows, **labels):
        made.append(([[picture.mode for picture in row] for row in rows], labels))
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(sheets, "contact_sheet", sheet)
    run = SimpleNamespace(folder=tmp_path, is_main=True, step=0, show=lambda *_: None)
    shown = []
    run.show = lambda step, images, captions: shown.append((step, len(images), captions))
    drawn = sheets.Samples(run, ("a", "b"), 5, lambda prompts, seeds: [Image.new("L", (4, 4))] * 2)
    drawn.draw(0)
    drawn.draw(60)
    assert shown == [(0, 2, ["a", "b"]), (60, 2, ["a", "b"])]
    labels = {"row_labels": ["step 0", "step 60"], "column_labels": ["a", "b"]}
    assert made[1] == ([["RGB", "RGB"], ["RGB", "RGB"]], labels)
    assert (tmp_path / "samples.png").is_file()


def test_samples_are_drawn_by_the_base_in_evaluation(tmp_path, monkeypatch):
    from sfumato.generation import draw as drawing

    layer, given = nn.Linear(1, 1), []

    def draw(base, prompts, seeds, **size):
        given.append((base, prompts, seeds, layer.training))
        return [Image.new("RGB", (4, 4), "red")]

    monkeypatch.setattr(drawing, "draw_each", draw)
    run = SimpleNamespace(folder=tmp_path, is_main=True, step=0, show=lambda *_: None)
    base = SimpleNamespace(lazy_weights=SimpleNamespace(restored_after=nullcontext))
    Samples(run, ["a"], 5, make_sampler(base), modules=[layer]).draw(0)
    assert given == [(base, ["a"], [5], False)]
    assert layer.training


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
    again = f'accelerate launch --num_processes 2 -m sfumato resume "{tmp_path / "my run"}"'
    assert f"stopped after step 1 of 5, saved. Go on with: {again}\n" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 39, 40, 41, 79, 80, 1000])
def test_a_sheet_of_many_steps_shows_the_first_the_last_and_some_between(count):
    steps = list(range(0, 10 * count, 10))
    shown = sheets.thin_steps(steps, 40)
    assert (shown[0], shown[-1]) == (steps[0], steps[-1])
    assert shown == sorted(set(shown))
    assert (shown == steps) == (count <= 40)
    assert 20 < len(shown) <= 40 or count <= 40


def test_pictures_of_steps_that_the_sheet_leaves_out_are_not_read(tmp_path, monkeypatch):
    run = SimpleNamespace(folder=tmp_path, is_main=True, count=1, show=lambda *_: None)
    drawn = sheets.Samples(run, ["a"], 5, lambda prompts, seeds: [Image.new("RGB", (4, 4))])
    for step in range(100):
        folder = tmp_path / f"samples/{step:06d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "0.png")
    read, real = [], plot.read_image_or_none
    monkeypatch.setattr(plot, "read_image_or_none", lambda path: read.append(path) or real(path))
    drawn.draw(100)
    assert len(read) <= sheets.MOST_ROWS
    assert [path.parent.name for path in read[::33]] == ["000000", "000099"]
