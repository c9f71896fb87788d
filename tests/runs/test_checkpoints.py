"""A checkpoint exists whole or not at all: whatever is killed, full, forbidden or tampered with."""

import errno
import json
import os
import pickle
import shutil
import sys
from contextlib import suppress

import pytest
import torch

from bench.runs_kill import measure
from sfumato.errors import RunError
from sfumato.runs import checkpoints
from sfumato.runs.checkpoints import Checkpoints, flatten_state, unflatten_state
from tests.runs.faults import CALLS, ERRORS, failing
from tests.runs.said import ONE, problem
from tests.runs.small import Config, train

STATE = {"weights": torch.arange(6.0).view(2, 3), "count": 3, "more": [{"a": torch.ones(2)}, (1, None, "x", True)]}


def flat(tree):
    """A tree without its tensors' identity, to be compared."""
    if isinstance(tree, torch.Tensor):
        return (str(tree.dtype), tree.tolist())
    if isinstance(tree, dict):
        return {key: flat(value) for key, value in tree.items()}
    return type(tree)(flat(value) for value in tree) if isinstance(tree, list | tuple) else tree


@pytest.mark.parametrize(
    "tree",
    [
        STATE,
        {},
        [],
        (),
        None,
        {1: torch.ones(1), "1": torch.zeros(1)},
        {"empty": torch.empty(0, 4), "scalar": torch.tensor(2), "truth": torch.tensor([True])},
        {"half": torch.ones(3, dtype=torch.bfloat16), "ints": torch.tensor([2**40])},
        {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        {"betas": (0.9, 0.99), "nested": [[[1.5]]], "nothing": None},
    ],
    ids=str,
)
def test_a_state_comes_back_as_it_was(tree, tmp_path):
    tensors, rest = flatten_state(tree)
    assert flat(unflatten_state(tensors, json.loads(json.dumps(rest)))) == flat(tree)
    store = Checkpoints(tmp_path)
    store.save(7, tree)
    assert flat(store.load(7)) == flat(tree)


def test_what_neither_format_can_hold_is_named():
    with pytest.raises(RunError, match="/a/1 is a set"):
        flatten_state({"a": [0, {1, 2}]})


def test_at_least_two_valid_ones_stay(tmp_path):
    store = Checkpoints(tmp_path, keep=1)
    for step in range(1, 6):
        store.save(step, STATE)
    assert store.steps() == [4, 5]
    (tmp_path / "000005/state.json").write_text("")
    store.save(6, STATE)
    assert store.steps() == [4, 5, 6]  # 5 is broken, so that 4 is needed still
    store.save(7, STATE)
    assert store.steps() == [6, 7]


@pytest.mark.parametrize("name", ["checkpoint-foo", "12", "0000012", "²00012", "000012.txt", ".000012.9.part"])
def test_what_is_called_otherwise_is_left_alone(name, tmp_path):
    (tmp_path / name).mkdir()
    store = Checkpoints(tmp_path)
    assert store.newest() == (None, [])
    store.save(3, STATE)
    assert store.newest() == (3, [])
    assert (tmp_path / name).exists() is not name.endswith(".part")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda place: (place / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda place: (place / "manifest.json").write_text("{"), "its manifest is broken"),
        (lambda place: (place / "manifest.json").write_text("[" * 100_000), "its manifest is broken"),
        (lambda place: (place / "manifest.json").write_text('{"format": 2, "step": 5}'), "of format 2"),
        (lambda place: (place / "manifest.json").write_text('{"format": 1, "step": 5, "files": {}}'), "is broken"),
        (lambda place: (place / "state.json").unlink(), "state.json is missing"),
        (lambda place: (place / "state.safetensors").write_bytes(b""), "state.safetensors has 0 bytes"),
        (lambda place: shutil.copy(place.parent / "000004/manifest.json", place), "step 4"),
        (
            lambda place: (place / "manifest.json").write_text(
                '{"format": 1, "step": 5, "files": {"state.json": {"bytes": 1, "sha256": ""}, "../../x": {}}}'
            ),
            "bytes",
        ),
        (
            lambda place: (place / "manifest.json").write_text(
                '{"format": 1, "step": 5, "files": {"../../x": {}, "state.json": {}}}'
            ),
            "names '../../x'",
        ),
    ],
)
def test_a_damaged_one_is_passed_over_and_said(damage, said, tmp_path):
    store = Checkpoints(tmp_path)
    store.save(4, STATE)
    store.save(5, STATE)
    damage(store.path(5))
    step, passed = store.newest()
    assert step == 4
    assert len(passed) == 1
    assert said in passed[0]
    assert flat(store.load(4)) == flat(STATE)


