"""The lines that a run says, to the letter; and what it hands to the bar, the board and the sheet."""

import errno
import io
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import sfumato
from sfumato import runs
from sfumato.errors import RunError
from sfumato.options import FolderOptions, RunOptions
from sfumato.runs import Run, checkpoints, identity, lock, progress
from sfumato.runs import log as logs
from sfumato.runs import samples as sheets
from sfumato.runs.checkpoints import SPARE_BYTES, Checkpoints, bytes_of, require_space
from sfumato.runs.folder import going_on
from sfumato.runs.lock import Lock
from sfumato.runs.log import Log
from sfumato.runs.progress import Progress
from sfumato.runs.signals import Stop
from sfumato.runs.state import pack, unpack
from tests.runs.faults import failing
from tests.runs.small import Config, train

ONE = {"a": torch.ones(3)}


def start(tmp_path, processes=None, **options):
    return Run.start(RunOptions(output=tmp_path / "run", **options), program="test", processes=processes)


def problem(work):
    """The line that the work ends with."""
    with pytest.raises(RunError) as ended:
        work()
    return str(ended.value)


def lines(capsys):
    """What was said, without the bar."""
    return [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip() and "step/s" not in line]


class Processes:
    """Two of them, of which this one is the main one or not; the numbers that were compared are kept."""

    count = 2

    def __init__(self, *, main, others=0):
        self.is_main, self.others, self.asked = main, others, []

    def wait(self):
        pass

    def largest(self, number):
        self.asked.append(number)
        return max(number, self.others)


# Checkpoints


def test_a_checkpoint_is_made_with_all_folders_above_it(tmp_path):
    assert Checkpoints(tmp_path / "a/b/c").save(1, ONE) == tmp_path / "a/b/c/000001"


def test_room_is_asked_for_in_the_folder_and_for_the_state(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoints, "require_space", lambda *given: asked.append(given))
    Checkpoints(tmp_path / "c").save(1, ONE)
    assert asked == [(tmp_path / "c", bytes_of(ONE))]


@pytest.mark.parametrize("count", [1, 60])
def test_the_room_is_what_is_taken(count, tmp_path):
    state = {"optimizer": {number: {"exp_avg": torch.ones(200), "step": 5} for number in range(count)}}
    place = Checkpoints(tmp_path).save(1, state)
    taken = sum(file.stat().st_size for file in place.iterdir())
    assert 0.75 * taken < bytes_of(state) < 1.25 * taken


def test_too_little_room_is_said_in_mib(tmp_path, monkeypatch):
    free = SimpleNamespace(free=SPARE_BYTES - 2**20)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: free if folder == tmp_path else None)
    with pytest.raises(OSError, match="no space") as ended:
        require_space(tmp_path, 3 * 2**20)
    assert ended.value.errno == errno.ENOSPC
    assert ended.value.strerror == f"no space: 67 MiB are needed and 63 MiB are free on the disk of {tmp_path}"


