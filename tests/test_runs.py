"""The run folder: one line a step, nothing overwritten unasked, and no broken number passes."""

import json
from dataclasses import dataclass

import pytest
import torch

from sfumato.errors import RunError
from sfumato.runs import Run


@dataclass(frozen=True)
class Config:
    rank: int = 4


def test_each_step_is_a_line_and_tensors_become_numbers(tmp_path):
    run = Run.start(tmp_path / "run", Config())
    for step in run.steps(12):
        step.done(loss=torch.tensor(1.0 / (step.number + 1)), rate=0.5)
    run.log(step=12, fit=0.25)
    run.close()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines == run.rows()
    assert lines[3] == {"step": 4, "loss": 0.25, "rate": 0.5}
    assert lines[12] == {"step": 12, "fit": 0.25}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, value):
    run = Run.start(tmp_path / "run", Config())
    with pytest.raises(RunError, match=r"step 5: loss is not finite.*lower the learning rate"):  # noqa: PT012
        for step in run.steps(100):
            step.done(loss=torch.tensor(value if step.number == 4 else 1.0))
    assert [row["step"] for row in run.rows()][:4] == [1, 2, 3, 4]


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path):
    Run.start(tmp_path / "run", Config(rank=8)).close()
    with pytest.raises(RunError, match="--overwrite"):
        Run.start(tmp_path / "run", Config())
    assert "rank = 8" in (tmp_path / "run/config.toml").read_text()
    Run.start(tmp_path / "run", Config(), overwrite=True).close()
    assert "rank = 4" in (tmp_path / "run/config.toml").read_text()


def test_a_file_in_the_way_is_said(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="is a file"):
        Run.start(tmp_path / "run", Config())


def test_other_processes_write_nothing(tmp_path):
    run = Run.start(tmp_path / "run", Config(), is_main=False)
    for step in run.steps(2):
        step.done(loss=torch.tensor(1.0))
    run.close()
    assert list(tmp_path.iterdir()) == []