@pytest.mark.parametrize(
    "content",
    [
        '{"state": {"tensor": "nowhere"}, "tensors": ["a"]}',
        '{"state": {"empty": [[1125899906842624], "float32"]}, "tensors": []}',
        '{"state": {"empty": [[0], "Tensor"]}, "tensors": []}',
        '{"state": {"strange": 1, "two": 2}, "tensors": []}',
        '{"state": {"dict": [1]}, "tensors": []}',
        '{"state": ' + '{"list": [' * 5000 + "]}" * 5000 + ', "tensors": []}',
        "[]",
    ],
)
def test_one_that_was_made_up_is_refused_in_a_line(content, tmp_path):
    store = Checkpoints(tmp_path)
    store.save(4, STATE)
    (tmp_path / "000004/state.json").write_text(content)
    with pytest.raises(RunError, match="cannot be read"):
        store.load(4)


def test_a_canary_in_any_file_of_a_checkpoint_is_never_run(tmp_path):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sang"),)

    config = Config(output=tmp_path / "run", checkpoint_every=5)
    train(config)
    places = [f"checkpoints/000010/{name}" for name in ("state.safetensors", "state.json", "manifest.json")]
    for place in [*places, "config.toml", "run.json", "log.jsonl", ".holder.json"]:
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        (tmp_path / "again" / place).write_bytes(pickle.dumps(Canary()))
        with suppress(RunError):
            train(Config(output=tmp_path / "again", checkpoint_every=5, resume=True, name="run"))
        shutil.rmtree(tmp_path / "again")
    assert not (tmp_path / "sang").exists()


def test_a_checkpoint_is_made_with_all_folders_above_it(tmp_path):
    assert Checkpoints(tmp_path / "a/b/c").save(1, ONE) == tmp_path / "a/b/c/000001"


def test_only_as_many_are_read_again_as_stay(tmp_path, monkeypatch):
    """The one that was written has just been verified."""
    store = Checkpoints(tmp_path, keep=2)
    store.save(1, ONE)
    store.save(2, ONE)
    read = []
    real = Checkpoints.problem
    monkeypatch.setattr(Checkpoints, "problem", lambda store, step: read.append(step) or real(store, step))
    store.save(3, ONE)
    assert read == []
    assert store.steps() == [2, 3]