def test_why_a_checkpoint_could_not_be_written(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    size = (store.save(1, ONE) / "state.json").stat().st_size
    with failing(monkeypatch, tmp_path, "short", 0):
        assert problem(lambda: store.save(2, ONE)) == (
            "the checkpoint of step 2 could not be written: it does not read back as written: "
            f"state.json has {size // 2} bytes, {size} were written"
        )
    with failing(monkeypatch, tmp_path, "write", 1, errno.ENOSPC):
        assert problem(lambda: store.save(2, ONE)) == (
            "the checkpoint of step 2 could not be written: state.safetensors: the file could not be written (No space "
            "left on device). Make room or name another folder; an earlier file of the name is untouched"
        )
    with failing(monkeypatch, tmp_path, "mkdir", 1, errno.EACCES):
        assert problem(lambda: store.save(2, ONE)) == "the checkpoint of step 2 could not be written: Permission denied"
    assert store.newest() == (1, [])


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_step_that_is_saved_anew_is_the_old_one_or_the_new_one(at, tmp_path, monkeypatch):
    """Whichever of the renames fails; the file inside has one of its own."""
    store = Checkpoints(tmp_path)
    store.save(1, ONE)
    store.save(2, {"a": torch.zeros(3)})
    with failing(monkeypatch, tmp_path, "rename", at) as faults:
        try:
            store.save(2, {"a": torch.full((3,), 2.0)})
            value = 2
        except RunError:
            value = 0
    assert (value == 2) is (faults.count <= at) is (at == 3)
    assert store.newest() == (2, [])
    assert store.load(2)["a"].tolist() == [value] * 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_cannot_be_removed_ends_no_save(tmp_path, monkeypatch):
    def stuck(path, ignore_errors=False):
        if ignore_errors is not True:
            raise OSError(errno.EACCES, "Permission denied")

    store = Checkpoints(tmp_path)
    (tmp_path / ".000001.9.part").mkdir()
    monkeypatch.setattr(checkpoints.shutil, "rmtree", stuck)
    for step in (1, 2, 3):
        store.save(step, ONE)
    assert store.steps() == [1, 2, 3]
    assert problem(lambda: store.drop_after(2)) == (
        f"{tmp_path / '000003'} is of another course of this run and cannot be removed (Permission denied); remove it, "
        "then resume."
    )


def test_only_as_many_are_read_again_as_stay(tmp_path, monkeypatch):
    """The one that was written has just been verified."""
    store = Checkpoints(tmp_path, keep=2)
    store.save(1, ONE)
    store.save(2, ONE)
    read = []
    real = Checkpoints.problem
    monkeypatch.setattr(Checkpoints, "problem", lambda store, step: read.append(step) or real(store, step))
    store.save(3, ONE)
    assert 3 not in read
    assert store.steps() == [2, 3]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "its manifest is broken"),
        ('{"format": 1, "step": 5, "files": {}}', "its manifest is broken"),
        ('{"format": 3, "step": 5}', "its manifest is of format 3 and step 5"),
        ('{"format": 1, "step": "' + "x" * 99 + '"}', f"its manifest is of format 1 and step '{'x' * 19}"),
    ],
)
def test_why_one_is_passed_over(content, said, tmp_path):
    store = Checkpoints(tmp_path)
    store.save(5, ONE)
    (tmp_path / "000005/manifest.json").write_text(content)
    assert store.newest() == (None, [f"{tmp_path / '000005'} was passed over: {said}."])


def test_a_changed_byte_and_a_lost_file_are_told_apart(tmp_path):
    store = Checkpoints(tmp_path)
    place = store.save(5, ONE)
    state = (place / "state.json").read_text()
    (place / "state.json").write_text(state.replace("a", "b"))
    assert store.problem(5) == "state.json has another sha256 than what was written"
    (place / "state.json").unlink()
    assert store.problem(5) == "state.json is missing"
    (place / "state.json").mkdir()
    assert store.problem(5) == "not readable (Is a directory)"


def test_a_made_up_state_says_what_is_wrong(tmp_path):
    place = Checkpoints(tmp_path).save(4, {})
    (place / "state.json").write_text('{"state": {"empty": [[2], "float32"]}, "tensors": []}')
    assert problem(lambda: Checkpoints(tmp_path).load(4)) == (
        f"{place} cannot be read (an empty tensor that is none). Remove it to resume from an earlier one."
    )


def test_tensors_are_named_by_their_path_and_all_else_is_json():
    tensors, rest = pack({"a": [torch.ones(1), (torch.zeros(2), 5)], 1: torch.ones(3), "1": torch.ones(4)})
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"/a/0": 1, "/a/1/0": 2, "/1": 3, "/1'": 4}
    inner = {"tuple": [{"tensor": "/a/1/0"}, 5]}
    listed = {"list": [{"tensor": "/a/0"}, inner]}
    assert rest == {"dict": [["a", listed], [1, {"tensor": "/1"}], ["1", {"tensor": "/1'"}]]}
    assert pack(torch.empty(0, 3, dtype=torch.float16)) == ({}, {"empty": [[0, 3], "float16"]})
    empty = unpack({}, {"empty": [[0, 3], "float16"]})
    assert (empty.shape, empty.dtype) == ((0, 3), torch.float16)


