"""Low-rank algebra without the dense delta."""

import pytest
import torch
from torch.testing import assert_close

from sfumato.errors import AdapterError
from sfumato.files.kinds import LoraModule
from sfumato.merging.factors import (
    KEEP_ALL,
    Budget,
    Factors,
    factorise,
    from_module,
    inner_product,
    randomised_svd,
    significant_svd,
    to_module,
    truncate,
)
from sfumato.utils import randomness


def random(*shape, seed=0):
    return torch.randn(*shape, generator=randomness.generator(seed, "test"), dtype=torch.float64)


def draws():
    return randomness.generator(0, "draws")


def test_truncation_is_that_of_the_dense_svd():
    factors = Factors(random(9, 6), random(6, 7, seed=1))
    u, s, vh = torch.linalg.svd(factors.delta())
    found, share = truncate(factors, Budget(rank=2))
    assert_close(found.delta(), u[:, :2] @ torch.diag(s[:2]) @ vh[:2])
    assert share == pytest.approx(float(s[:2].square().sum() / s.square().sum()))


def test_a_share_of_energy_takes_as_few_directions_as_hold_it():
    factors = Factors(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3))  # energies 9, 4, 1
    assert truncate(factors, Budget(keep_energy=0.6))[0].rank == 1
    assert truncate(factors, Budget(keep_energy=0.92))[0].rank == 2
    assert truncate(factors, Budget(keep_energy=0.93))[0].rank == 3
    assert truncate(factors, Budget(rank=1, keep_energy=0.93))[0].rank == 1


def test_keeping_all_of_the_energy_is_exact():
    factors = Factors(random(8, 5), random(5, 8, seed=1))
    found, share = truncate(factors, Budget(keep_energy=1.0))
    assert_close(found.delta(), factors.delta())
    assert share == pytest.approx(1)


def test_ranks_beyond_the_matrix_fold_down_to_it():
    factors = Factors(random(3, 10), random(10, 4, seed=1))
    found, _ = truncate(factors, KEEP_ALL)
    assert found.rank == 3
    assert_close(found.delta(), factors.delta())


def test_a_delta_of_nothing_keeps_all_of_it():
    found, share = truncate(Factors(torch.zeros(4, 2), random(2, 4).float()), Budget(keep_energy=0.9))
    assert found.rank == 1
    assert share == 1
    assert not found.delta().any()


@pytest.mark.parametrize("budget", [dict(rank=0), dict(keep_energy=0.0), dict(keep_energy=1.1)])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(AdapterError, match="wanted"):
        Budget(**budget)


def test_energy_and_inner_product_are_those_of_the_deltas():
    first, second = Factors(random(6, 2), random(2, 5, seed=1)), Factors(random(6, 3, seed=2), random(3, 5, seed=3))
    assert first.energy() == pytest.approx(float(first.delta().square().sum()))
    assert inner_product(first, second) == pytest.approx(float((first.delta() * second.delta()).sum()))


def test_a_dense_delta_of_low_rank_is_found_whole():
    delta = random(7, 3) @ random(3, 9, seed=1)
    found, share = factorise(delta, Budget(keep_energy=0.999999), draws())
    assert found.rank == 3
    assert_close(found.delta(), delta)
    assert share == pytest.approx(1)


def falling(rows, columns, seed=0):
    """A large matrix with singular values 1, 1/2, 1/4, ..."""
    q = torch.linalg.qr(random(rows, 30, seed=seed)).Q
    p = torch.linalg.qr(random(columns, 30, seed=seed + 1)).Q
    return q @ torch.diag(0.5 ** torch.arange(30).double()) @ p.T


def test_the_randomised_svd_finds_the_leading_part():
    u, s, vh = randomised_svd(falling(640, 700), 6, draws())
    assert_close(s, 0.5 ** torch.arange(6).double())
    assert_close(u.T @ u, torch.eye(6).double())
    assert_close(vh @ vh.T, torch.eye(6).double())


def test_of_singular_values_that_hardly_fall_the_randomised_svd_finds_the_largest_too():
    """As of a fine-tuned weight: without power steps it would find half of their energy."""
    delta = random(540, 560)
    found = randomised_svd(delta, 8, draws())[1].square().sum()
    assert found >= 0.9 * torch.linalg.svdvals(delta)[:8].square().sum()


def test_a_large_delta_is_factored_like_a_small_one():
    delta = falling(640, 700)
    found, share = factorise(delta, Budget(rank=4), draws())
    assert found.rank == 4
    assert share == pytest.approx(1 - 0.25**4, rel=1e-6)
    assert float((found.delta() - delta).square().sum()) == pytest.approx(float(delta.square().sum()) * (1 - share))


def test_a_large_delta_grows_until_it_holds_the_share():
    wide = random(600, 40) @ random(40, 620, seed=1)
    found, share = factorise(wide, Budget(keep_energy=0.9999), draws())
    assert 32 < found.rank <= 40
    assert share >= 0.9999


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1, 1), (6, 5, 3, 3)])
def test_module_and_factors_are_one_delta(shape):
    inner = shape[1:]
    module = LoraModule(random(2, *inner).float(), random(6, 2, *(1 for _ in inner[1:]), seed=1).float(), alpha=3.0)
    again = to_module(from_module(module, weight=0.5), shape)
    assert again.down.shape == module.down.shape
    assert again.up.shape == module.up.shape
    assert_close(again.delta(), 0.5 * module.delta())


def test_directions_are_significant_beside_the_largest_however_small_that_is():
    assert len(significant_svd(1e-12 * torch.diag(torch.tensor([4.0, 2.0, 0.0])).double())[1]) == 2
    assert len(significant_svd(torch.diag(torch.tensor([1.0, 1e-4])).double())[1]) == 2


def test_a_tucker_core_and_a_bias_are_kept():
    bias = torch.arange(4.0)
    module = LoraModule(torch.randn(2, 3, 1, 1), torch.randn(4, 2, 1, 1), 2.0, torch.randn(2, 2, 3, 3), bias)
    assert torch.equal(module.plain().bias_delta, bias)
    assert_close(from_module(module).delta().float(), module.delta().flatten(1))
