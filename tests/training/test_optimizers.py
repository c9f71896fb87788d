"""Rates, clipping and what is said of an optimizer that is not there."""

import importlib.util
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import get_cosine_with_hard_restarts_schedule_with_warmup

from sfumato.errors import PrecisionError
from sfumato.runs.checkpoints import CheckpointedParts
from sfumato.training.optim import optimizers


def test_warm_up_rises_to_the_peak_and_cosine_falls_to_nothing():
    rates = [optimizers.rate_factor("cosine", step, 12, 2) for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert_close(rates[7], 0.5)
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.03


def test_constant_stays_and_linear_is_half_way_in_the_middle():
    assert optimizers.rate_factor("constant", 99, 100, 0) == 1.0
    assert optimizers.rate_factor("linear", 50, 100, 0) == 0.5


@pytest.mark.parametrize(("warmup", "cycles"), [(0, 1), (0, 3), (2, 2)])
def test_cosine_with_cycles_is_transformers_cosine_with_hard_restarts(warmup, cycles):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, warmup, 14, cycles)
    for step in range(warmup, 14):  # in the warm-up theirs begins at 0
        wanted = theirs.lr_lambdas[0](step)
        assert optimizers.rate_factor("cosine", step, 14, warmup, cycles) == pytest.approx(wanted)


def test_each_cycle_falls_from_the_peak():
    assert [optimizers.rate_factor("linear", step, 8, 0, 2) for step in range(8)] == [1, 0.75, 0.5, 0.25] * 2


def test_clipping_clips_the_norm_of_all_gradients_together():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    norm = optimizers.clip_grad_norm(iter([a, b]), 1.0)
    assert norm.item() == 5.0
    assert_close(torch.cat([a.grad, b.grad]), torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)


def test_a_small_gradient_and_a_limit_of_zero_change_nothing():
    for limit in (1.0, 0.0):
        p = nn.Parameter(torch.zeros(1))
        p.grad = torch.tensor([0.5])
        optimizers.clip_grad_norm([p], limit)
        assert p.grad.item() == 0.5


def test_the_schedule_moves_each_group_by_its_own_peak():
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = optimizers.build_optimizer(
        "adamw", [{"params": [p], "lr": 2.0}, {"params": [q], "lr": 0.1}], weight_decay=0.0
    )
    schedule = optimizers.LearningRateSchedule(optimizer, "linear", 10, 0)
    schedule.set(5)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.05]
    schedule.set(5, scale=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.025]
    assert schedule.rate == 0.5  # what is shown and logged


def test_each_turn_of_a_schedule_rises_and_falls():
    optimizer = optimizers.build_optimizer(
        "adamw", [{"params": [nn.Parameter(torch.zeros(1))], "lr": 2.0}], weight_decay=0.0
    )
    schedule = optimizers.LearningRateSchedule(optimizer, "linear", 6, 1, second=2)
    rates = []
    for step in range(6):
        schedule.set(step)
        rates.append(schedule.rate)
    assert rates == pytest.approx([2.0, 2.0, 2.0, 2.0, 4 / 3, 2 / 3])


def test_the_unet_and_both_text_encoders_have_their_own_rates():
    p, q, r = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    parts = {"unet": [p], "text_encoder": [q], "text_encoder_2": [r]}
    found = optimizers.parameter_groups(parts, 1e-3, 1e-4)
    assert [(group["lr"], [id(each) for each in group["params"]]) for group in found] == [
        (1e-3, [id(p)]),
        (1e-4, [id(q), id(r)]),
    ]
    assert [group["lr"] for group in optimizers.parameter_groups({"unet": [p]}, 1e-3, None)] == [1e-3]


def test_lora_plus_gives_b_a_rate_of_its_own():
    a, b, text_a, text_b = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    parts = {"unet": [a, b], "text_encoder": [text_a, text_b]}
    found = optimizers.parameter_groups(parts, 1e-3, 1e-4, ups=[b, text_b], up_ratio=4)
    assert [(group["lr"], [id(each) for each in group["params"]]) for group in found] == [
        (1e-3, [id(a)]),
        (4e-3, [id(b)]),
        (1e-4, [id(text_a)]),
        (4e-4, [id(text_b)]),
    ]


