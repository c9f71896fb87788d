"""Merging methods on matrices small enough to write the answer out, and beside peft where peft is right."""

from functools import partial
from typing import get_args, get_type_hints

import pytest
import torch
from peft.utils import merge_utils as peft
from sfumato.pipelines.merge import Config
from torch import tensor
from torch.testing import assert_close

from sfumato.errors import ConfigError
from sfumato.merging.factors import Factors
from sfumato.merging.methods import (
    DENSE,
    INSIDE,
    LOW_RANK,
    METHODS,
    MethodSettings,
    core_space,
    dare,
    dare_ties,
    drop_and_rescale,
    keep_largest,
    knots,
    linear,
    linear_factors,
    magnitude,
    np_lora,
    ties,
)
from sfumato.utils import randomness


def draws(seed=0):
    return randomness.generator(seed, "test")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


def random_factors(seed, out=6, inner=5, rank=2):
    return Factors(random(out, rank, seed=seed), random(rank, inner, seed=seed + 100))


A, B = tensor([[4.0, -1.0], [0.5, -2.0]]), tensor([[-2.0, -3.0], [1.0, 0.25]])


def test_half_of_each_is_the_mean():
    merged = linear([tensor([[2.0, 0.0]]), tensor([[0.0, 4.0]])], [0.5, 0.5])
    assert_close(merged, tensor([[1.0, 2.0]]))


def test_the_weighted_sum_of_factors_is_that_of_the_deltas():
    terms = [random_factors(1), random_factors(2, rank=3)]
    merged = linear_factors(terms, [0.8, -0.6])
    assert merged.rank == 5
    assert_close(merged.delta(), linear([term.delta() for term in terms], [0.8, -0.6]))


def test_the_largest_entries_are_kept():
    assert_close(keep_largest(A, 0.5), tensor([[4.0, 0.0], [0.0, -2.0]]))
    assert_close(keep_largest(A, 0.1), tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert_close(keep_largest(A, 0.7), keep_largest(A, 0.5))  # int(2.8), as peft and TIES' own code
    assert keep_largest(A, 1.0) is A


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5])
def test_a_density_that_is_none_is_refused(density):
    with pytest.raises(ConfigError, match="density"):
        keep_largest(A, density)


def test_magnitude_sums_what_is_kept():
    # kept: A 4, -2; B -2, -3
    assert_close(magnitude([A, B], [1.0, 0.5], density=0.5), tensor([[3.0, -1.5], [0.0, -2.0]]))


def test_ties_is_the_mean_of_those_that_agree_with_the_elected_sign():
    # trimmed: A [[4, 0], [0, -2]], B [[-2, -3], [0, 0]]; elected: + - + -
    assert_close(ties([A, B], [1.0, 1.0], density=0.5), tensor([[4.0, -3.0], [0.0, -2.0]]))


def test_equal_votes_elect_plus_as_in_peft():
    assert ties([tensor([[2.0]]), tensor([[-2.0]])], [1.0, 1.0], density=1.0).item() == 2


def test_ties_takes_the_mean_where_all_agree():
    assert_close(ties([tensor([[2.0]]), tensor([[4.0]])], [1.0, 0.5], density=1.0), tensor([[2.0]]))


def test_a_delta_of_weight_0_neither_votes_nor_counts_in_ties():
    assert_close(ties([A, 100 * B], [0.7, 0.0], density=1.0), 0.7 * A)


def test_a_negative_weight_turns_the_vote_in_ties():
    # weighted entries 1 and -3: minus is elected
    assert_close(ties([tensor([[1.0]]), tensor([[3.0]])], [1.0, -1.0], density=1.0), tensor([[-3.0]]))


def test_dare_keeps_the_mean_and_drops_the_share():
    ones = torch.ones(200, 200)
    thinned = drop_and_rescale(ones, 0.25, draws())
    assert set(thinned.unique().tolist()) == {0.0, 4.0}
    assert abs(float(thinned.mean()) - 1) < 0.03


