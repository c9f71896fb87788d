"""A layer and its update as one product: values and gradients of two, and when two are the way."""

import copy

import pytest
import torch
from torch import nn

from sfumato.adapters import attach
from sfumato.adapters.layers import fused_output

HOSTS = {
    "linear, wide": (nn.Linear(48, 40), (3, 80, 48)),
    "linear, narrow": (nn.Linear(6, 5, bias=False), (2, 30, 6)),
    "convolution, wide": (nn.Conv2d(24, 20, 3, padding=1), (2, 24, 12, 12)),
    "convolution, narrow": (nn.Conv2d(4, 3, 3, padding=1), (2, 4, 9, 9)),
    "convolution, every second pixel": (nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), (2, 8, 24, 24)),
    "convolution of single pixels": (nn.Conv2d(24, 20, 1), (2, 24, 8, 8)),
}
RANK, SCALE = 2, 0.7


def a_case(name):
    """The frozen layer, A, B and an input; all but the layer have gradients."""
    host, shape = HOSTS[name]
    host = copy.deepcopy(host).requires_grad_(False)
    draws = torch.Generator().manual_seed(1)
    down = torch.randn(RANK, *host.weight.shape[1:], generator=draws)
    up = torch.randn(len(host.weight), RANK, *(1 for _ in host.weight.shape[2:]), generator=draws)
    return host, *(x.requires_grad_() for x in (down, up, torch.randn(shape, generator=draws)))


def two_products(host, down, up, x):
    if isinstance(host, nn.Linear):
        return host(x) + nn.functional.linear(nn.functional.linear(x, down), up) * SCALE
    low = nn.functional.conv2d(x, down, None, host.stride, host.padding)
    return host(x) + nn.functional.conv2d(low, up) * SCALE


@pytest.mark.parametrize("name", HOSTS)
def test_values_and_gradients_are_those_of_two_products(name):
    host, *learned = a_case(name)
    one = fused_output(host, *learned[:2], SCALE, learned[2])
    assert one is not None
    exact = [x.detach().double().requires_grad_() for x in learned]
    two = two_products(copy.deepcopy(host).double(), *exact)
    weights = torch.randn(two.shape, generator=torch.Generator().manual_seed(2))
    found = (one, *torch.autograd.grad((one * weights).sum(), learned))
    wanted = (two, *torch.autograd.grad((two * weights).sum(), exact))
    for ours, true in zip(found, wanted, strict=True):
        assert (ours - true).norm() < 1e-6 * true.norm()


@pytest.mark.parametrize("name", HOSTS)
def test_only_the_gradients_that_are_wanted_are_computed(name):
    host, down, up, x = a_case(name)
    whole = torch.autograd.grad(fused_output(host, down, up, SCALE, x).sum(), (down, up, x))
    (alone,) = torch.autograd.grad(fused_output(host, down.detach(), up.detach(), SCALE, x).sum(), (x,))
    assert torch.equal(alone, whole[2])
    of_update = torch.autograd.grad(fused_output(host, down, up, SCALE, x.detach()).sum(), (down, up))
    assert all(torch.equal(a, b) for a, b in zip(of_update, whole, strict=False))


def test_few_rows_are_two_products():
    host, down, up, x = a_case("linear, wide")
    assert fused_output(host, down, up, SCALE, x[:1, :21]) is None
    assert fused_output(host, down, up, SCALE, x) is not None


class Doubled(nn.Linear):
    """As a quantised layer, one that computes in a way of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("wrong", ["half", "trained", "of another class", "autocast", "reflected", "grouped"])
def test_what_is_no_frozen_fp32_layer_of_torchs_is_two_products(wrong):
    host, down, up, x = a_case("convolution, wide" if wrong in ("reflected", "grouped") else "linear, wide")
    if wrong == "half":
        host, x = host.to(torch.bfloat16), x.to(torch.bfloat16)
    elif wrong == "trained":
        host.bias.requires_grad_(True)
    elif wrong == "of another class":
        host = Doubled(48, 40).requires_grad_(False)
    elif wrong == "reflected":
        host.padding_mode = "reflect"
    elif wrong == "grouped":
        host = nn.Conv2d(24, 20, 3, padding=1, groups=2).requires_grad_(False)
    with torch.autocast("cpu", enabled=wrong == "autocast"):
        assert fused_output(host, down, up, SCALE, x) is None


def test_a_copy_of_an_adapted_layer_is_of_its_own():
    block = nn.ModuleDict({"to_q": nn.Linear(6, 5)}).requires_grad_(False)
    lora = attach({"unet": {"to_q": block["to_q"]}}, rank=2, alpha=2.0)
    nn.init.normal_(lora.layers["unet", "to_q"].up)
    x = torch.randn(40, 6)
    before, other = block["to_q"](x), copy.deepcopy(block)
    block["to_q"].weight.zero_()
    lora.layers["unet", "to_q"].up.data.zero_()
    assert torch.equal(other["to_q"](x), before)
    assert not torch.equal(block["to_q"](x), before)
