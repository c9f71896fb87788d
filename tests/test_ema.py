"""The running mean of weights: its formula, and that showing it changes nothing."""

import torch
from torch import nn
from torch.testing import assert_close

from sfumato.ema import Average


def test_the_mean_of_two_steps_written_out():
    """From 0 with decay 0.75: w = 4, then 8 gives 1, then 0.75 + 2 = 2.75."""
    weight = nn.Parameter(torch.zeros(1))
    average = Average([weight], 0.75)
    for value in (4.0, 8.0):
        weight.data.fill_(value)
        average.update()
    assert average.mean[0].item() == 2.75
    with average.applied():
        assert weight.item() == 2.75
    assert weight.item() == 8.0


def test_without_decay_it_is_the_weights_and_keeps_nothing():
    weight = nn.Parameter(torch.ones(3))
    average = Average([weight], 0.0)
    average.update()
    with average.applied():
        assert_close(weight.data, torch.ones(3))
    assert average.mean == []


def test_a_checkpoint_of_it_goes_on_where_it_was():
    weight = nn.Parameter(torch.ones(2))
    first, second = Average([weight], 0.5), Average([nn.Parameter(torch.zeros(2))], 0.5)
    weight.data.fill_(3.0)
    first.update()
    second.load_state_dict(first.state_dict())
    assert_close(second.mean[0], torch.full((2,), 2.0))


def test_the_weights_come_back_when_the_block_fails():
    weight = nn.Parameter(torch.ones(1))
    average = Average([weight], 0.5)
    weight.data.fill_(5.0)
    try:
        with average.applied():
            raise ValueError
    except ValueError:
        pass
    assert weight.item() == 5.0
