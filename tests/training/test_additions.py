"""What is added to a training takes part in it by its hooks, and is resumed with it: shown by a toy in one class."""

import shutil

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sfumato import cli
from sfumato.training.additions import table
from sfumato.training.additions.interface import Addition, Additions
from tests.logged import log_in


class Weighed(Addition):
    """Learns one number, which is pulled to 1, and counts the steps that were taken."""

    def __init__(self):
        self.state = nn.Linear(1, 1, bias=False)
        self.state.weight.data.zero_()
        self.state.register_buffer("steps", torch.zeros(()))

    @classmethod
    def of(cls, training):
        return cls() if training.config.rank == 2 else None

    def parameters(self):
        return list(self.state.parameters())

    def groups(self):
        return [{"params": self.parameters(), "lr": 0.1}]

    def kept(self):
        return {"weighed": self.state}

    def loss(self, errors, batch):
        return (self.state.weight - 1).square().sum()

    def after_step(self):
        self.state.steps += 1

    def figures(self):
        return {"weighed": self.state.weight.detach().sum(), "taken": self.state.steps.clone()}


@pytest.fixture
def train(pocket_folder, pictures, tmp_path):
    def run(name, rank="2"):
        words = ["train", "lora", "--images", str(pictures), "--output", str(tmp_path / name), "--base"]
        words += [str(pocket_folder), "--caption", "{caption}", "--steps", "4", "--batch", "2", "--rank", rank]
        words += ["--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "2", "--schedule", "constant"]
        assert cli.main([*words, "--ema", "0.5", "--clip", "0", "--weight-decay", "0", "--precision", "fp32"]) == 0
        return log_in(tmp_path / name)

    return run


def test_it_has_a_part_in_the_loss_learns_and_is_in_the_log(train, monkeypatch):
    plain = train("plain")
    monkeypatch.setattr(table, "ADDITIONS", (Weighed, *table.ADDITIONS))
    rows = train("weighed")
    assert [row["taken"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] == pytest.approx(plain[0]["loss"] + 1, abs=1e-5)
    assert rows[0]["weighed"] == pytest.approx(0.1, abs=1e-4)  # AdamW's first step is its rate
    before = [0.0, *(row["weighed"] for row in rows[:-1])]
    own = [row["loss"] - (1 - weighed) ** 2 for row, weighed in zip(rows, before, strict=True)]
    assert own == pytest.approx([row["loss"] for row in plain], abs=1e-4)  # of the adapter it changes nothing


def test_it_is_resumed(train, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ADDITIONS", (Weighed, *table.ADDITIONS))
    whole = train("run")
    shutil.rmtree(tmp_path / "run/checkpoints/000004")
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert log_in(tmp_path / "run") == whole


def test_one_that_was_not_asked_for_takes_no_part(train, monkeypatch):
    monkeypatch.setattr(table, "ADDITIONS", (Weighed, *table.ADDITIONS))
    assert all("weighed" not in row for row in train("run", rank="1"))


class Tenth(Addition):
    """A tenth of the mean of its own errors."""

    def __init__(self, samples):
        self._samples = samples

    def samples(self, micro):
        return [type("Noised", (), {"batch": range(self._samples)})()]

    def loss(self, errors, batch):
        return errors.sum() / batch / 10


def test_each_of_several_is_given_the_errors_of_its_own_samples():
    added = Additions([Tenth(2), Addition(), Tenth(1)])
    assert [len(part.batch) for part in added.samples(None)] == [2, 1]
    added.each[2].loss = lambda errors, batch: errors.sum() * 100
    assert_close(added.loss(torch.tensor([1.0, 2.0, 4.0]), 2), torch.tensor(0.15 + 400.0))


def test_none_add_nothing():
    assert Additions().loss(torch.zeros(0), 4) == 0
    assert (Additions().figures(), Additions().kept(), Additions().groups()) == ({}, {}, [])
