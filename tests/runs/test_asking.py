"""`sfumato ask`: what a training that is under way does when it is asked, and that it learns the same."""

import re
import signal
from dataclasses import replace

import pytest
import torch

from bench.runs_resume import CASES, command, make_inputs, results
from sfumato import cli
from sfumato.files import read_tensors
from sfumato.runs import options as request
from sfumato.runs.checkpoints import Checkpoints
from sfumato.runs.lock import Lock
from sfumato.runs.options import Request
from sfumato.runs.run import Step
from tests.logged import log_in
from tests.runs.said import Processes, lines, start
from tests.runs.small import Config, train


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(request, "_PAUSE_S", 0.0)


def asking(config, number, *words):
    """A hook that asks in the step of this number, by the command."""

    def hook(step, _):
        if step.number == number:
            assert cli.main(["ask", str(config.output), *words]) == 0

    return hook


def same(one, other):
    """Whether two files hold the same numbers."""
    one, other = read_tensors(one), read_tensors(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained(tmp_path, folder="run", **settings):
    return Config(output=tmp_path / folder, name="m", **{"measure_every": 4, "checkpoint_every": 5, **settings})


def measured(config):
    return [row["step"] for row in log_in(config.output) if "weight" in row]


@pytest.mark.parametrize(("every", "looks"), [(4, [0, 3, 4, 8, 10]), (0, [3])])
def test_it_looks_after_the_step_and_learns_the_same(every, looks, tmp_path, capsys):
    config = trained(tmp_path, measure_every=every, keep=9)
    asked = train(config, after=asking(config, 2, "--samples"))
    assert "step 3: asked for samples" in lines(capsys)
    assert measured(config) == looks
    assert Checkpoints(config.output / "checkpoints").steps() == [0, 5, 10]
    assert same(asked, train(trained(tmp_path, "whole")))


def test_it_saves_a_checkpoint_and_what_is_kept(tmp_path, capsys):
    kept = []
    run = start(tmp_path, checkpoint_every=5, keep=9)
    run.every(0, kept.append, on=Request.SAVE)
    run.every(0, lambda _: pytest.fail("a look that was not asked for"))
    run.every(None, lambda _: pytest.fail("a look that there is not"), on=Request.SAVE)
    for step in run.steps(7):
        if step.number == 1:
            request.ask(run.folder, Request.SAVE)
        step.done(loss=1.0)
    run.close()
    assert kept == [2]
    assert Checkpoints(run.folder / "checkpoints").steps() == [0, 2, 5, 7]
    assert "step 2: asked for save" in lines(capsys)


def test_it_stops_and_goes_on_as_if_it_had_not(tmp_path, capsys):
    config = trained(tmp_path)
    with pytest.raises(SystemExit) as ended:
        train(config, after=asking(config, 2, "--stop", "--samples"))
    assert ended.value.code == 128 + signal.SIGTERM
    assert f"stopped after step 3 of 10, saved. Go on with: sfumato resume {config.output}" in lines(capsys)
    assert not (config.output / "m.safetensors").exists()
    gone_on = train(replace(config, resume=True))
    assert same(gone_on, train(trained(tmp_path, "whole")))
    assert measured(config) == [0, 4, 8, 10]


def test_it_ends_with_what_is_learned_so_far(tmp_path):
    config = trained(tmp_path)
    made = []
    ended = train(config, before=lambda step, _: made.append(step.number), after=asking(config, 2, "--finish"))
    assert made == [0, 1, 2]
    assert measured(config) == [0, 3]
    other = trained(tmp_path, "other")
    with pytest.raises(SystemExit):
        train(other, after=asking(other, 2, "--stop"))
    assert same(ended, train(replace(other, resume=True, finish=True)))
    assert same(train(replace(config, resume=True)), train(trained(tmp_path, "whole")))  # it can still go on


def test_a_request_that_nobody_took_up_is_not_taken_up_by_the_next_run(tmp_path):
    config = trained(tmp_path)
    train(config)
    request.ask(config.output, Request.FINISH | Request.STOP)
    train(replace(config, overwrite=True))
    assert log_in(config.output)[-1]["step"] == 10
    run = start(tmp_path / "late")
    request.ask(run.folder, Request.SAVE)
    run.close()
    assert not list(run.folder.glob(".ask*"))


def test_a_folder_that_a_run_withdraws_from_is_gone_with_what_was_asked(tmp_path):
    run = start(tmp_path)
    request.ask(run.folder, Request.SAVE)
    run.withdraw()
    assert not run.folder.exists()


def test_folders_are_not_looked_into_at_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(request, "_PAUSE_S", 60.0)
    requests = request.Requests(tmp_path)
    request.ask(tmp_path, Request.SAVE)
    assert requests.take() == Request.SAVE
    request.ask(tmp_path, Request.SAVE)
    assert requests.take() == Request.NOTHING
    requests.forget()
    assert not list(tmp_path.iterdir())


def test_all_processes_do_what_the_main_one_is_asked(tmp_path):
    kept = []
    processes = Processes(main=False, others=256 * Request.FINISH.value)

    def keep(step):
        kept.append(step)
        processes.others = 0

    run = start(tmp_path, processes=processes)
    run.every(0, keep, on=Request.FINISH)
    run.folder.mkdir()
    request.ask(run.folder, Request.STOP)  # which is the main one's to find
    made = [step.done(loss=1.0) for step in run.steps(7)]
    assert len(made) == 1
    assert kept == [1]
    assert (run.folder / ".ask-stop").exists()


class Interrupted(Processes):
    """Another one gets a signal once, and sends it along until it is obeyed."""

    is_interrupted = False

    def largest(self, number):
        self.asked.append(number)
        found = max(number, signal.SIGINT) if self.is_interrupted else number
        self.is_interrupted = found >= 256
        return found


def test_a_signal_beside_a_request_is_not_lost(tmp_path):
    """It is the other process's, which has it still after its next step."""
    processes = Interrupted(main=True)
    run = start(tmp_path, processes=processes)

    def steps():
        for step in run.steps(7):
            if step.number == 0:
                request.ask(run.folder, Request.SAVE)
            processes.is_interrupted = True
            step.done(loss=1.0)

    with pytest.raises(SystemExit) as ended:
        steps()
    assert ended.value.code == 128 + signal.SIGINT
    assert [number for number in processes.asked if number > 1] == [256 * Request.SAVE.value]
    assert Checkpoints(run.folder / "checkpoints").steps() == [1, 2]


def test_what_cannot_be_asked_is_told(tmp_path, capsys):
    def told(*words):
        assert cli.main(["ask", *words]) == 2
        return capsys.readouterr().err.strip()

    config = trained(tmp_path)
    folder = str(config.output)
    train(config)
    capsys.readouterr()
    files = sorted(config.output.iterdir())
    assert told(str(tmp_path), "--save") == (
        f"sfumato: {tmp_path} holds no run; `sfumato runs` lists those that there are."
    )
    assert told(folder) == "sfumato: nothing is asked; give --samples, --save, --stop or --finish."
    assert "--stop and --finish: a training that stops writes no results" in told(folder, "--stop", "--finish")
    gone = f"sfumato: no training is under way in {folder}; one that was stopped goes on with: sfumato resume {folder}"
    assert told(folder, "--save") == gone
    assert told(folder, "--finish") == f"{gone} --finish"
    assert sorted(config.output.iterdir()) == files


def test_a_folder_that_takes_no_file_is_told(tmp_path, capsys, monkeypatch):
    run = start(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(request, "ask", full)
    assert cli.main(["ask", str(run.folder), "--save"]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    run.close()


def test_it_says_what_will_come_of_it(tmp_path, capsys):
    lock = Lock(tmp_path)
    lock.take()
    (tmp_path / "run.json").write_text("{}")
    assert cli.main(["ask", str(tmp_path), "--samples", "--save", "--finish"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[4] for line in said] == ["draws", "saves", "ends,"]
    assert {path.name for path in tmp_path.glob(".ask-*")} == {".ask-samples", ".ask-save", ".ask-finish"}
    lock.release()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
@pytest.mark.parametrize("case", {case.split()[0]: case for case in reversed(CASES)}.values())
def test_every_trainer_learns_the_same_though_it_is_asked(case, inputs, tmp_path, capsys, monkeypatch):
    """Without intervals of its own: the samples, and the adapter so far, are there because they were asked for."""
    measures = case.split()[0] != "pretrain"
    quiet = ["--sample-every", "0", *(["--measure-every", "0"] if measures else [])]
    assert cli.main(command(case, inputs, tmp_path / "whole", *quiet)) == 0
    done = Step.done

    def asking_for_it(step, **values):
        done(step, **values)
        if step.number in (1, 2):
            request.ask(tmp_path / "run", Request.SAMPLES if step.number == 1 else Request.SAVE)

    monkeypatch.setattr(Step, "done", asking_for_it)
    assert cli.main(command(case, inputs, tmp_path / "run", *quiet)) == 0
    err = capsys.readouterr().err
    assert "step 2: asked for samples" in err
    assert "step 3: asked for save" in err
    expected, found = results(tmp_path / "whole"), results(tmp_path / "run")
    kept = {name for name in found if name.startswith("adapters/")}
    assert found.keys() - kept == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    is_adapter = case.split()[0] in ("lora", "slider", "dpo", "lcm", "textual_inversion") or "dreambooth lora" in case
    assert bool(kept) == is_adapter
    assert all(re.match(r"adapters/out.*-step0*3\.", name) for name in kept)
    drawn = [path.relative_to(tmp_path / "run/samples") for path in (tmp_path / "run/samples").rglob("*.png")]
    assert {int(path.parts[0].removesuffix(".png")) for path in drawn} == {2}