def test_a_state_that_is_none_is_named():
    assert problem(lambda: pack({1})) == "the state is a set, which a checkpoint cannot hold."
    assert problem(lambda: pack({"a": {1}})) == "/a is a set, which a checkpoint cannot hold."
    assert problem(lambda: pack({frozenset(): 1})) == "the state is a frozenset, which a checkpoint cannot hold."


# The run's folder


def test_a_folder_is_made_with_all_above_it(tmp_path):
    Run.start(RunOptions(output=tmp_path / "a/b/run"), program="test").close()
    assert (tmp_path / "a/b/run/config.toml").is_file()


def test_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file/run"
    assert problem(lambda: Run.start(RunOptions(output=place), program="test")) == (
        f"{place} cannot be written (Not a directory); give another --output."
    )
    assert problem(lambda: Run.start(RunOptions(output=tmp_path / "file"), program="test")) == (
        f"{tmp_path / 'file'} is a file; --output wants a folder of its own for the run."
    )


def test_what_the_folder_holds_decides(tmp_path):
    assert going_on(FolderOptions(output=tmp_path)) is False
    assert problem(lambda: going_on(FolderOptions(output=tmp_path, resume=True))) == (
        f"there is no run to resume in {tmp_path}; without --resume one begins there."
    )
    (tmp_path / "samples").mkdir()
    (tmp_path / f"{tmp_path.name}.safetensors").write_text("")
    assert problem(lambda: going_on(FolderOptions(output=tmp_path))) == (
        f"{tmp_path} holds samples, {tmp_path.name}.safetensors and no run; a run would write over that. Give an "
        "--output of its own."
    )
    (tmp_path / "run.json").write_text("{}")
    assert going_on(FolderOptions(output=tmp_path)) is False  # nothing to lose yet
    (tmp_path / "log.jsonl").write_text("1")
    assert problem(lambda: going_on(FolderOptions(output=tmp_path))) == (
        f"{tmp_path} holds a run already; --resume goes on with it, --overwrite replaces it, or give another --output."
    )
    assert going_on(FolderOptions(output=tmp_path, overwrite=True)) is False
    assert going_on(FolderOptions(output=tmp_path, resume=True)) is True


def test_the_facts_of_a_run(tmp_path):
    run = start(tmp_path)
    run.identify(data="d")
    run.close()
    text = (tmp_path / "run/run.json").read_text()
    found = json.loads(text)
    assert found["sfumato"] == sfumato.__version__
    assert found["torch"] == re.match(r"[\d.]+", torch.__version__)[0]
    assert list(found) == ["program", "data", "processes", "sfumato", "torch", "diffusers", "transformers"]
    assert text.startswith('{\n "program": "test",\n "data": "d",\n "processes": "1",\n ')
    assert text.endswith('"\n}\n')


def test_a_fact_that_cannot_be_written_stops_and_lets_the_folder_go(tmp_path, monkeypatch):
    run = start(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(identity, "write_facts", full)
    assert problem(lambda: run.identify(data="d")) == (
        f"{tmp_path / 'run'}: No space left on device. Make room, or give another --output."
    )
    assert not run._lock.is_held


def test_every_change_is_shown_and_with_force_said(tmp_path, capsys):
    config = Config(output=tmp_path / "run", steps=2)
    train(config)
    other = replace(config, resume=True, width=4, seed=1)
    assert problem(lambda: train(other)) == (
        f"{tmp_path / 'run'} was trained with another config: seed 0 -> 1; width 8 -> 4. Resume with the same, or with "
        "--force."
    )
    (tmp_path / "run/config.toml").unlink()
    assert problem(lambda: train(replace(config, resume=True))) == (
        f"{tmp_path / 'run'} was trained with another config: config.toml is missing or broken. Resume with the same, "
        "or with --force."
    )
    capsys.readouterr()
    train(replace(config, resume=True, force=True))
    assert lines(capsys)[:2] == [
        "changed by --force: config.toml is missing or broken",
        "resuming: there is no checkpoint yet, so from the beginning",
    ]
    assert [row["step"] for row in map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())] == [1, 2]