def test_of_those_of_an_earlier_process_each_is_read_once_and_what_was_touched_again(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        Checkpoints(tmp_path, keep=9).save(step, ONE)
    store, read = Checkpoints(tmp_path, keep=3), []
    real = Checkpoints.problem
    monkeypatch.setattr(Checkpoints, "problem", lambda store, step: read.append(step) or real(store, step))
    store.save(4, ONE)
    assert read == [3, 2]
    assert store.steps() == [2, 3, 4]
    (tmp_path / "000004/state.json").write_text("")
    store.save(5, ONE)
    assert read == [3, 2, 4]
    assert store.steps() == [2, 3, 4, 5]


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


# The disk


def problem_of_saving(store, step):
    """What a save says; empty if it was saved."""
    try:
        store.save(step, STATE)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_a_save_fails_in_turn_and_the_earlier_one_stays(call, tmp_path, monkeypatch):
    """Each open, write, fsync, rename and mkdir with each error, and each write that falls short in silence."""
    store = Checkpoints(tmp_path)
    store.save(1, STATE)
    failures = 0
    for code in ERRORS if call != "short" else ERRORS[:1]:
        for at in range(100):
            shutil.rmtree(store.path(2), ignore_errors=True)
            with failing(monkeypatch, tmp_path, call, at, code) as faults:
                said = problem_of_saving(store, 2)
            written = not said
            failures += not written
            if said:
                assert said.startswith("the checkpoint of step 2 could not be written: ")
                assert call == "short" or os.strerror(code) in said
                assert len(said.splitlines()) == 1
            assert store.problem(1) is None
            assert flat(store.load(1)) == flat(STATE)
            # Where bringing the rename to the disk fails, the new one is there, whole, and not promised.
            assert store.newest()[0] in ((2,) if written else (1, 2) if call == "fsync" else (1,)), at
            assert not any(tmp_path.glob(".*"))
            for step in store.steps():
                assert store.problem(step) is None
                store.load(step)
            if faults.count <= at:
                assert written
                break
        else:
            pytest.fail("never came to an end")
    assert failures >= {"open": 9, "write": 9, "fsync": 9, "rename": 6, "mkdir": 3, "short": 3}[call]


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


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
def test_a_training_goes_on_over_a_full_disk_and_says_so(call, tmp_path, monkeypatch, capsys):
    whole = train(Config(output=tmp_path / "whole", checkpoint_every=2, name="m"))
    at = {"rename": 2, "open": 4, "fsync": 8, "write": 8}[call]  # past what the first checkpoint takes
    with failing(monkeypatch, tmp_path / "run/checkpoints", call, at, 28) as faults:
        path = train(Config(output=tmp_path / "run", checkpoint_every=2, name="m"))
    assert faults.count > faults.at
    said = capsys.readouterr().err
    assert "the checkpoint of step 2 could not be written: " in said
    assert "No space left on device" in said
    assert "That of step 0 is whole. The training goes on." in said
    assert path.read_bytes() == whole.read_bytes()


def test_the_first_checkpoint_that_cannot_be_written_stops_the_training(tmp_path, monkeypatch):
    with (
        failing(monkeypatch, tmp_path / "run/checkpoints", "fsync", 0, 28),
        pytest.raises(RunError, match=r"No space left.* stops before it could lose anything"),
    ):
        train(Config(output=tmp_path / "run", checkpoint_every=2))


def test_a_log_that_cannot_be_written_waits_and_loses_nothing(tmp_path, monkeypatch, capsys):
    """Forty steps, a flush every ten rows: the second fails, the third brings its rows, too."""
    settings = {"steps": 40, "checkpoint_every": 0}
    train(Config(output=tmp_path / "whole", **settings))
    with failing(monkeypatch, tmp_path / "run/log.jsonl", "write", 1, 28) as faults:
        train(Config(output=tmp_path / "run", **settings))
    assert faults.count > 1
    assert "log.jsonl cannot be written (No space left on device)" in capsys.readouterr().err
    assert (tmp_path / "run/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()


def test_space_is_looked_at_before_the_start_and_before_each_save(tmp_path, monkeypatch, capsys):
    class Usage:
        free = 10**6

    real = shutil.disk_usage
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(RunError, match=r"no space: \d+ MiB are needed and 1 MiB are free"):
        train(Config(output=tmp_path / "run", checkpoint_every=2))
    assert not (tmp_path / "run").exists()
    calls = []

    def later(folder):
        calls.append(folder)
        return Usage if len(calls) == 4 else real(folder)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", later)
    train(Config(output=tmp_path / "run", checkpoint_every=2))
    assert "the checkpoint of step 4 could not be written: no space" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_at_random_moments_while_saving_nothing_is_lost(tmp_path):
    """Three times here; `python bench/runs_kill.py --kills 200` for the figure."""
    found = measure(3, tmp_path / "checkpoints", seed=1)
    assert (found["checkpoints_lost"], found["broken_picked"], found["resumes"]) == (0, 0, 3)


def test_nothing_is_pruned_before_two_are_whole(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1, {"a": torch.ones(1)})
    (tmp_path / "000001/state.json").write_text("")
    store.save(2, {"a": torch.ones(1)})
    assert store.steps() == [1, 2]
