"""The loss of preferences, its figures, and what it is measured against."""

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from sfumato.adapters import attach, target_layers
from sfumato.models import load_base
from sfumato.training.methods.dpo import (
    ReferenceAdapter,
    RewardedPairs,
    preference_loss,
    preference_margin,
    reward_figures,
)
from tests.tiny import CPU


def test_the_loss_is_equation_14():
    """Errors 0.30 and 0.50 now, 0.32 and 0.49 before: 2000 / 2 of 0.02 + 0.01."""
    margin = preference_margin(tensor([0.30 - 0.32]), tensor([0.50 - 0.49]), beta=2000.0)
    assert_close(margin, tensor([30.0]))
    small = preference_margin(tensor([-0.02]), tensor([0.01]), beta=100.0)
    assert_close(preference_loss(small), tensor([math.log(1 + math.exp(-1.5))]))


def test_an_adapter_of_nothing_has_the_loss_log_2_and_swapping_a_pair_turns_its_margin_round():
    nothing = torch.zeros(3)
    assert_close(preference_loss(preference_margin(nothing, nothing, 5000.0)), torch.full((3,), math.log(2)))
    one, other = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert_close(preference_margin(one, other, 7.0), -preference_margin(other, one, 7.0))


def test_figures():
    errors = (tensor([0.1, 0.2]), tensor([0.6, 0.6]), tensor([0.2, 0.4]), tensor([0.4, 0.4]))
    sums = RewardedPairs(torch.zeros(2), tensor([3.0, 0.0]), *errors).sums()
    assert {name: float(value) for name, value in reward_figures(sums, 2).items()} == pytest.approx(
        {"accuracy": 0.75, "margin": 1.5, "preferred": 0.5, "rejected": 1.5}
    )


@pytest.mark.parametrize("begun", ["nothing", "something"])
def test_the_start_is_the_model_before_and_leaves_no_trace(begun, pocket_folder):
    base = load_base(str(pocket_folder), precision=CPU)
    lora = attach(target_layers(base.parts(text=False), "cross-attention"), rank=2, alpha=2.0, dropout=0.5)
    at, noisy = torch.tensor([500]), torch.ones(1, 4, 16, 16)
    text = base.encode_text(["a dot"])

    def said():
        return base.predict(noisy, at, text, None).detach()

    if begun == "something":
        for layer in lora.layers.values():
            layer.up.data += 0.3
    lora.eval()
    before = said()
    start = ReferenceAdapter(lora, from_nothing=begun == "nothing")
    for layer in lora.layers.values():
        layer.up.data += 0.2
    after = said()
    lora.train()
    with start.applied():  # in which nothing is dropped
        assert torch.equal(said(), before)
        assert not base.predict(noisy, at, text, None).requires_grad
    assert lora.training
    assert all(parameter.requires_grad for parameter in lora.parameters())
    lora.eval()
    assert torch.equal(said(), after)
    assert not torch.equal(before, after)
