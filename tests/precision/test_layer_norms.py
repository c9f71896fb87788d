"""Layer norms on a CPU in bf16: torch's values, and gradients of their weights that do not stop growing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sfumato import load_base
from sfumato.precision import decide, layer_norms
from tests.tiny import CPU


def normal(norm: nn.LayerNorm, x: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the norm makes of x, and the gradients of x and of what learns."""
    x = x.detach().clone().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        drawn = norm(x)
    learns = [weight for weight in norm.parameters() if weight.requires_grad]
    return drawn.detach(), list(torch.autograd.grad(drawn, [x, *learns], grad.to(drawn.dtype)))


@pytest.fixture
def pair() -> tuple[nn.LayerNorm, nn.LayerNorm]:
    """A norm whose weights are not ones and zeros, and the same as sfumato has it."""
    torch.manual_seed(0)
    plain = nn.LayerNorm(64)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours = copy.deepcopy(plain)
    layer_norms.use_fp32_norm_gradients(ours)
    return plain, ours


def rows(count: int) -> tuple[Tensor, Tensor]:
    """(x, gradient) of (4, count / 4, 64), whose columns do not sum to nothing."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(4, count // 4, 64, generator=generator) for _ in range(2))
    return x, grad + 0.3


@pytest.mark.parametrize("count", [64, 16384])
def test_gradients_in_bf16_are_those_of_fp32_however_many_rows_there_are(pair, count):
    plain, ours = pair
    x, grad = rows(count)
    x = x.bfloat16()
    _, wanted = normal(plain, x.float(), grad.bfloat16().float())
    _, found = normal(ours, x, grad)
    for one, other in zip(found, wanted, strict=True):
        assert (one.float() - other).norm() < (0.01 if one.dtype == torch.bfloat16 else 0.001) * other.norm()
    assert [weight.dtype for weight in found] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("learns", [True, False])
def test_values_and_the_gradient_of_what_comes_in_are_torchs_bits(pair, dtype, learns):
    plain, ours = (norm.requires_grad_(learns) for norm in pair)
    x, grad = rows(256)
    drawn, (of_x, *_) = normal(ours, x.to(dtype), grad)
    wanted, (of_x_wanted, *_) = normal(plain, x.to(dtype), grad)
    assert torch.equal(drawn, wanted)
    assert torch.equal(of_x, of_x_wanted)


def test_a_norm_over_several_sides_is_left_alone():
    norm = nn.LayerNorm((2, 8))
    layer_norms.use_fp32_norm_gradients(norm)
    x = torch.randn(3, 2, 8).bfloat16().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm(x).sum().backward()
    assert norm.weight.grad.shape == (2, 8)


def test_a_copy_learns_its_own_weights(pair):
    _, ours = pair
    copied = copy.deepcopy(ours)
    x, grad = rows(64)
    nn.init.ones_(copied.weight)
    assert not torch.equal(normal(copied, x.bfloat16(), grad)[0], normal(ours, x.bfloat16(), grad)[0])


def test_a_loaded_base_has_them_and_so_has_a_new_one_that_learns(tmp_path):
    base = load_base("pocket", precision=CPU)
    found = [m for part in (base.unet, base.text_encoders[0]) for m in part.modules() if isinstance(m, nn.LayerNorm)]
    assert found
    assert all("forward" in vars(module) for module in found)
    new = nn.Sequential(nn.LayerNorm(8))
    decide("bf16", device="cpu").prepare_for_training(new)
    assert "forward" in vars(new[0])