def test_an_unset_value_is_shown_as_that(tmp_path):
    config = Config(output=tmp_path / "run", steps=2)
    train(config)
    other = replace(config, resume=True, sample_prompts=("a\n" * 99,), name="n")
    assert problem(lambda: train(other)).startswith(
        f"{tmp_path / 'run'} was trained with another config: name unset -> n; sample_prompts [] -> ['a\\na\\n"
    )


def test_where_no_checkpoint_is_whole(tmp_path):
    train(Config(output=tmp_path / "run", steps=2, checkpoint_every=1))
    for step in (1, 2):
        (tmp_path / f"run/checkpoints/00000{step}/state.json").write_text("")
    size = json.loads((tmp_path / "run/checkpoints/000002/manifest.json").read_text())["files"]["state.json"]["bytes"]
    assert problem(lambda: train(Config(output=tmp_path / "run", steps=2, checkpoint_every=1, resume=True))) == (
        f"no checkpoint in {tmp_path / 'run'} is whole: {tmp_path / 'run/checkpoints/000002'} was passed over: "
        f"state.json has 0 bytes, {size:,} were written. Bring one back from a copy, or begin anew with --overwrite."
    )


def test_now_is_the_source_date_or_now(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "5")
    assert runs.now() == 5.0
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    monkeypatch.setattr("time.time", lambda: 7.5)
    assert runs.now() == 7.5


# The lock


def test_a_holder_signs_with_process_host_and_time(tmp_path):
    held = Lock(tmp_path)
    assert held.take() is None
    said = problem(Lock(tmp_path).take)
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))} is in use by process {os.getpid()} on "
        rf"{re.escape(socket.gethostname())} \(since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\)\. "
        r"Wait for it, or give another --output\.",
        said,
    )
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".holder.json"}
    held.release()
    held.release()


def test_a_holder_that_does_not_sign_and_one_that_signs_late(tmp_path, monkeypatch):
    held = Lock(tmp_path)
    held.take()
    signed = (tmp_path / ".holder.json").read_text()
    (tmp_path / ".holder.json").unlink()
    late = threading.Timer(0.1, lambda: (tmp_path / ".holder.json").write_text(signed))
    late.start()
    assert "is in use by process " in problem(Lock(tmp_path).take)
    late.join()
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.01)
    (tmp_path / ".holder.json").write_text("[1]")
    begun = time.monotonic()
    assert problem(Lock(tmp_path).take) == (
        f"{tmp_path} is in use by another process. Wait for it, or give another --output."
    )
    assert time.monotonic() - begun < 30
    held.release()


def test_a_holder_s_own_words_are_cut(tmp_path):
    (tmp_path / ".holder.json").write_text(json.dumps({"pid": "9" * 200}))
    taken = Lock(tmp_path)
    assert taken.take() == (
        f"process {'9' * 80} on ? (since ?) used this folder and ended without finishing; its lock is void."
    )
    taken.release()


# The loop


def test_a_first_signal_is_remembered_and_a_second_ends():
    with Stop(quiet=True) as stop:
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
    assert lines(capsys)[-1] == (f"stopped after step 1 of 3, saved. Go on with: sfumato resume {tmp_path / 'run'}")


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


def test_each_step_may_be_a_checkpoint_and_none_need_be(tmp_path):
    for every, steps in ((1, [0, 1, 2, 3]), (2, [0, 2, 3]), (0, []), (None, [])):
        run = Run.start(RunOptions(output=tmp_path / str(every), checkpoint_every=every, keep=9), program="test")
        for step in run.steps(3):
            step.done(loss=1.0)
        run.close()
        assert Checkpoints(tmp_path / str(every) / "checkpoints").steps() == steps


def test_before_going_on_there_is_room_for_one_more(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "require_space", lambda *given: asked.append(given))
    for resume in (False, True):
        run = start(tmp_path, checkpoint_every=1, resume=resume)
        for step in run.steps(3):
            step.done(loss=1.0)
        run.close()
    size = bytes_of(run._state())
    assert asked == [(tmp_path / "run", 3 * size), (tmp_path / "run", size)]


