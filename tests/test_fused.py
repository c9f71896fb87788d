"""Fused backward-and-step: the same weights as the two apart, never more than one gradient, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from sfumato.errors import ConfigError
from sfumato.fused import FusedStep, check
from sfumato.optimizers import Schedule, build


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2))


def groups(net):
    return [{"params": list(net[0].parameters()), "lr": 1e-2}, {"params": list(net[2:].parameters()), "lr": 1e-3}]


def batch(step: int) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(step))


def run(net, optimizer, steps, fused=None):
    schedule = Schedule(optimizer, "cosine", 4, 1)
    norms = []
    for step in steps:
        schedule.set(step)
        net(batch(step)).square().mean().backward()
        if fused is None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]))
            optimizer.step()
            optimizer.zero_grad()
        else:
            norms.append(fused.norm())
    return norms


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_weights_and_norms_are_those_of_backward_then_step(name):
    plain, other = model(), model()
    optimizers = [build(name, groups(net), weight_decay=0.01) for net in (plain, other)]
    norms = run(plain, optimizers[0], range(4)), run(other, optimizers[1], range(4), FusedStep(optimizers[1]))
    torch.testing.assert_close(norms[1], norms[0])
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_only_one_gradient_is_alive_at_a_time():
    net = model()
    FusedStep(build("adamw", groups(net), weight_decay=0.0))
    alive = []
    for parameter in net.parameters():  # hooks run in order, so these see the gradients before ours frees its own
        parameter.register_hook(lambda _: alive.append(sum(p.grad is not None for p in net.parameters())))
    net(batch(0)).square().mean().backward()
    assert len(alive) == 6
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
        if fuse:
            FusedStep(optimizer)
        net(torch.eye(3)).square().sum().backward()
        if not fuse:
            optimizer.step()
    assert torch.equal(nets[0].weight, nets[1].weight)


def test_its_state_goes_on_in_a_run_that_is_not_fused():
    whole, parts = model(), model()
    one, two = (build("adamw", groups(net), weight_decay=0.01) for net in (whole, parts))
    run(whole, one, range(4))
    fused = FusedStep(two)
    run(parts, two, range(2), fused)
    plain = copy.deepcopy(parts)
    again = build("adamw", groups(plain), weight_decay=0.01)
    again.load_state_dict(two.state_dict())
    run(plain, again, range(2, 4))
    for a, b in zip(whole.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"clip": 1.0}, "--clip 1"),
        ({"accumulate": 2}, "--accumulate 2"),
        ({"processes": 2}, "2 processes"),
        ({"optimizer": "prodigy"}, "--optimizer prodigy"),
        ({"scaled": True}, "--precision fp16"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused_by_name(option, named):
    fine = {"clip": 0.0, "accumulate": 1, "processes": 1, "optimizer": "adamw"}
    check(**fine)
    with pytest.raises(ConfigError, match=named):
        check(**(fine | option))
