"""The running mean of weights: its formula, and that showing it changes nothing."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sfumato import cli
from sfumato.files import read_tensors
from sfumato.runs.checkpoints import Checkpoints
from sfumato.training.optim import ema
from sfumato.training.optim.ema import Ema
from tests.logged import log_in


def test_the_mean_of_two_steps_written_out():
    """From 0 with decay 0.15: at first 1/10, then 0.15, which is below 2/11. w = 4, then 8 gives 3.6, then 7.34."""
    weight = nn.Parameter(torch.zeros(1))
    average = Ema([weight], 0.15)
    for value in (4.0, 8.0):
        weight.data.fill_(value)
        average.update()
    assert average.mean[0].item() == pytest.approx(7.34)
    with average.applied():
        assert weight.item() == pytest.approx(7.34)
    assert weight.item() == 8.0


def test_what_settles_is_its_mean_from_then_on():
    first, other = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    average = Ema([first, other], 0.5)
    for weight in (first, other):
        weight.data.fill_(10.0)
    average.update()
    average.settle([first])
    assert (first.tolist(), other.tolist()) == ([9.0, 9.0], [10.0, 10.0])
    assert [mean.tolist() for mean in average.mean] == [[9.0, 9.0]] * 2
    Ema([first], 0.0).settle([first])  # without a mean nothing settles
    assert first.tolist() == [9.0, 9.0]


def test_in_portions_it_is_the_same(monkeypatch):
    found = []
    for portion in (2**28, 40, 1):
        monkeypatch.setattr(ema, "PORTION", portion)
        weights = [nn.Parameter(torch.full((size,), float(size))) for size in (3, 8, 5, 1)]
        average = Ema(weights, 0.5)
        for weight in weights:
            weight.data.mul_(2)
        average.update()
        found.append(torch.cat(average.mean))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], torch.cat([weight.detach() for weight in weights]))


def test_without_decay_it_is_the_weights_and_keeps_nothing():
    weight = nn.Parameter(torch.ones(3))
    average = Ema([weight], 0.0)
    average.update()
    with average.applied():
        assert_close(weight.data, torch.ones(3))
    assert average.mean == []


def test_a_checkpoint_of_it_goes_on_where_it_was():
    weight = nn.Parameter(torch.ones(2))
    first, second = Ema([weight], 0.5), Ema([nn.Parameter(torch.zeros(2))], 0.5)
    weight.data.fill_(3.0)
    first.update()
    second.load_state_dict(first.state_dict())
    assert_close(second.mean[0], torch.full((2,), 2.8))
    for average in (first, second):
        average.averaged[0].data.fill_(7.0)
        average.update()
    assert_close(second.mean[0], first.mean[0])


def test_a_young_mean_forgets_its_start():
    """After n steps at most (1 + n) / (10 + n): of ten steps from 0 to 1 nearly all of the way, with any decay."""
    weight = nn.Parameter(torch.zeros(1))
    average = Ema([weight], 0.999)
    weight.data.fill_(1.0)
    left = 1.0
    for n in range(10):
        average.update()
        left *= (1 + n) / (10 + n)
    assert average.mean[0].item() == pytest.approx(1 - left)
    assert left < 1e-4


def test_what_does_not_learn_waits_and_is_young_when_its_turn_comes():
    waiting, learning = nn.Parameter(torch.zeros(1), requires_grad=False), nn.Parameter(torch.zeros(1))
    average, alone = Ema([waiting, learning], 0.999), Ema([learning], 0.999)
    for step in range(300):
        learning.data.fill_(step)
        for each in (average, alone):
            each.update()
    assert torch.equal(average.mean[1], alone.mean[0])
    waiting.requires_grad_(True)
    learning.requires_grad_(False)
    waiting.data.fill_(1.0)
    average.update()
    assert average.mean[0].item() == pytest.approx(0.9)  # as of a run that has just begun
    assert torch.equal(average.mean[1], alone.mean[0])


def test_a_checkpoint_that_does_not_count_goes_on_at_the_whole_decay():
    weight = nn.Parameter(torch.zeros(1))
    average = Ema([weight], 0.5)
    average.load_state_dict({"mean": [torch.ones(1)]})
    average.update()
    assert average.mean[0].item() == 0.5


def test_the_weights_come_back_when_the_block_fails():
    weight = nn.Parameter(torch.ones(1))
    average = Ema([weight], 0.5)
    weight.data.fill_(5.0)
    try:
        with average.applied():
            raise ValueError
    except ValueError:
        pass
    assert weight.item() == 5.0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("trainer", "own"),
    [
        ("lora", ("--caption", "{caption}", "--rank", "2")),
        pytest.param(
            "dreambooth",
            ("--instance-prompt", "sks square", "--class-name", "square", "--method", "lora", "--prior", "none"),
            marks=pytest.mark.slow,
        ),
        pytest.param("textual_inversion", ("--placeholder", "<x>"), marks=pytest.mark.slow),
    ],
)
def test_what_is_measured_drawn_and_kept_on_the_way_is_the_mean(trainer, own, pocket_folder, pictures, tmp_path):
    """With --ema all is as without before the first step, and after it what the mean makes of it, which is what the
    file holds in the end. A checkpoint has the mean, and all else that goes on."""
    words = ["--images", str(pictures), "--base", str(pocket_folder), "--steps", "1", "--batch", "1", *own]
    words += ["--learning-rate", "1", "--sample-prompts", "a red <x>", "--save-every", "1"]
    words += ["--measure-every", "1", "--sample-every", "1", "--checkpoint-every", "1"]
    fits, drawn, plain, mean = {}, {}, tmp_path / "plain", tmp_path / "mean"
    for folder, more in ((plain, []), (mean, ["--ema", "0.75"])):
        assert cli.main(["train", trainer, "--output", str(folder), *words, *more]) == 0
        log = log_in(folder)
        fits[folder] = [row["fit"] for row in log if "fit" in row]
        drawn[folder] = [(folder / "samples" / step / "0.png").read_bytes() for step in ("000000", "000001")]
    for before, after in ((fits[plain], fits[mean]), (drawn[plain], drawn[mean])):
        assert before[0] == after[0]
        assert before[1] != after[1]
    kept = Checkpoints(mean / "checkpoints").load(1)["kept"]
    assert kept.keys() > {"optimizer", "scaler", "average"}
    (path,) = (mean / "adapters").iterdir()
    on_the_way, last = read_tensors(path), read_tensors(mean / "mean.safetensors")
    others = read_tensors(plain / "plain.safetensors")
    assert on_the_way.keys() == last.keys()
    assert all(torch.equal(tensor, last[key]) for key, tensor in on_the_way.items())
    assert any(not torch.equal(tensor, others[key]) for key, tensor in last.items())


def test_weights_are_averaged_in_portions(monkeypatch):
    monkeypatch.setattr(ema, "PORTION", 6)
    assert list(ema._in_portions([0, 1, 2, 3], [3, 3, 3, 9])) == [[0, 1], [2], [3]]
