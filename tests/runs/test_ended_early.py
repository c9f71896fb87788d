"""A run that was stopped and is ended there: no more steps, and what is learned so far is written."""

import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from sfumato.trainers import lora

from bench.runs_resume import CASES, command, make_inputs, run
from sfumato import cli
from sfumato.files import read_header, read_tensors
from sfumato.runs.checkpoints import Checkpoints
from sfumato.runs.run import Run, Step
from tests.logged import log_in
from tests.runs.said import lines, problem, start
from tests.runs.small import Config, train


def stop(number):
    """A hook that ends the training after the step of this number."""

    def look(step, _):
        if step.number == number:
            signal.raise_signal(signal.SIGINT)

    return look


def stopped(tmp_path, *, at=3):
    config = Config(output=tmp_path / "run", name="m", measure_every=2, checkpoint_every=4)
    with suppress(SystemExit):
        train(config, after=stop(at - 1))
    assert not (tmp_path / "run/m.safetensors").exists()
    return config


@pytest.mark.parametrize(("at", "looks"), [(3, [0, 2, 3]), (2, [0, 2])])
def test_no_more_steps_are_made_and_what_is_learned_is_written(at, looks, tmp_path, capsys):
    config = stopped(tmp_path, at=at)
    assert f"Or end it here, with what is learned so far: sfumato resume {config.output} --finish" in lines(capsys)
    made = []
    path = train(replace(config, resume=True, finish=True), after=lambda step, _: made.append(step))
    assert made == []
    assert read_tensors(path)
    assert [row["step"] for row in log_in(config.output) if "weight" in row] == looks


def test_it_can_still_go_on_and_is_then_what_it_would_have_been(tmp_path):
    whole = read_tensors(train(Config(output=tmp_path / "whole", name="m", measure_every=2)))
    config = stopped(tmp_path)
    ended = read_tensors(train(replace(config, resume=True, finish=True)))
    again = read_tensors(train(replace(config, resume=True, finish=True)))
    assert all(torch.equal(again[name], tensor) for name, tensor in ended.items())
    gone_on = read_tensors(train(replace(config, resume=True)))
    assert not torch.equal(gone_on["0.weight"], ended["0.weight"])
    assert all(torch.equal(gone_on[name], tensor) for name, tensor in whole.items())


def test_of_a_run_without_a_step_nothing_is_written(tmp_path):
    config = Config(output=tmp_path / "run", name="m", measure_every=0, checkpoint_every=4)
    with suppress(KeyError):
        train(config, before=lambda *_: {}["a"])
    assert Checkpoints(config.output / "checkpoints").steps() == [0]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = f"{config.output} has made no step yet, so nothing is learned; resume it without --finish."
    assert problem(lambda: train(replace(config, resume=True, finish=True))) == said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_which_steps_are_to_come(tmp_path):
    assert start(tmp_path).remaining_steps(5) == range(5)
    config = stopped(tmp_path / "small")
    run = Run.start(replace(config, resume=True), program="small")
    assert run.remaining_steps(9) == range(3, 9)
    run.close()
    run = Run.start(replace(config, resume=True, finish=True), program="small")
    assert list(run.remaining_steps(9)) == []
    run.close()


def test_the_adapter_is_that_which_a_run_keeps_of_its_step(pocket_folder, pictures, tmp_path, monkeypatch):
    quiet = {"measure_every": 0, "device": "cpu", "precision": "fp32", "caption": "{caption}", "name": "a"}
    where = {"images": pictures, "base": str(pocket_folder), "rank": 2, "ema": 0.5}
    config = lora.Config(**where, output=tmp_path / "whole", steps=4, batch=2, save_every=2, sample_every=3, **quiet)
    lora.train(config)
    done = Step.done

    def stopping(step, **values):
        done(step, **values)
        if step.number == 1:
            signal.raise_signal(signal.SIGINT)

    config = replace(config, output=tmp_path / "run")
    with monkeypatch.context() as patch, suppress(SystemExit):
        patch.setattr(Step, "done", stopping)
        lora.train(config)
    path = lora.train(replace(config, resume=True, finish=True))
    kept, ended = read_tensors(tmp_path / "whole/adapters/a-step00000002.safetensors"), read_tensors(path)
    assert all(torch.equal(ended[name], tensor) for name, tensor in kept.items())
    assert read_header(path).metadata["ss_steps"] == "2"
    assert sorted(each.name for each in (tmp_path / "run/samples").iterdir()) == ["000000", "000002"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
@pytest.mark.parametrize("case", {case.split()[0]: case for case in reversed(CASES)}.values())
def test_every_trainer_ends_where_it_was_killed(case, inputs, tmp_path, capsys):
    words = command(case, inputs, tmp_path / "run", "--checkpoint-every", "1")
    assert run(words, log=tmp_path / "log", kill_at=3) == -signal.SIGKILL
    assert cli.main(["resume", str(tmp_path / "run"), "--finish"]) == 0
    assert max(row["step"] for row in log_in(tmp_path / "run")) == 3
    assert "the base's predictions for" not in capsys.readouterr().err
    written = [path for path in (tmp_path / "run").glob("*") if path.name.startswith(("out", "model"))]
    assert written
    for path in written:
        if path.suffix == ".safetensors":
            assert read_header(path).metadata["ss_steps"] == "3"
