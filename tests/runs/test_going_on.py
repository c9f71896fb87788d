"""What a run does around its steps: space, checkpoints, starting anew, going on, letting go."""

import errno
import json
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sfumato.errors import RunError
from sfumato.runs import checkpoints, recovery
from sfumato.runs.checkpoints import Checkpoints, bytes_of, flatten_state, unflatten_state
from sfumato.runs.recovery import DivergenceGuard
from sfumato.runs.run import Run, Step
from sfumato.training.options import RunOptions
from sfumato.utils import atomic
from sfumato.utils.atomic import SPARE_BYTES, require_disk_space, temporary_sibling
from tests.logged import log_in
from tests.runs.said import ONE, problem, start
from tests.runs.small import Config, train

# Space


def test_the_reserve_is_beside_what_is_needed(monkeypatch, tmp_path):
    free = SimpleNamespace(free=SPARE_BYTES + 1000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: free)
    require_disk_space(tmp_path, 1000)
    with pytest.raises(OSError, match="no space"):
        require_disk_space(tmp_path, 1001)


def test_too_little_room_is_said_in_mib(tmp_path, monkeypatch):
    free = SimpleNamespace(free=SPARE_BYTES - 2**20)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: free if folder == tmp_path else None)
    with pytest.raises(OSError, match="no space") as ended:
        require_disk_space(tmp_path, 3 * 2**20)
    assert ended.value.errno == errno.ENOSPC
    assert ended.value.strerror == f"no space: 67 MiB are needed and 63 MiB are free on the disk of {tmp_path}"


def test_room_is_asked_for_in_the_folder_and_for_the_state(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoints, "require_disk_space", lambda *given: asked.append(given))
    Checkpoints(tmp_path / "c").save(1, ONE)
    assert asked == [(tmp_path / "c", bytes_of(ONE))]


@pytest.mark.parametrize("count", [1, 60])
def test_the_room_is_what_is_taken(count, tmp_path):
    state = {"optimizer": {number: {"exp_avg": torch.ones(200), "step": 5} for number in range(count)}}
    place = Checkpoints(tmp_path).save(1, state)
    taken = sum(file.stat().st_size for file in place.iterdir())
    assert 0.75 * taken < bytes_of(state) < 1.25 * taken


def test_before_the_start_there_is_room_for_all_that_stay_one_more_and_the_moments(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(recovery, "require_disk_space", lambda folder, needed: asked.append(needed))
    run = start(tmp_path, keep=3, checkpoint_every=2)
    layer = nn.Linear(64, 64)
    run.keep(layer=layer, optimizer=torch.optim.AdamW(layer.parameters()))
    state = bytes_of(run._recovery.state()) + 2 * sum(p.nbytes for p in layer.parameters())
    for step in run.steps(1):
        step.done(loss=1.0)
    assert asked == [4 * state]
    run.close()


def test_before_going_on_there_is_room_for_one_more_if_there_is_a_step_left(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(recovery, "require_disk_space", lambda *given: asked.append(given))
    for steps, resume in ((3, False), (4, True), (4, True)):
        run = start(tmp_path, checkpoint_every=1, resume=resume)
        for step in run.steps(steps):
            step.done(loss=1.0)
        run.close()
    size = bytes_of(run._recovery.state())
    assert asked == [(tmp_path / "run", 3 * size), (tmp_path / "run", size)]


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(tmp_path):
    run = start(tmp_path, checkpoint_every=1)
    for step in run.steps(1):
        step.done(loss=1.0)
    run.close()
    names = ("m.safetensors", "images/a.png", "samples/000001/0.png")
    ours = [temporary_sibling(tmp_path / "run" / name, name[name.index(".") :]) for name in names]
    theirs = tmp_path / "run/.mine.part.png"
    for path in (*ours, theirs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    temporary_sibling(tmp_path / "run/model").mkdir()  # what dreambooth writes is a folder
    start(tmp_path, resume=True).close()
    assert [path.name for path in (tmp_path / "run").rglob(".*.part*")] == [theirs.name]


# Checkpoints


def test_the_folders_of_a_checkpoint_are_brought_to_the_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    seen = []
    real = atomic.fsync_path
    for room in (atomic, checkpoints):
        monkeypatch.setattr(room, "fsync_path", lambda path: seen.append(path) or real(path))
    store = Checkpoints(tmp_path / "c")
    store.save(1, {"a": torch.ones(1)})
    *files, folder, parent = seen
    assert {path.name for path in files} == {"state.json", "state.safetensors", "manifest.json"}
    assert (folder.suffix, parent) == (".part", store.folder)


def test_what_is_dropped_is_all_that_is_later(tmp_path):
    store = Checkpoints(tmp_path, keep=9)
    for step in range(1, 5):
        store.save(step, {"a": torch.ones(1)})
    store.drop_after(2)
    assert store.steps() == [1, 2]
    store.drop_after(-1)
    assert store.steps() == []


def test_what_is_no_checkpoint_is_not_removed_behind_a_link(tmp_path):
    """As in a run folder from somewhere else, whose link leads to the photographs of each day."""
    (tmp_path / "photographs/20240115").mkdir(parents=True)
    (tmp_path / "photographs/20240115/beach.jpg").touch()
    (tmp_path / "photographs/000000").mkdir()
    (tmp_path / "photographs/000000/cat.jpg").touch()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "photographs")
    store = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2, 3, 4):
        store.save(step, {"a": torch.ones(1)})
    store.drop_after(3)
    assert store.steps() == [0, 3, 20240115]
    assert {path.name for path in (tmp_path / "photographs").rglob("*.jpg")} == {"beach.jpg", "cat.jpg"}


def test_what_is_unpacked_is_a_copy():
    tensors, rest = flatten_state({"a": torch.ones(2)})
    again = unflatten_state(tensors, rest)
    again["a"].zero_()
    assert tensors["/a"].tolist() == [1, 1]


def test_the_log_is_on_the_disk_up_to_each_checkpoint(tmp_path):
    run = start(tmp_path, checkpoint_every=3)
    for step in run.steps(5):
        if step.number == 3:
            lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
        step.done(loss=1.0)
    run.close()


def test_a_state_that_is_there_is_not_written_twice(tmp_path, monkeypatch):
    config = Config(output=tmp_path / "run", checkpoint_every=100, steps=3)
    train(config)
    Checkpoints(tmp_path / "run/checkpoints").drop_after(0)
    saved = []
    real = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda store, step, state: saved.append(step) or real(store, step, state))
    train(replace(config, resume=True))
    assert saved == [3]


