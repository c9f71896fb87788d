"""Randomness depends on its arguments and on nothing else."""

import torch

from sfumato.utils import randomness


def test_a_draw_does_not_depend_on_draws_before_it():
    alone = randomness.normal((3,), 1, "noise", 5, 2)
    torch.manual_seed(99)
    for index in range(10):
        randomness.normal((3,), 1, "noise", 5, index)
    assert torch.equal(alone, randomness.normal((3,), 1, "noise", 5, 2))


def test_every_argument_matters():
    draws = [
        randomness.normal((4,), *key).tolist()
        for key in [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    ]
    assert len({tuple(draw) for draw in draws}) == 5


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    randomness.permutation(10, 0, "order")
    assert torch.equal(torch.rand(2), expected)


def test_the_numbers_of_a_seed_never_change():
    """A golden value: resuming a run with a later version must see the same noise."""
    assert randomness.permutation(6, 7, "order", 1) == PERMUTATION
    assert round(randomness.uniform(7, "timesteps", 3, 2), 6) == UNIFORM


PERMUTATION = [1, 0, 4, 5, 3, 2]
UNIFORM = 0.364003
