"""A training's run at Weights & Biases, beside a package that only writes down what it is told."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from sfumato.errors import ConfigError
from sfumato.runs.folder import clear_folder
from sfumato.runs.reporting import log
from sfumato.runs.reporting.trackers import check_project
from sfumato.runs.run import Run
from sfumato.training.checks import check_run
from sfumato.training.options import RunOptions
from tests.logged import log_in
from tests.runs.said import Processes, lines, problem

KEY = "0123456789abcdef0123456789abcdef01234567"


class Service:
    """What W&B has of one run, as its server or its offline files would: rows by step, none below the latest."""

    def __init__(self):
        self.mode, self.key, self.rows, self.refused, self.calls, self.failing = "online", KEY, {}, [], [], ()
        self.images = []

    def package(self):
        def login(*, prompt, verify):
            assert (prompt, verify) == (False, False)  # nothing asks or waits
            return bool(self.key)

        return SimpleNamespace(
            setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode=self.mode)),
            login=login,
            Settings=lambda **settings: settings,
            Image=lambda image, caption: (image.size, caption),
            teardown=lambda: self.calls.append("teardown"),
            init=self.init,
        )

    def init(self, **options):
        offline = options["settings"].get("mode", self.mode) == "offline"
        self.fail("init offline" if offline else "init")
        self.calls.append(options)
        if offline:
            self.rows = {}
        return SimpleNamespace(
            offline=offline,
            url=None if self.mode == "disabled" else "https://wandb.ai/run",
            step=max(self.rows, default=-1) + 1,
            define_metric=lambda name, step_metric: self.calls.append((name, step_metric)),
            log=self.log,
            finish=self.finish,
        )

    def log(self, row, step):
        self.fail("log")
        self.images += [step] if "samples" in row else []
        if step < max(self.rows, default=0):
            self.refused.append(row)
        else:
            self.rows.setdefault(step, {}).update(row)

    def finish(self, exit_code):
        self.fail("finish")
        self.calls.append(exit_code)

    def fail(self, what):
        if what in self.failing:
            raise OSError(f"no {what}:\n the net is\tdown.")

    @property
    def started(self):
        return [call for call in self.calls if isinstance(call, dict)]


@pytest.fixture
def service(monkeypatch):
    made = Service()
    monkeypatch.setitem(sys.modules, "wandb", made.package())
    for name in ("WANDB_NAME", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return made


def train(tmp_path, steps=8, *, broken_at=None, killed_at=None, processes=None, **options):
    """Steps whose loss is their number (and a hundred more with half the rate), a sample every four."""
    config = RunOptions(output=tmp_path / "run", **({"wandb": "flowers", "checkpoint_every": 4} | options))
    run = Run.start(config, program="test", processes=processes)
    run.keep(layer=nn.Linear(1, 1))

    def look(step):
        run.show(step, [Image.new("RGB", (3, 2))], ["a crab"])
        run.log(step=step, fit=step / 8)

    run.every(4, look)
    for step in run.steps(steps):
        is_broken = broken_at is not None and step.number >= broken_at and step.rate_factor == 1
        loss = torch.tensor(float("nan") if is_broken else step.number + 1 + (100 if step.rate_factor < 1 else 0.0))
        step.healthy(loss=loss)
        step.done(loss=loss)
        if step.number == killed_at:
            run.log_file.flush()
            run._claim.release()  # what the system does
            return
    run.close()


def losses(service):
    return {at: row["loss"] for at, row in service.rows.items() if "loss" in row}


def test_rows_and_images_are_sent_at_their_steps(service, tmp_path, capsys):
    train(tmp_path, checkpoint_every=0)
    assert losses(service) == {step: step for step in range(1, 9)}
    assert {at: row["fit"] for at, row in service.rows.items() if "fit" in row} == {0: 0, 4: 0.5, 8: 1}
    assert [at for at, row in service.rows.items() if row.get("samples") == [((3, 2), "a crab")]] == [0, 4, 8]
    assert all(row["step"] == at for at, row in service.rows.items())
    assert (service.refused, service.calls[1:]) == ([], [("*", "step"), 0])
    assert "W&B: https://wandb.ai/run" in lines(capsys)


def test_what_is_told_at_the_start(service, tmp_path):
    train(tmp_path, wandb="garden/flowers", license="cc0-1.0", sample_prompts=(str(tmp_path / "a.safetensors"),))
    [told] = service.started
    number = told.pop("id")
    config, settings = told.pop("config"), told.pop("settings")
    assert told == {
        **{"project": "flowers", "entity": "garden", "name": "run", "resume": "allow", "reinit": "create_new"},
        **{"dir": str(tmp_path / "run"), "allow_val_change": True},
    }
    assert (config["program"], config["license"], config["checkpoint_every"]) == ("test", "cc0-1.0", 4)
    assert str(tmp_path) not in json.dumps(config)
    assert (settings["console"], settings["disable_code"], settings["disable_git"]) == ("off", True, True)
    assert settings["finish_timeout"] > 0  # or a dead server would hold the program for ever
    assert json.loads((tmp_path / "run/run.json").read_text())["wandb"] == f"garden/flowers {number} 0"


def test_the_name_is_the_option_s_the_environment_s_or_the_folder_s(service, tmp_path, monkeypatch):
    train(tmp_path / "a", steps=1)
    monkeypatch.setenv("WANDB_NAME", "of the environment")
    train(tmp_path / "b", steps=1)
    train(tmp_path / "c", steps=1, wandb_name="given")
    assert [told["name"] for told in service.started] == ["run", "of the environment", "given"]
    assert len({told["id"] for told in service.started}) == 3


@pytest.mark.parametrize("lost", [0, 1, 3, 6])
def test_a_killed_training_goes_on_in_the_same_run_without_a_gap_or_a_repetition(lost, service, tmp_path):
    train(tmp_path, killed_at=5)
    for at in sorted(service.rows)[len(service.rows) - lost :]:  # not uploaded when it was killed
        del service.rows[at]
    train(tmp_path, resume=True)
    assert losses(service) == {step: step for step in range(1, 9)}
    assert service.refused == []
    assert service.started[0]["id"] == service.started[1]["id"]


def test_images_that_are_drawn_again_are_not_sent_again(service, tmp_path):
    train(tmp_path, steps=12, checkpoint_every=6, killed_at=9)
    train(tmp_path, steps=12, checkpoint_every=6, resume=True)
    assert service.images == [0, 4, 8, 12]


def test_offline_a_resumed_training_s_files_are_whole_by_themselves(service, tmp_path, capsys):
    service.mode, service.key = "offline", None
    train(tmp_path, killed_at=5)
    train(tmp_path, resume=True)
    assert losses(service) == {step: step for step in range(1, 9)}
    assert service.refused == []
    assert service.started[0]["id"] == service.started[1]["id"]
    assert f"W&B: offline; `wandb sync {tmp_path}/run/wandb/offline-run-*` uploads the run" in lines(capsys)


def test_a_training_that_goes_back_follows_its_latest_step_and_its_axis_goes_back(service, tmp_path):
    train(tmp_path, broken_at=5)
    assert service.refused == []
    told = [(row["step"], row.get("loss")) for _, row in sorted(service.rows.items())]
    assert [step for step, _ in told] == [*range(9), *range(4, 9)]
    assert told[:6] == [(step, step or None) for step in range(6)]
    again = told.index((4, None))
    assert service.rows[sorted(service.rows)[again]]["went_back_from"] == 7
    assert told[again + 1 :] == [(step, step + 100) for step in range(5, 9)]
    shift = int(json.loads((tmp_path / "run/run.json").read_text())["wandb"].split()[-1])
    assert shift == sorted(service.rows)[again] - 4
    train(tmp_path, steps=10, resume=True, force=True)
    assert service.refused == []
    assert max(service.rows) == 10 + shift


def test_other_rows_by_force_follow_those_that_they_replace(service, tmp_path):
    train(tmp_path, killed_at=6)
    train(tmp_path, resume=True, force=True, sample_every=3)
    assert service.refused == []
    assert [row["step"] for _, row in sorted(service.rows.items())] == [*range(8), *range(5, 9)]


def test_a_training_that_asks_for_it_when_it_is_resumed_sends_what_its_log_has(service, tmp_path):
    train(tmp_path, killed_at=5, wandb=None)
    train(tmp_path, resume=True)
    assert losses(service) == {step: step for step in range(1, 9)}
    train(tmp_path, steps=9, resume=True, force=True, wandb="others")
    assert [told["project"] for told in service.started] == ["flowers", "others"]
    assert service.started[0]["id"] != service.started[1]["id"]


def test_a_run_that_is_replaced_is_another_and_its_files_are_gone(service, tmp_path):
    train(tmp_path)
    ours = tmp_path / "run/wandb"
    for name in ("offline-run-20261202_141821-0a1b2c3d/files", "run-20261202_141821-0a1b2c3d"):
        (ours / name).mkdir(parents=True)
    (ours / "latest-run").symlink_to(ours / "run-20261202_141821-0a1b2c3d", target_is_directory=True)
    (ours / "debug-internal.log").touch()
    train(tmp_path, overwrite=True)
    assert service.started[0]["id"] != service.started[1]["id"]
    assert not ours.exists()


def test_what_is_not_w_and_b_s_stays_in_its_folder(tmp_path):
    notes = tmp_path / "run/wandb/notes.txt"
    notes.parent.mkdir(parents=True)
    notes.touch()
    clear_folder(RunOptions(output=tmp_path / "run"))
    assert notes.exists()


def test_an_unreachable_server_makes_it_an_offline_run(service, tmp_path, capsys):
    service.failing = ("init",)
    train(tmp_path)
    assert losses(service) == {step: step for step in range(1, 9)}
    assert service.calls[0] == "teardown"
    upload = f"`wandb sync {tmp_path}/run/wandb/offline-run-*`"
    assert f"W&B: no init: the net is down. The training is logged offline; {upload} uploads it." in lines(capsys)


@pytest.mark.parametrize("failing", [("init", "init offline"), ("log",), ("finish",)])
def test_what_fails_later_is_said_once_and_ends_nothing(failing, service, tmp_path, capsys):
    service.failing = failing
    train(tmp_path)
    rows = log_in(tmp_path / "run")
    assert [row["loss"] for row in rows if "loss" in row] == list(range(1, 9))
    assert sum(f"no {failing[-1]}: the net is down" in line for line in lines(capsys)) == 1


def test_a_stopped_training_is_marked_as_not_whole(service, tmp_path):
    run = Run.start(RunOptions(output=tmp_path / "run", wandb="flowers"), program="test")
    steps = run.steps(5)
    next(steps)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        next(steps)
    assert service.calls[-1] == 1


def test_the_package_and_the_key_are_asked_for_at_the_start(service, tmp_path, monkeypatch, capsys):
    service.key = None
    assert problem(lambda: train(tmp_path)) == (
        "--wandb: no API key of W&B; log in once with `wandb login`, or set WANDB_MODE=offline and upload later."
    )
    service.mode = "disabled"
    train(tmp_path)
    assert "W&B: switched off by WANDB_MODE" in lines(capsys)
    monkeypatch.setitem(sys.modules, "wandb", None)
    missing = '--wandb: the package is not installed; pip install "sfumato[wandb]".'
    assert problem(lambda: train(tmp_path, overwrite=True)) == missing
    train(tmp_path / "second", steps=1, processes=Processes(main=False))
    assert not (tmp_path / "second/run").exists()


def test_a_setting_that_is_none_is_said_in_a_line(service, tmp_path, monkeypatch):
    def refuse():
        raise ValueError("1 validation error for Settings\nmode\n  Input should be 'online' or 'offline'")

    monkeypatch.setattr(sys.modules["wandb"], "setup", refuse)
    assert problem(lambda: train(tmp_path)) == (
        "--wandb: 1 validation error for Settings mode Input should be 'online' or 'offline'. Mend the variables "
        "WANDB_..., or W&B's settings file."
    )


def test_a_key_that_is_none_is_said_in_a_line(service, tmp_path, monkeypatch):
    def refuse(**_):
        raise ValueError("WANDB_API_KEY invalid: it has 12 characters")

    monkeypatch.setattr(sys.modules["wandb"], "login", refuse)
    assert problem(lambda: train(tmp_path)) == (
        "--wandb: WANDB_API_KEY invalid: it has 12 characters. Log in anew with `wandb login --relogin`."
    )


def test_no_key_is_written_anywhere(service, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    train(tmp_path)
    assert not any(KEY in path.read_text("latin-1") for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert KEY not in str(service.calls)


def test_rows_wait_for_the_disk_before_they_are_sent(service, tmp_path, monkeypatch):
    """Else a run that goes on would not know that W&B has them."""

    def full(path, content):
        raise OSError(28, "No space left on device")

    run = Run.start(RunOptions(output=tmp_path / "run", wandb="flowers"), program="test")
    steps = run.steps(2)
    next(steps).done(loss=1.0)
    with monkeypatch.context() as patched:
        patched.setattr(log, "_append", full)
        run.log_file.flush()
    assert service.rows == {}
    steps.close()
    assert losses(service) == {1: 1.0}


@pytest.mark.parametrize("project", ["", " ", "a/b/c", "/a", "a/", "a#b", "a:b", "100%"])
def test_what_is_no_project_is_refused(project, tmp_path):
    with pytest.raises(ConfigError, match="no project of W&B; wanted PROJECT or TEAM/PROJECT"):
        check_run(RunOptions(output=tmp_path, wandb=project))


def test_projects_and_names(tmp_path):
    for project in ("a", "my flowers", "team/my-flowers_2"):
        check_project(project)
    with pytest.raises(ConfigError, match="--wandb-name has no effect without --wandb"):
        check_run(RunOptions(output=tmp_path, wandb_name="a"))


def test_the_package_itself_offline(tmp_path):
    """In a process of its own: the package starts a service, and changes the interpreter."""
    pytest.importorskip("wandb", minversion="0.31")
    code = f"from tests.runs.test_wandb_run import *; train(Path({str(tmp_path)!r}), resume='-r' in sys.argv)"
    code = "from pathlib import Path; import sys; sys.argv.append('x'); " + code
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    [made] = (tmp_path / "run/wandb").glob("offline-run-*")
    written = next(made.glob("*.wandb")).read_bytes()
    assert written.count(b"samples/filenames") or written.count(b"media/images/samples_") >= 3
    assert f"W&B: offline; `wandb sync {tmp_path}/run/wandb/offline-run-*`" in ended.stderr