def test_each_step_may_be_a_checkpoint_and_the_last_always_is(tmp_path):
    for every, steps in ((1, [0, 1, 2, 3]), (2, [0, 2, 3]), (0, [3]), (None, [3])):
        run = Run.start(RunOptions(output=tmp_path / str(every), checkpoint_every=every, keep=9), program="test")
        for step in run.steps(3):
            step.done(loss=1.0)
        run.close()
        assert Checkpoints(tmp_path / str(every) / "checkpoints").steps() == steps


# Starting anew, and going on


def test_replacing_a_run_forgets_its_checkpoints_and_its_log(tmp_path):
    config = Config(output=tmp_path / "run", checkpoint_every=4)
    train(config)
    run = Run.start(replace(config, overwrite=True, checkpoint_every=0), program="small")
    assert run.rows() == []
    next(run.steps(1))
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == []
    assert run.rows() == []
    run.close()


def test_a_run_that_goes_on_from_further_back_forgets_what_came_later(tmp_path):
    config = Config(output=tmp_path / "run", checkpoint_every=2, keep=9)
    train(config)
    (tmp_path / "run/checkpoints/000010/state.json").write_text("")
    seen = []
    train(replace(config, resume=True), before=lambda step, model: seen.append(step.run._recovery.checkpoints.steps()))
    assert seen[0] == [0, 2, 4, 6, 8]


def test_a_run_that_has_gone_back_once_remembers_it_when_it_goes_on(tmp_path):
    """Half the rate, and no second way back."""
    config = Config(output=tmp_path / "run", checkpoint_every=4, steps=14)
    broken = [1, 1, 1]

    def stop(step, model):
        if step.number == 8 and step.rate_factor < 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(config, before=stop, loss_of=lambda n: math.nan if n >= 5 and broken and broken.pop() else 1.0)
    with pytest.raises(RunError, match="also with half the learning rate"):
        train(replace(config, resume=True), loss_of=lambda n: math.nan)
    rates = []
    train(replace(config, resume=True), before=lambda step, model: rates.append(step.rate_factor))
    assert set(rates) == {0.5}