def test_dare_depends_on_its_draws_alone():
    first, second = (dare([A, B], [1.0, 1.0], density=0.5, generator=draws(3)) for _ in range(2))
    assert torch.equal(first, second)
    big = random(50, 50)
    assert not torch.equal(drop_and_rescale(big, 0.5, draws(3)), drop_and_rescale(big, 0.5, draws(4)))


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_as_peft_for_equal_positive_weights(name):
    deltas, weights, density = [random(12, 9, seed=i).float() for i in range(3)], [0.7] * 3, 0.4
    ours = {
        "ties": partial(ties, density=density),
        "magnitude_prune": partial(magnitude, density=density),
        "dare_linear": partial(dare, density=density, generator=torch.Generator().manual_seed(5)),
        "dare_ties": partial(dare_ties, density=density, generator=torch.Generator().manual_seed(5)),
    }[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # peft draws from the global generator
        theirs = getattr(peft, name)(deltas, torch.tensor(weights), density)
    assert_close(ours(deltas, weights), theirs)


@pytest.mark.parametrize("method", [knots, core_space])
def test_a_joint_basis_loses_nothing(method):
    terms = [random_factors(1), random_factors(2, rank=3), random_factors(3, rank=1)]
    merged = method(terms, [0.8, 0.5, -1.0], linear)
    assert merged.rank <= 6
    assert_close(merged.delta(), linear([term.delta() for term in terms], [0.8, 0.5, -1.0]))


@pytest.mark.parametrize("method", [knots, core_space])
def test_a_joint_basis_takes_what_two_share_once(method):
    term = random_factors(1, out=8, inner=8)
    assert method([term, term], [0.5, 0.5], linear).rank == 2


def test_knots_merges_the_right_components_of_one_svd():
    terms = [random_factors(1), random_factors(2)]
    u, s, vh = torch.linalg.svd(torch.cat([term.delta() for term in terms], 1), full_matrices=False)
    u, s, vh = u[:, :4], s[:4], vh[:4]
    inner = partial(ties, density=0.4)
    scaled = torch.diag(s) @ vh  # as the authors' task_merger.py: `V = torch.diag(s) @ V`
    wanted = u @ inner([scaled[:, :5], scaled[:, 5:]], [1.0, 1.0])
    assert_close(knots(terms, [1.0, 1.0], inner).delta(), wanted)


def test_core_space_merges_coordinates():
    # disjoint input and output directions: the cores have one entry each, so ties changes nothing
    first = Factors(tensor([[1.0], [0.0]]).double(), tensor([[2.0, 0.0]]).double())
    second = Factors(tensor([[0.0], [1.0]]).double(), tensor([[0.0, 3.0]]).double())
    merged = core_space([first, second], [1.0, 1.0], partial(ties, density=1.0))
    assert_close(merged.delta(), tensor([[2.0, 0.0], [0.0, 3.0]]).double())


def test_np_lora_takes_the_style_out_of_the_subject():
    style = Factors(tensor([[1.0], [0.0]]).double(), tensor([[1.0, 0.0, 0.0]]).double())
    subject = Factors(tensor([[0.0], [1.0]]).double(), tensor([[2.0, 3.0, 0.0]]).double())
    merged = np_lora([style, subject], [1.0, 0.5])
    assert_close(merged.delta(), tensor([[1.0, 0.0, 0.0], [0.0, 1.5, 0.0]]).double())
    soft = np_lora([style, subject], [1.0, 0.5], strength=3.0)  # 2 / (1 + 3) is left of the 2
    assert_close(soft.delta(), tensor([[1.0, 0.0, 0.0], [0.25, 1.5, 0.0]]).double())


def test_np_lora_leaves_the_style_as_it_was_on_its_own_inputs():
    style, subject = random_factors(1), random_factors(2)
    merged = np_lora([style, subject], [0.9, 0.7], keep_energy=1.0).delta()
    own = style.down.T
    assert_close(merged @ own, 0.9 * style.delta() @ own)


def test_np_lora_takes_nothing_for_a_style_that_changes_nothing():
    style, subject = random_factors(1), random_factors(2)
    idle = Factors(torch.zeros_like(style.up), style.down)
    assert_close(np_lora([idle, subject], [1.0, 1.0]).delta(), subject.delta())


@pytest.mark.parametrize("name", [*DENSE, *LOW_RANK])
def test_one_adapter_at_density_1_is_itself_in_every_method(name):
    term, settings = random_factors(4), MethodSettings(density=1.0)
    if name in DENSE:
        merged = DENSE[name](settings, draws())([term.delta()], [0.8])
    else:
        merged = LOW_RANK[name](settings, draws())([term], [0.8]).delta()
    assert_close(merged, 0.8 * term.delta())


def test_the_command_has_every_method():
    hints = get_type_hints(Config)
    assert set(get_args(hints["method"])) == set(METHODS)
    assert set(get_args(hints["inside"])) == set(INSIDE)


def test_np_lora_keeps_as_many_directions_of_the_style_and_as_strongly_as_it_is_told():
    style = Factors(torch.eye(2).double(), torch.diag(torch.tensor([10.0, 1.0])).double())
    subject = Factors(torch.eye(2).double(), torch.eye(2).double())
    cases = [
        (MethodSettings(null_energy=0.9), [0.0, 1.0]),
        (MethodSettings(null_energy=1.0, null_strength=3.0), [0.25, 0.25]),
    ]
    for settings, wanted in cases:
        merged = LOW_RANK["np-lora"](settings, torch.Generator())([style, subject], [1.0, 1.0])
        assert_close(merged.delta() - style.delta(), torch.diag(torch.tensor(wanted)).double())


def test_np_lora_counts_shared_directions_once():
    style, other = random_factors(1, inner=8), random_factors(2, inner=8)
    merged = np_lora([style, style, other], [1.0, 1.0, 1.0], keep_energy=1.0).delta()
    assert_close(merged, np_lora([style, other], [1.0, 1.0], keep_energy=1.0).delta())


@pytest.mark.parametrize("name", ["knots", "core-space"])
def test_what_is_done_inside_is_by_ties(name):
    one, other = (Factors(torch.tensor([[n]]).double(), torch.tensor([[1.0]]).double()) for n in (1.0, -3.0))
    merged = LOW_RANK[name](MethodSettings(density=1.0), torch.Generator())([one, other], [1.0, 1.0])
    assert merged.delta().item() == pytest.approx(-3)