def test_every_look_has_its_own_time_and_its_own_trouble(tmp_path, capsys):
    seen = []

    def odd(step):
        if step:
            raise OSError("odd")

    run = start(tmp_path)
    run.every(3, odd)
    run.every(2, seen.append)
    run.every(0, seen.append)
    for step in run.steps(5):
        step.done(loss=1.0)
    run.close()
    assert seen == [0, 2, 4, 5]
    said = "no sample or measurement: odd. The training goes on."
    assert [line for line in lines(capsys) if "sample" in line] == [f"step 3: {said}", f"step 5: {said}"]


def test_a_first_look_that_fails_says_why(tmp_path):
    def full(step):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = start(tmp_path)
    run.every(3, full)
    assert problem(lambda: list(run.steps(3))) == ("the first samples or measurements failed: No space left on device")


def test_a_state_that_only_the_main_process_finds_broken_is_broken_for_all(tmp_path):
    layer = nn.Linear(2, 2)
    end = (
        ", so the training is broken. Lower --learning-rate, use another --precision, or look at the pictures; "
        f"{tmp_path / 'run/log.jsonl'} has the steps before."
    )
    other = Processes(main=False, others=1)
    run = start(tmp_path, other, checkpoint_every=1)
    assert problem(lambda: list(run.steps(3))) == f"the state of step 0 is not finite{end}"
    main = Processes(main=True)
    run = start(tmp_path, main, checkpoint_every=1)
    run.keep(layer=layer)
    layer.weight.data[0] = math.nan
    assert problem(lambda: list(run.steps(3))) == f"the state of step 0 is not finite (/kept/layer/weight){end}"
    assert main.asked == [1]


def test_after_the_second_time_the_diagnosis_says_so(tmp_path):
    config = Config(output=tmp_path / "run", checkpoint_every=4)
    assert problem(lambda: train(config, loss_of=lambda number: math.nan if number >= 5 else 1.0)) == (
        "step 8: loss, gradient_norm not finite, in 3 steps in a row, also with half the learning rate, so the "
        "training is broken. Lower --learning-rate, use another --precision, or look at the pictures; "
        f"{tmp_path / 'run/log.jsonl'} has the steps before."
    )


def test_a_checkpoint_of_another_program_s_parts(tmp_path):
    run = start(tmp_path, checkpoint_every=1)
    run.keep(a=nn.Linear(1, 1), b=nn.Linear(1, 1))
    list(run.steps(1))
    run.close()
    run = start(tmp_path, checkpoint_every=1, resume=True)
    run.keep(a=nn.Linear(1, 1), c=nn.Linear(1, 1))
    assert problem(lambda: list(run.steps(2))) == (
        "the checkpoint of step 1 has other parts than this training (b, c); resume it with the program that wrote it."
    )


def test_a_part_that_does_not_take_its_state(tmp_path):
    class Part:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise ValueError("no\n" * 300)

    run = start(tmp_path, checkpoint_every=1)
    run.keep(part=Part())
    list(run.steps(1))
    run.close()
    run = start(tmp_path, checkpoint_every=1, resume=True)
    run.keep(part=Part())
    assert problem(lambda: list(run.steps(2))) == (
        f"the checkpoint of step 1 does not fit: part: {('no ' * 300)[:200]}"
    )


def test_a_measurement_that_is_broken_is_said_with_its_step_if_there_is_one(tmp_path, capsys):
    run = start(tmp_path)
    run.log(step=3, fit=math.nan, drift=torch.tensor(math.inf))
    run.log(fit=math.nan)
    run.close()
    assert lines(capsys) == ["step 3: fit, drift not finite", "step ?: fit not finite"]


def test_the_whole_bar_of_a_run_that_is_shown(tmp_path, capsys):
    run = start(tmp_path)
    for step in run.steps(2):
        step.done(loss=torch.tensor(0.25, requires_grad=True))
    run.close()
    assert re.search(r"training: 100%.* 2/2 .*loss 0\.2500\]", capsys.readouterr().err)


# Log, bar and sheet