def test_where_no_checkpoint_is_whole(tmp_path):
    train(Config(output=tmp_path / "run", steps=2, checkpoint_every=1))
    for step in (1, 2):
        (tmp_path / f"run/checkpoints/00000{step}/state.json").write_text("")
    size = json.loads((tmp_path / "run/checkpoints/000002/manifest.json").read_text())["files"]["state.json"]["bytes"]
    assert problem(lambda: train(Config(output=tmp_path / "run", steps=2, checkpoint_every=1, resume=True))) == (
        f"no checkpoint in {tmp_path / 'run'} is whole: {tmp_path / 'run/checkpoints/000002'} was passed over: "
        f"state.json has 0 bytes, {size:,} were written. Bring one back from a copy, or begin anew with --overwrite."
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


@pytest.mark.parametrize("change", [{"kept": 1.0}, {"rate_factor": []}, {"bad": None}])
def test_a_checkpoint_that_is_whole_and_of_no_training(change, tmp_path):
    run = start(tmp_path, checkpoint_every=1)
    run.keep(a=nn.Linear(1, 1))
    list(run.steps(1))
    run.close()
    store = Checkpoints(tmp_path / "run/checkpoints")
    store.save(1, store.load(1) | change)
    run = start(tmp_path, checkpoint_every=1, resume=True)
    run.keep(a=nn.Linear(1, 1))
    assert problem(lambda: list(run.steps(2))) == (
        "the checkpoint of step 1 is no training's; remove it, then resume from an earlier one."
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
        f"the checkpoint of step 1 does not fit: part: {('no ' * 300)[:200]}. Resume with the settings, the program "
        "and the version that wrote it."
    )


def test_a_weight_decay_that_was_changed_by_force_counts(tmp_path):
    """Rates are set at each step; all else of the optimizer is what it was."""
    decays = []
    for decay, resume in ((0.1, False), (0.5, True)):
        layer = nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3 / decay, betas=(0.9, decay), weight_decay=decay)
        run = start(tmp_path, checkpoint_every=1, resume=resume)
        run.keep(optimizer=optimizer)
        for step in run.steps(1 if not resume else 2):
            decays.append(optimizer.param_groups[0])
            step.done(loss=1.0)
        run.close()
    assert decays[1]["weight_decay"] == 0.5
    assert decays[1]["betas"] == (0.9, 0.1)


def test_a_run_of_other_data_lets_the_folder_go_at_once(tmp_path):
    config = Config(output=tmp_path / "run", checkpoint_every=5)
    train(config)
    run = Run.start(replace(config, resume=True), program="small")
    with pytest.raises(RunError, match="data numbers -> others"):
        run.identify(data="others")
    assert not run._claim.is_held


def test_the_main_process_changes_nothing_before_all_have_looked(tmp_path):
    class Several:
        is_main, count, met = True, 2, 0

        def wait(self):
            self.met += 1
            assert not (tmp_path / "run/run.json").exists()

    processes = Several()
    run = Run.start(RunOptions(output=tmp_path / "run"), program="test", processes=processes)
    assert processes.met == 1
    assert (tmp_path / "run/run.json").exists()
    run.close()


# Health


def test_forgetting_begins_to_count_anew():
    health = DivergenceGuard()
    for number in range(3):
        health.check(number, {"loss": math.nan})
    assert health.reset() == "step 3: loss not finite, in 3 steps in a row"
    assert (health.bad, health.broken) == ([], "")


@pytest.mark.parametrize(
    ("scale", "numbers", "healthy"),
    [
        (65536.0, {"gradient_norm": math.inf}, True),
        (1.0, {"gradient_norm": math.inf}, True),
        (0.5, {"gradient_norm": math.inf}, False),
        (65536.0, {"loss": math.nan, "gradient_norm": 1.0}, False),
        (None, {"gradient_norm": math.inf}, False),
    ],
)
def test_gradients_that_overflow_are_the_scaler_s_until_it_has_nothing_to_lower(scale, numbers, healthy):
    """scale None: a scaler that is switched off, as in fp32."""
    scaler = SimpleNamespace(is_enabled=lambda: scale is not None, get_scale=lambda: scale or 1.0)
    run = SimpleNamespace(check_numbers=lambda number, named: all(math.isfinite(value) for value in named.values()))
    step = Step(0, 1.0, run)
    assert step.healthy(scaler, **numbers) is healthy
    assert step.skipped is not healthy


# What was seen at step 0


def seen(run):
    return [row["step"] for row in log_in(run) if "weight" in row]