def test_a_factor_is_of_the_rate_of_a_part_and_of_lora_plus():
    a, b, c, text = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    parts = {"unet": [a, b, c], "text_encoder": [text]}
    found = optimizers.parameter_groups(parts, 1e-3, 1e-4, ups=[b, c], up_ratio=4, factors={a: 0.5, b: 0.5, text: 2.0})
    assert [(group["lr"], [id(each) for each in group["params"]]) for group in found] == [
        (4e-3, [id(c)]),
        (5e-4, [id(a)]),
        (2e-3, [id(b)]),
        (2e-4, [id(text)]),
    ]


def test_the_rate_that_is_told_is_without_a_factor():
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW(optimizers.parameter_groups({"unet": [p]}, 1e-3, None, factors={p: 0.5}))
    schedule = optimizers.LearningRateSchedule(optimizer, "constant", 10, 0)
    schedule.set(0)
    assert (schedule.rate, optimizer.param_groups[0]["lr"]) == (1e-3, 5e-4)


def test_a_package_that_is_broken_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "prodigyopt.py").write_text("raise OSError('libcudart.so.12: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "prodigyopt", raising=False)
    with pytest.raises(PrecisionError, match=r"cannot be loaded \(libcudart\.so\.12: no such file\): pip"):
        optimizers.build_optimizer("prodigy", [{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0}], weight_decay=0.0)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("prodigy", "prodigyopt", "prodigy"), ("lion", "lion_pytorch", "lion"), ("adamw8bit", "bitsandbytes", "8bit")],
)
def test_an_extra_steps_or_says_how_to_get_it(name, package, extra):
    p = nn.Parameter(torch.ones(64, 64))
    groups = [{"params": [p], "lr": 0.1}]
    if importlib.util.find_spec(package) is None:
        with pytest.raises(PrecisionError, match=rf"sfumato\[{extra}\]"):
            optimizers.build_optimizer(name, groups, weight_decay=0.0)
        return
    optimizer = optimizers.build_optimizer(name, groups, weight_decay=0.0)
    p.square().sum().backward()
    optimizer.step()
    assert (p < 1).all()
    in_8_bits = {state.dtype for state in optimizer.state[p].values() if getattr(state, "shape", None) == p.shape}
    assert in_8_bits == ({torch.uint8} if name == "adamw8bit" else {torch.float32})


def test_adafactor_steps_as_written_in_its_paper():
    """Algorithm 4 of Shazeer & Stern 2018, with the rate given: factored second moments, updates clipped at RMS 1."""
    torch.manual_seed(0)
    weight, rows, columns = torch.randn(3, 4), torch.zeros(3), torch.zeros(4)
    p = nn.Parameter(weight.clone())
    optimizer = optimizers.build_optimizer("adafactor", [{"params": [p], "lr": 0.1}], weight_decay=0.0)
    for step in range(1, 5):
        p.grad = torch.randn(3, 4) * step**2
        square, beta = p.grad.square() + 1e-30, 1 - step**-0.8
        rows, columns = (beta * old + (1 - beta) * square.mean(at) for old, at in ((rows, 1), (columns, 0)))
        update = p.grad / (rows[:, None] * columns / rows.mean()).sqrt()
        weight = weight - 0.1 * update / update.square().mean().sqrt().clamp(min=1.0)
        optimizer.step()
        assert_close(p.data, weight)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion", "prodigy"])
@pytest.mark.parametrize("shape", [(64, 96), (8, 4, 3, 3), (7,)])
def test_the_state_takes_what_is_told_before(name, shape):
    if name in ("lion", "prodigy"):
        pytest.importorskip({"lion": "lion_pytorch", "prodigy": "prodigyopt"}[name])
    p = nn.Parameter(torch.ones(shape))
    optimizer = optimizers.build_optimizer(name, [{"params": [p], "lr": 0.1}], weight_decay=0.0)
    checkpoint = CheckpointedParts()
    checkpoint.parts["optimizer"] = optimizer
    assert checkpoint.future_bytes() == optimizers.state_bytes(name, shape)
    p.square().sum().backward()
    optimizer.step()
    assert checkpoint.future_bytes() == 0
    kept = [each for each in optimizer.state[p].values() if isinstance(each, torch.Tensor) and each.ndim]
    assert sum(each.nbytes for each in kept) == optimizers.state_bytes(name, shape)
