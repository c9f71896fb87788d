"""Fused backward-and-step: the same weights as the two apart, never more than one gradient, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from sfumato.errors import ConfigError
from sfumato.training.optim.fused_backward import FusedBackwardPass, check_fused
from sfumato.training.optim.optimizers import LearningRateSchedule, build_optimizer, clip_grad_norm


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2))


def groups(net):
    return [{"params": list(net[0].parameters()), "lr": 1e-2}, {"params": list(net[2:].parameters()), "lr": 1e-3}]


def batch(step: int) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(step))


def healthy(**numbers):
    return True


def run(net, optimizer, steps, fused=None, *, limit=0.0):
    schedule = LearningRateSchedule(optimizer, "cosine", 4, 1)
    norms = []
    for step in steps:
        schedule.set(step)
        loss = net(batch(step)).square().mean()
        if fused is None:
            loss.backward()
            norms.append(clip_grad_norm(net.parameters(), limit))
            optimizer.step()
            optimizer.zero_grad()
        else:
            norms.append(fused.backward(loss, limit=limit, healthy=healthy))
    return norms


@pytest.mark.parametrize("limit", [0.0, 0.05])
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion"])
def test_weights_and_norms_are_those_of_backward_then_step(name, limit):
    plain, other = model(), model()
    one, two = (build_optimizer(name, groups(net), weight_decay=0.01) for net in (plain, other))
    norms = run(plain, one, range(4), limit=limit)
    assert run(other, two, range(4), FusedBackwardPass(two), limit=limit) == norms
    assert min(norms) > 0.05  # so that all of the steps are clipped, where any is
    for weight, same in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same)


def test_fp16s_steps_and_its_scale_are_those_of_backward_then_step():
    """Also where gradients overflow, which lowers the scale until they do not, and where it grows again."""
    plain, other = model(), model()
    one, two = (build_optimizer("adamw", groups(net), weight_decay=0.01) for net in (plain, other))
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3) for _ in range(2)]
    fused, scales = FusedBackwardPass(two, scalers[1]), []
    for step in range(12):
        losses = []
        for net in (plain, other):
            with torch.autocast("cpu", dtype=torch.float16):
                losses.append(net(batch(step)).float().square().mean())
        scalers[0].scale(losses[0]).backward()
        scalers[0].unscale_(one)
        norm = clip_grad_norm(plain.parameters(), 0.05)
        scalers[0].step(one)
        one.zero_grad()
        found = fused.backward(losses[1], limit=0.05, healthy=healthy)
        assert torch.equal(found.isfinite(), norm.isfinite())
        for scaler in scalers:
            scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        scales.append(scalers[0].get_scale())
        for weight, same in zip(plain.parameters(), other.parameters(), strict=True):
            assert torch.equal(weight, same)
    assert scales[0] < 2.0**20
    assert scales[5] > scales[4] == min(scales)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_an_unhealthy_step_changes_nothing_and_keeps_no_gradient(limit):
    net = model()
    before, told = copy.deepcopy(net), []
    fused = FusedBackwardPass(build_optimizer("adamw", groups(net), weight_decay=0.01))
    loss = net(batch(0)).square().mean()
    fused.backward(loss, limit=limit, healthy=lambda **numbers: told.append(numbers))
    assert [set(numbers) for numbers in told] == [{"loss", "gradient_norm"} if limit else {"loss"}]
    for weight, same in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(weight, same)
        assert weight.grad is None


@pytest.mark.parametrize(("limit", "passes"), [(0.0, 1), (1.0, 2)])
def test_only_one_gradient_is_alive_at_a_time(limit, passes):
    net = model()
    fused = FusedBackwardPass(build_optimizer("adamw", groups(net), weight_decay=0.0))
    alive = []
    for parameter in net.parameters():  # hooks run in order, so these see the gradients before ours frees its own
        parameter.register_hook(lambda _: alive.append(sum(p.grad is not None for p in net.parameters())))
    fused.backward(net(batch(0)).square().mean(), limit=limit, healthy=healthy)
    assert len(alive) == 6 * passes
    assert max(alive) == 0
    assert all(p.grad is None for p in net.parameters())


def test_a_weight_used_twice_steps_once_with_both_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            return x @ self.weight @ self.weight

    nets = [Twice(), Twice()]
    for net, fuse in zip(nets, (False, True), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        loss = net(torch.eye(3)).square().sum()
        if fuse:
            FusedBackwardPass(optimizer).backward(loss, limit=0.0, healthy=healthy)
        else:
            loss.backward()
            optimizer.step()
    assert torch.equal(nets[0].weight, nets[1].weight)


def test_its_state_goes_on_in_a_run_that_is_not_fused():
    whole, parts = model(), model()
    one, two = (build_optimizer("adamw", groups(net), weight_decay=0.01) for net in (whole, parts))
    run(whole, one, range(4))
    fused = FusedBackwardPass(two)
    run(parts, two, range(2), fused)
    plain = copy.deepcopy(parts)
    again = build_optimizer("adamw", groups(plain), weight_decay=0.01)
    again.load_state_dict(two.state_dict())
    run(plain, again, range(2, 4))
    for a, b in zip(whole.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"accumulate": 2}, "--accumulate 2"),
        ({"processes": 2}, "2 processes"),
        ({"optimizer": "prodigy"}, "--optimizer prodigy"),
        ({"scaled": True}, "--precision fp16"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused_by_name(option, named):
    fine = {"accumulate": 1, "processes": 1, "optimizer": "adamw"}
    check_fused(**fine)
    with pytest.raises(ConfigError, match=named):
        check_fused(**(fine | option))
