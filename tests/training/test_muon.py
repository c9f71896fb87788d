"""Muon: its formula, and how far it moves a weight."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.training.optim import muon
from sfumato.training.optim.muon import Muon, orthogonalize


@pytest.mark.parametrize("is_multiplied", [True, False])
@pytest.mark.parametrize("rows", [8, 70])
def test_orthogonal_brings_singular_values_near_one(monkeypatch, is_multiplied, rows):
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: is_multiplied)
    matrices = torch.randn(3, rows, 200, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


class TF32(TorchDispatchMode):
    """Products as a GPU has them where TF32 is on: of numbers that are rounded to 10 bits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.backends.cuda.matmul.fp32_precision != "ieee" and function in PRODUCTS:
            args = (*args[:-2], *(rounded(each) for each in args[-2:]))
        return function(*args, **(kwargs or {}))


PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default]


def rounded(x):
    return ((x.contiguous().view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def test_small_directions_stay_small_where_tf32_is_on(monkeypatch):
    before = torch.backends.cuda.matmul.allow_tf32
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 16, generator=generator))[0] for side in (16, 320))
    matrix = ((left * torch.logspace(0, -4, 16)) @ right.mT)[None]
    wanted = orthogonalize(matrix)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with TF32():
            assert (rounded(matrix) @ rounded(matrix.mT) - matrix @ matrix.mT).abs().max() < 1e-6  # the mode rounds
            found = orthogonalize(matrix)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_muon_moves_every_weight_by_a_fifth_of_its_rate():
    weight = torch.nn.Parameter(torch.zeros(16, 4, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.01, momentum=0.95, weight_decay=0.0).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.002, rel=0.2)


@pytest.mark.parametrize("shape", [(6, 20), (20, 2, 3, 3)])
def test_muon_is_its_formula(shape):
    """Jordan et al. 2024 with Nesterov's momentum: m <- b m + (1 - b) g; w <- w (1 - r d) - r 0.2 sqrt(max(shape))
    O((1 - b) g + b m), O from the singular value decomposition by five steps of 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
    rate, momentum, decay = 0.01, 0.9, 0.5
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = Muon([weight], lr=rate, momentum=momentum, weight_decay=decay)
    w, m = weight.detach().clone().flatten(1), torch.zeros(shape).flatten(1)
    for _ in range(3):
        weight.grad = torch.randn(shape, generator=generator)
        g = weight.grad.flatten(1)
        m = momentum * m + (1 - momentum) * g
        u, s, v = torch.linalg.svd((1 - momentum) * g + momentum * m, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        w = w * (1 - rate * decay) - rate * 0.2 * max(w.shape) ** 0.5 * (u * s) @ v
        optimizer.step()
        assert_close(weight.detach().flatten(1), w, rtol=0, atol=3e-4)  # bf16's rounding


@pytest.mark.parametrize("shape", [(4, 50), (50, 4), (7, 7)])
def test_few_rows_or_columns_come_to_the_same_by_their_products(monkeypatch, shape):
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: False)
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    by_gram = orthogonalize(matrices)
    monkeypatch.setattr(muon, "_FEW", 0)
    assert_close(by_gram, orthogonalize(matrices), rtol=0, atol=1e-4)


def test_matrices_of_one_shape_step_together_or_in_parts_alike(monkeypatch):
    def stepped():
        generator = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(4, 9, generator=generator)) for _ in range(5)]
        for weight in weights:
            weight.grad = torch.randn(4, 9, generator=generator)
        Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.1).step()
        return torch.stack(weights).detach()

    together = stepped()
    monkeypatch.setattr(muon, "_AT_ONCE", 2 * 36)
    assert_close(stepped(), together)


@pytest.mark.parametrize(
    ("shape", "settings", "share"),
    [((5,), {}, 0.2), ((5, 1, 1, 1), {}, 0.2), ((1, 5), {}, 0.2), ((3, 4), {"is_table": True}, 1.0)],
)
def test_what_is_no_matrix_takes_adamws_steps(shape, settings, share):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    same = torch.nn.Parameter(weight.detach().clone())
    optimizer = Muon([{"params": [weight], "lr": 0.1, **settings}], momentum=0.9, weight_decay=0.3)
    adamw = torch.optim.AdamW([same], lr=0.1 * share, betas=(0.9, 0.99), weight_decay=0.3)
    for _ in range(3):
        weight.grad = torch.randn(shape, generator=generator)
        same.grad = weight.grad.clone()
        optimizer.step()
        adamw.step()
        assert_close(weight, same)