def test_a_run_that_goes_on_from_step_0_looks_at_it_once(tmp_path):
    config = Config(output=tmp_path / "run", steps=3, measure_every=1, checkpoint_every=100)

    def stop(step, model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, after=stop)
    (tmp_path / "run/samples/000000").mkdir(parents=True)
    train(replace(config, resume=True))
    assert seen(tmp_path / "run") == [0, 1, 2, 3]
    assert not (tmp_path / "run/samples/000000").exists()  # the look at step 0 draws it again


def test_a_run_that_goes_back_to_step_0_keeps_what_was_seen_there(tmp_path):
    (tmp_path / "run/samples/000000").mkdir(parents=True)
    (tmp_path / "run/run.json").write_text("{}")
    broken = []

    def loss_of(number):
        broken.append(number)
        return math.nan if len(broken) in (2, 3, 4) else 1.0

    def draw(step, model):
        (tmp_path / f"run/samples/{step.number + 1:06d}").mkdir(exist_ok=True)

    def first(step, model):
        (tmp_path / "run/samples/000000").mkdir(parents=True, exist_ok=True)

    config = Config(output=tmp_path / "run", steps=6, measure_every=6, checkpoint_every=6)
    train(config, loss_of=loss_of, before=first, after=draw)
    assert seen(tmp_path / "run") == [0, 6]
    assert (tmp_path / "run/samples/000000").exists()


def test_a_run_that_is_ended_has_a_checkpoint_of_its_last_step(tmp_path):
    run = start(tmp_path, checkpoint_every=100)
    run.keep(model=nn.Linear(1, 1))
    made = []
    run.every(2, lambda step: run.end() if step == 4 else None)
    for step in run.steps(10):
        made.append(step.number)
    assert made == [0, 1, 2, 3]
    assert run.step == 4
    assert (tmp_path / "run/checkpoints/000004").is_dir()
    assert run._claim.is_held
    run.close()


@pytest.mark.parametrize("how", ["killed", "signalled"])
def test_who_is_stopped_while_looking_loses_no_step_and_looks_again(how, tmp_path, monkeypatch):
    """The checkpoint is written before the samples of its step, which may take longer than the steps themselves."""
    config = Config(output=tmp_path / "run", steps=6, measure_every=2, checkpoint_every=2)
    train(replace(config, output=tmp_path / "whole"))
    log = Run.log

    def stopped(run, **values):
        if values["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)  # a first one is remembered
            if how == "killed":
                raise KeyboardInterrupt
        log(run, **values)

    monkeypatch.setattr(Run, "log", stopped)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(config)
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == [2, 4]
    monkeypatch.setattr(Run, "log", log)
    train(replace(config, resume=True))
    assert seen(tmp_path / "run") == [0, 2, 4, 6]
    for name in ("log.jsonl", "run.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_signal_before_the_looks_saves_at_once_and_leaves_them_for_later(tmp_path):
    config = Config(output=tmp_path / "run", steps=6, measure_every=2, checkpoint_every=6)

    def stop(step, model):
        if step.number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        train(config, after=stop)
    assert seen(tmp_path / "run") == [0, 2]
    train(replace(config, resume=True))
    assert seen(tmp_path / "run") == [0, 2, 4, 6]


def test_what_is_drawn_again_after_going_further_back_counts_as_not_drawn(tmp_path, monkeypatch):
    config = Config(output=tmp_path / "run", steps=8, measure_every=4, checkpoint_every=3)
    log, kills = Run.log, []

    def killed(run, **values):
        if values["step"] == 4 and kills.append(0) is None and len(kills) == 2:
            raise KeyboardInterrupt
        log(run, **values)

    def stop(step, model):
        if step.number == 4 and len(kills) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, after=stop)  # after what was seen at step 4
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, resume=True, checkpoint_every=1))  # from step 3, killed while it looks at step 4
    train(replace(config, resume=True))
    assert seen(tmp_path / "run") == [0, 4, 8]


def test_fewer_steps_than_were_made_are_refused_and_leave_the_run_as_it_is(tmp_path):
    config = Config(output=tmp_path / "run", steps=3, checkpoint_every=1)
    made = train(config).read_bytes()
    toml = (tmp_path / "run/config.toml").read_bytes()
    going_on = replace(config, resume=True, force=True)
    assert problem(lambda: train(replace(going_on, steps=2))) == (
        f"{tmp_path / 'run'} has made 3 steps, and --steps is 2; give at least 3, or train anew with --overwrite."
    )
    assert (tmp_path / "run/config.toml").read_bytes() == toml
    assert train(replace(going_on, steps=3)).read_bytes() == made
    assert train(replace(going_on, steps=4)).read_bytes() != made
