"""What is dropped of an adapter in a step, or crossed with the base: the same on every run, and of that step alone."""

import shutil

import pytest
import torch
from torch.testing import assert_close

from sfumato.files import read_lora, read_tensors
from sfumato.utils import randomness
from tests.logged import log_beside

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.slow
def test_crossed_samples_are_the_same_on_every_run_and_do_something(train, pictures, tmp_path):
    images = tmp_path / "two"  # each is drawn over
    images.mkdir()
    for name in ("red-square.png", "gold-square.png"):
        shutil.copy(pictures / name, images)
    plain = ("--steps", "2", "--images", str(images))
    crossed = (*plain, "--crossed-share", "1", "--flip")
    one, two, three = (
        read_tensors(train(name, *words)) for name, words in {"a": crossed, "b": crossed, "c": plain}.items()
    )
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    assert any(not torch.equal(tensor, three[key]) for key, tensor in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--dropout", "--rank-dropout", "--module-dropout"])
def test_dropout_is_the_same_on_every_run_and_does_something(option, train):
    first = train("a", "--steps", "2", option, "0.5")
    torch.manual_seed(123)
    second, without = train("b", "--steps", "2", option, "0.5"), train("c", "--steps", "2")
    one, two, three = (read_tensors(path) for path in (first, second, without))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    assert any(not torch.equal(tensor, three[key]) for key, tensor in one.items())


@pytest.mark.parametrize(
    "optimizer", ["adamw", *(pytest.param(each, marks=pytest.mark.slow) for each in ("adafactor", "muon"))]
)
def test_what_module_dropout_leaves_out_of_a_step_stays_as_it_is(optimizer, train):
    """Weight decay moves it no more than a gradient does; the first step changes all that is left."""
    shared = ("--steps", "1", "--optimizer", optimizer, "--weight-decay", "0.5")
    plain = read_lora(train("plain", *shared)).modules
    found = read_lora(train("run", *shared, "--module-dropout", "0.5")).modules
    out = {(part, path) for part, path in found if randomness.uniform(0, f"module dropout/{part}/{path}", 0) < 0.5}
    assert 0 < len(out) < len(found)
    assert {key for key, module in found.items() if not module.up.any()} == out
    start = read_lora(train("start", *shared[:4], "--learning-rate", "1e-30")).modules
    assert all(torch.equal(module.down, start[key].down) == (key in out) for key, module in found.items())
    assert not any(torch.equal(module.down, start[key].down) for key, module in plain.items())


def test_samples_and_measures_are_of_the_whole_adapter(train):
    """What is dropped is dropped of a step alone: an adapter that goes on is measured as it was left."""
    first = train("first", "--measure-every", "4")
    dropped = ("--dropout", "0.9", "--rank-dropout", "0.9", "--module-dropout", "0.9")
    second = train("second", "--init-from", str(first), "--measure-every", "4", *dropped)
    fits = [[row["fit"] for row in log_beside(path) if "fit" in row] for path in (first, second)]
    assert_close(fits[1][0], fits[0][-1], rtol=1e-6, atol=0)
    assert fits[0][0] != fits[0][-1]


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [("--dropout", "0.5"), ("--rank-dropout", "0.5", "--module-dropout", "0.5")])
def test_what_is_dropped_is_the_same_where_activations_are_computed_twice(dropout, train):
    once, twice = train("once", *dropout), train("twice", *dropout, "--gradient-checkpointing")
    for key, tensor in read_tensors(once).items():
        assert_close(tensor, read_tensors(twice)[key], rtol=1e-3, atol=1e-6)
