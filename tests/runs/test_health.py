"""Broken numbers are found within the step, skipped, gone back from once, and never written."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sfumato.errors import BaseModelError, FileError, RunError
from sfumato.files import read_tensors
from sfumato.runs.checkpoints import Checkpoints
from sfumato.runs.recovery import DivergenceGuard
from sfumato.runs.run import Step
from tests.logged import log_in
from tests.runs.said import Processes, lines, problem, start
from tests.runs.small import Config, train

BROKEN = [math.nan, math.inf, -math.inf]


def put(place, number, value):
    """A hook that breaks a gradient or a weight in step `number`, once."""
    done = []

    def hook(step, model):
        if step.number == number and not done:
            done.append(step.number)
            tensor = model[0].weight.grad if place == "gradient" else model[0].weight.data
            tensor[1, 2] = value

    return hook


def assert_all_finite(folder):
    """Every weight file and every number of the log."""
    files = list(folder.rglob("*.safetensors"))
    assert files
    for file in files:
        read_tensors(file)  # refuses what is not finite
    assert all(math.isfinite(value) for row in log_in(folder) for value in row.values())


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_one_broken_step_is_skipped_and_said(place, value, tmp_path, capsys):
    broken = {4: value} if place == "loss" else {}
    train(
        Config(output=tmp_path / "run", checkpoint_every=2),
        before=put(place, 4, value) if place == "gradient" else None,
        loss_of=lambda number: broken.get(number, 1.0),
    )
    said = capsys.readouterr().err
    assert "step 5: " in said
    assert "gradient_norm not finite; the step is skipped" in said
    assert "going back" not in said
    assert [row for row in log_in(tmp_path / "run") if "skipped" in row] == [{"step": 5, "skipped": 1}]
    assert_all_finite(tmp_path / "run")


@pytest.mark.parametrize("value", BROKEN)
def test_broken_weights_are_found_in_their_step_and_gone_back_from(value, tmp_path, capsys):
    train(Config(output=tmp_path / "run", checkpoint_every=2), after=put("weight", 4, value))
    said = capsys.readouterr().err
    assert "step 5: the trained weights are not finite; going back to step 4 with half the learning rate" in said
    assert_all_finite(tmp_path / "run")
    steps = [row["step"] for row in log_in(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, 11))


def test_three_broken_steps_in_a_row_go_back_with_half_the_rate(tmp_path, capsys):
    """The steps 6, 7 and 8 are broken the first time; the second time all is well."""
    broken = [6, 7, 8]

    def loss_of(number):
        return math.nan if number + 1 in broken and broken.pop(0) else 1.0

    train(Config(output=tmp_path / "run", checkpoint_every=5), loss_of=loss_of)
    said = capsys.readouterr().err
    assert "step 8: loss, gradient_norm not finite, in 3 steps in a row; going back to step 5" in said
    found = {row["step"]: row for row in log_in(tmp_path / "run") if "rate" in row}
    assert found[8]["rate"] == pytest.approx(0.5 * 1e-2 * 0.5 * (1 + math.cos(math.pi * 5 / 8)), rel=1e-5)
    assert [row for row in log_in(tmp_path / "run") if "went_back_from" in row] == [{"step": 5, "went_back_from": 7}]
    assert_all_finite(tmp_path / "run")


def test_after_going_back_three_in_a_row_are_counted_anew(tmp_path, capsys):
    """The checkpoint that is gone back to lies among broken steps, and knows of two."""
    broken = [1, 2, 3, 3]

    def loss_of(number):
        return math.nan if number in broken and not broken.remove(number) else 1.0

    train(Config(output=tmp_path / "run", checkpoint_every=1, steps=6), loss_of=loss_of)
    assert capsys.readouterr().err.count("going back to step 3 with half the learning rate") == 1
    assert not broken


def test_two_broken_steps_and_a_good_one_do_not_add_up(tmp_path, capsys):
    train(Config(output=tmp_path / "run"), loss_of=lambda number: 1.0 if number % 3 == 2 else math.inf)
    assert "going back" not in capsys.readouterr().err


def test_what_breaks_again_ends_with_a_diagnosis_and_without_a_file(tmp_path, capsys):
    with pytest.raises(RunError, match=r"also with half the learning rate, so the training is broken\. Lower --learn"):
        train(
            Config(output=tmp_path / "run", checkpoint_every=4),
            loss_of=lambda number: math.nan if number >= 5 else 1.0,
        )
    assert capsys.readouterr().err.count("going back to step 4") == 1
    assert not (tmp_path / "run/run.safetensors").exists()
    assert_all_finite(tmp_path / "run")
    steps = [row["step"] for row in log_in(tmp_path / "run") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5]


def test_after_the_second_time_the_diagnosis_says_so(tmp_path):
    config = Config(output=tmp_path / "run", checkpoint_every=4)
    assert problem(lambda: train(config, loss_of=lambda number: math.nan if number >= 5 else 1.0)) == (
        "step 8: loss, gradient_norm not finite, in 3 steps in a row, also with half the learning rate, so the "
        "training is broken. Lower --learning-rate, use another --precision, or look at the images; "
        f"{tmp_path / 'run/log.jsonl'} has the steps before."
    )


def test_without_a_checkpoint_to_go_back_to_it_ends(tmp_path):
    with pytest.raises(RunError, match=r"step 3: loss, gradient_norm not finite, in 3 steps in a row, so the training"):
        train(Config(output=tmp_path / "run", checkpoint_every=0), loss_of=lambda number: math.nan)


def test_a_run_that_is_killed_among_broken_steps_counts_on(tmp_path, capsys):
    """Two broken steps before the checkpoint, one after it: three in a row."""
    config = Config(output=tmp_path / "run", checkpoint_every=2, steps=6)
    with pytest.raises(ZeroDivisionError):
        train(config, loss_of=lambda number: math.nan if number in (2, 3) else 1 / (number != 4))
    broken = [4]
    train(replace(config, resume=True), loss_of=lambda number: math.nan if broken and broken.pop() else 1.0)
    assert "step 5: loss, gradient_norm not finite, in 3 steps in a row; going back" in capsys.readouterr().err


def test_a_state_that_is_not_finite_is_no_checkpoint(tmp_path):
    """A squared gradient may overflow where the gradient and the weights do not."""
    store = Checkpoints(tmp_path)
    store.save(1, {"a": torch.ones(3)})
    for value in BROKEN:
        with pytest.raises(RunError, match="the state of step 2 is not finite"):
            store.save(2, {"a": torch.ones(3), "b": [torch.tensor([1.0, value])]})
    assert store.newest() == (1, [])


def refuse(*_):
    raise RunError("there is no room")


def test_a_state_that_only_the_main_process_finds_broken_is_broken_for_all(tmp_path):
    layer = nn.Linear(2, 2)
    end = (
        ", so the training is broken. Lower --learning-rate, use another --precision, or look at the images; "
        f"{tmp_path / 'run/log.jsonl'} has the steps before."
    )
    other = Processes(main=False, others=2)
    run = start(tmp_path, other, checkpoint_every=1)
    assert problem(lambda: list(run.steps(3))) == f"the state of step 0 is not finite{end}"
    main = Processes(main=True)
    run = start(tmp_path, main, checkpoint_every=1)
    run.keep(layer=layer)
    layer.weight.data[0] = math.nan
    assert problem(lambda: list(run.steps(3))) == f"the state of step 0 is not finite (/kept/layer/weight){end}"
    assert main.asked == [2]


class Second(Processes):
    """The other one, which hears what the main process said."""

    def __init__(self, main):
        super().__init__(main=False)
        self.heard = main.asked

    def largest(self, number):
        self.asked.append(number)
        return self.heard[len(self.asked) - 1]


@pytest.mark.parametrize("full", [False, True])
def test_all_processes_ask_each_other_as_often(full, tmp_path, monkeypatch):
    """Where samples come after a checkpoint of their step, and where the disk did not take it."""
    main = Processes(main=True)
    second = Second(main)
    for processes in (main, second):
        run = start(tmp_path / str(processes.is_main), processes, checkpoint_every=2)
        run.keep(layer=nn.Linear(2, 2))
        run.every(2, lambda step: None)
        for step in run.steps(4):
            if full:
                monkeypatch.setattr(run._recovery.checkpoints, "save", refuse)
            step.done(loss=1.0, rate=1.0)
    assert len(second.asked) == len(main.asked) > 4


def test_moments_that_overflow_send_the_run_back(tmp_path, capsys):
    def overflow(step, model):
        if step.number == 3 and step.rate_factor == 1:
            kept = step.run._recovery.kept.parts["optimizer"].state
            next(iter(kept.values()))["exp_avg_sq"][0] = math.inf

    train(Config(output=tmp_path / "run", checkpoint_every=2), after=overflow)
    assert "the state of step 4 is not finite" in capsys.readouterr().err
    assert_all_finite(tmp_path / "run")


@pytest.mark.parametrize("error", [BaseModelError("seed 1: black"), OSError(28, "No space left on device")])
def test_a_sample_that_fails_is_said_and_ends_nothing_but_the_first_does(error, tmp_path, capsys):
    from sfumato.runs.run import Run
    from sfumato.training.options import RunOptions

    def look(step):
        if step >= first:
            raise error

    first = 2
    run = Run.start(RunOptions(output=tmp_path / "run"), program="test")
    run.every(2, look)
    assert [step.number for step in run.steps(5)] == [0, 1, 2, 3, 4]
    reason = getattr(error, "strerror", None) or error
    assert f"step 2: no sample, measurement or kept adapter: {reason}" in capsys.readouterr().err
    run.close()
    first = 0
    again = Run.start(RunOptions(output=tmp_path / "run", overwrite=True), program="test")
    again.every(2, look)
    with pytest.raises(RunError, match="the first samples or measurements failed"):
        list(again.steps(5))


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("place", range(3))
def test_a_broken_number_in_any_weight_of_any_optimizer_is_found(place, value):
    weights = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    health = DivergenceGuard()
    parts = [nn.Linear(2, 2), torch.optim.SGD(weights[:2], lr=1.0), torch.optim.SGD(weights[2:], lr=1.0)]
    for large in (1.0, -3e38):  # whose squares are no numbers
        weights[place].data[1] = large
        health.check_weights(4, parts)
        assert not health.broken
    weights[place].data[1] = value
    health.check_weights(4, parts)
    assert health.broken == "step 5: the trained weights are not finite"


def test_gradients_that_overflow_are_the_scalers_until_it_has_nothing_left_to_lower(tmp_path):
    """In fp16: a scale below 1 that still overflows is a training that is broken."""
    run = start(tmp_path)
    for scale, enabled, healthy in ((65536.0, True, True), (1.0, True, True), (0.5, True, False), (1.0, False, False)):
        scaler = SimpleNamespace(is_enabled=lambda enabled=enabled: enabled, get_scale=lambda scale=scale: scale)
        step = Step(0, 1.0, run)
        assert step.healthy(scaler, loss=1.0, gradient_norm=math.inf) is healthy
        assert step.skipped is not healthy
        assert not Step(0, 1.0, run).healthy(scaler, loss=math.nan, gradient_norm=1.0)
    run.close()


@pytest.mark.parametrize("value", BROKEN)
def test_a_measurement_that_is_not_finite_is_said_and_not_logged(value, tmp_path, capsys):
    from sfumato.runs.run import Run
    from sfumato.training.options import RunOptions

    run = Run.start(RunOptions(output=tmp_path / "run"), program="test")
    run.log(step=3, fit=torch.tensor(value), drift=0.5)
    run.close()
    assert "step 3: fit not finite" in capsys.readouterr().err
    assert log_in(tmp_path / "run") == [{"step": 3, "drift": 0.5}]


def test_a_measurement_that_is_broken_is_said_with_its_step_if_there_is_one(tmp_path, capsys):
    run = start(tmp_path)
    run.log(step=3, fit=math.nan, drift=torch.tensor(math.inf))
    run.log(fit=math.nan)
    run.close()
    assert lines(capsys) == ["step 3: fit, drift not finite", "step ?: fit not finite"]


@pytest.mark.parametrize("value", BROKEN)
def test_no_weight_file_takes_or_gives_what_is_not_finite(value, tmp_path):
    from safetensors.torch import save_file

    from sfumato.files import write_tensors

    broken = {"a": torch.tensor([[1.0, value]]), "b": torch.ones(2)}
    with pytest.raises(FileError, match="NaN or Inf"):
        write_tensors(tmp_path / "ours.safetensors", broken)
    assert list(tmp_path.iterdir()) == []
    save_file(broken, tmp_path / "theirs.safetensors")
    with pytest.raises(FileError, match="NaN or Inf"):
        read_tensors(tmp_path / "theirs.safetensors")


def test_what_is_passed_over_on_the_way_back_is_said(tmp_path, capsys):
    def damage(step, model):
        if step.number == 6:
            (tmp_path / "run/checkpoints/000006/state.json").write_text("")

    broken = [4, 5, 6]
    train(
        Config(output=tmp_path / "run", checkpoint_every=2),
        before=damage,
        loss_of=lambda number: math.nan if number in broken and not broken.remove(number) else 1.0,
    )
    said = capsys.readouterr().err
    assert "checkpoints/000006 was passed over: state.json has 0 bytes" in said
    assert "going back to step 4 with half the learning rate" in said
