"""How fast the pocket base learns at a step, and what is filled in where nothing is set."""

from types import SimpleNamespace

import pytest
import torch

from sfumato.training.pretrain.options import learning_rate_at, rate_at, resolve_for_device
from trainers.pretrain import Config


def test_the_rate_rises_stays_and_falls_to_nothing():
    config = Config(steps=100, warmup=10, fall_at=60)
    assert [rate_at(step, config) for step in (0, 9, 59, 80, 100)] == [0.1, 1.0, 1.0, 0.5, 0.0]


def test_a_run_that_went_back_learns_at_a_smaller_rate():
    config = Config(steps=100, warmup=10, fall_at=60, learning_rate=2e-3)
    step = SimpleNamespace(number=80, rate_factor=0.25)
    assert learning_rate_at(step, config) == pytest.approx(2e-3 * 0.5 * 0.25)


@pytest.mark.parametrize(("steps", "warmup", "fall_at"), [(500, 50, 166), (3000, 100, 1000)])
def test_what_is_unset_goes_by_the_steps_and_what_is_set_stays(steps, warmup, fall_at):
    config, precision = resolve_for_device(Config(steps=steps, device="cpu", precision="fp32"), learning_rate=3e-4)
    assert (config.warmup, config.fall_at, config.learning_rate) == (warmup, fall_at, 3e-4)
    assert (precision.device.type, precision.compute) == ("cpu", torch.float32)
    set_ = Config(steps=steps, device="cpu", precision="bf16", warmup=0, fall_at=1, learning_rate=1.0)
    config, precision = resolve_for_device(set_)
    assert (config.warmup, config.fall_at, config.learning_rate) == (0, 1, 1.0)
    assert precision.compute == torch.bfloat16
