"""Which weights of the pocket base learn, and by what optimizer."""

import pytest
import torch
from torch import nn

from sfumato.training.pretrain.outputs import PretrainState


@pytest.mark.parametrize(("optimizer", "decaying"), [("adamw", {"adamw": 2}), ("muon", {"adamw": 1, "muon": 1})])
def test_matrices_decay_and_biases_do_not_and_the_ends_are_adamws(optimizer, decaying):
    modules = {"a": nn.ModuleDict({"conv_in": nn.Linear(2, 3), "inner": nn.Linear(3, 3)})}
    how = {"learning_rate": 0.1, "weight_decay": 0.01, "ema": 0.0, "largest_norm": 1.0}
    made = PretrainState(modules, torch.device("cpu"), optimizer=optimizer, **how).optimizers
    groups = [(name, group) for name, each in made.items() for group in each.param_groups]
    decay = {(name, p.ndim): group["weight_decay"] for name, group in groups for p in group["params"]}
    assert decay == {**{(name, 2): 0.01 for name in decaying}, ("adamw", 1): 0.0}
    found = {name: len([p for p in group["params"] if p.ndim > 1]) for name, group in groups if group["weight_decay"]}
    assert found == decaying


def test_what_is_frozen_is_no_part_of_what_learns():
    modules = {"a": nn.Linear(2, 2).requires_grad_(False), "b": nn.Linear(2, 2)}
    how = {"learning_rate": 0.1, "weight_decay": 0.01, "ema": 0.9, "largest_norm": 1.0}
    trained = PretrainState(modules, torch.device("cpu"), optimizer="adamw", **how)
    assert list(trained.named) == ["b.weight", "b.bias"]
    assert sum(len(group["params"]) for group in trained.optimizers["adamw"].param_groups) == 2
