"""The tensor behind a layer's weight, and its shape as a change sees it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sfumato.precision import tensors


def test_the_shape_of_a_grouped_convolution_is_that_of_its_weight():
    layer = nn.Conv2d(8, 4, 3, groups=2)
    assert tensors.shape(layer) == tuple(layer.weight.shape) == (4, 4, 3, 3)


@pytest.mark.parametrize("others", [{}, {"weights_map": None}, {"weights_map": {}}])
def test_a_weight_that_is_elsewhere_is_found_behind_any_of_several_hooks(others):
    layer, weight = nn.Linear(2, 3, device="meta"), torch.ones(3, 2)
    hooks = [SimpleNamespace(**others), SimpleNamespace(weights_map={"weight": weight})]
    layer._hf_hook = SimpleNamespace(hooks=hooks)
    assert tensors.stored(layer, "weight") is weight
    assert tensors.stored(layer, "bias").is_meta  # in none of them