def test_the_board_gets_each_number_at_its_step(tmp_path, monkeypatch):
    given = []
    board = SimpleNamespace(add_scalar=lambda *row: given.append(row), flush=lambda: given.append("flushed"))
    monkeypatch.setattr(logs, "_board", lambda folder: board if folder == tmp_path else None)
    log = Log(tmp_path / "log.jsonl", tensorboard=True)
    log.add({"step": 3, "loss": torch.tensor(0.5), "rate": 0.1})
    log.close()
    assert sorted(map(str, given)) == ["('loss', 0.5, 3)", "('rate', 0.1, 3)", "flushed"]


def test_tensorboard_is_opened_beside_the_log_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda place: [place]))
    assert logs._board(tmp_path) == [str(tmp_path / "tensorboard")]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert problem(lambda: start(tmp_path, tensorboard=True)) == (
        "--tensorboard: the package is not installed; pip install 'sfumato[tensorboard]'."
    )
    start(tmp_path, Processes(main=False), tensorboard=True).close()


def test_rows_without_a_step_are_of_the_beginning(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for row in ({"note": 1}, {"step": 0, "a": 2}, {"step": 1, "a": 3}):
        log.add(row)
    log.cut(0)
    assert log.rows() == [{"note": 1}, {"step": 0, "a": 2}]


def test_what_is_no_row_ends_the_rows(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    assert log.rows() == [{"step": 1}]


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


def test_the_sheet_has_a_row_a_step_and_a_column_a_prompt(tmp_path, monkeypatch):
    made = []

    def sheet(rows, **labels):
        made.append(([[picture.mode for picture in row] for row in rows], labels))
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(sheets, "contact_sheet", sheet)
    run = SimpleNamespace(folder=tmp_path, is_main=True, step=0)
    drawn = sheets.Samples(run, None, ("a", "b"), 5, draw=lambda prompts, seeds: [Image.new("L", (4, 4))] * 2)
    drawn.draw(0)
    drawn.draw(60)
    labels = {"row_labels": ["step 0", "step 60"], "column_labels": ["a", "b"]}
    assert made[1] == ([["RGB", "RGB"], ["RGB", "RGB"]], labels)
    assert (tmp_path / "samples.png").is_file()


def test_samples_are_drawn_by_the_base_in_evaluation(tmp_path, monkeypatch):
    from sfumato import drawing

    layer, given = nn.Linear(1, 1), []

    def draw(base, prompts, seeds):
        given.append((base, prompts, seeds, layer.training))
        return [Image.new("RGB", (4, 4), "red")]

    monkeypatch.setattr(drawing, "draw", draw)
    run = SimpleNamespace(folder=tmp_path, is_main=True, step=0)
    base = SimpleNamespace(resting=SimpleNamespace(interrupted=nullcontext))
    sheets.Samples(run, base, ["a"], 5, modules=[layer]).draw(0)
    assert given == [(base, ["a"], [5], False)]
    assert layer.training


@pytest.mark.parametrize(
    ("template", "trigger", "prompts"),
    [
        (None, None, ["one", "two", "{}", "{}"]),
        (None, "zwx", ["one", "two", "{}, zwx", "{}, zwx"]),
        ("{caption} in {trigger}", "zwx", ["one", "two", "{} in zwx", "{} in zwx"]),
    ],
)
def test_samples_show_what_was_learned_and_what_was_not(template, trigger, prompts):
    from sfumato.measure import UNRELATED

    expected = [*prompts[:2], *(form.format(thing) for form, thing in zip(prompts[2:], UNRELATED, strict=False))]
    assert sheets.default_prompts(["one", "two", "three"], template, trigger) == expected
    assert sheets.default_prompts(["one", "one", "three"], template, trigger) == [expected[0], *expected[2:]]


def test_the_file_that_a_name_will_have_is_looked_at(tmp_path):
    (tmp_path / "n.safetensors").write_text("")
    assert going_on(RunOptions(output=tmp_path)) is False
    assert "holds n.safetensors and no run" in problem(lambda: going_on(RunOptions(output=tmp_path, name="n")))
