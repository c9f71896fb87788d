"""The tensor behind a layer's weight, and its shape as a change sees it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sfumato.precision import quantization


def test_the_shape_of_a_grouped_convolution_is_that_of_its_weight():
    layer = nn.Conv2d(8, 4, 3, groups=2)
    assert quantization.module_weight_shape(layer) == tuple(layer.weight.shape) == (4, 4, 3, 3)


class Quantised(torch.Tensor):
    """Of a class of its own, as libraries have them whose numbers are stored in another way."""


@pytest.mark.parametrize(
    ("weight", "plain", "narrowed"),
    [
        (torch.zeros(3, 2), True, False),
        (torch.zeros(3, 2, dtype=torch.bfloat16), True, False),
        (torch.zeros(3, 2, dtype=torch.float8_e4m3fn), False, True),
        (torch.zeros(3, 2, dtype=torch.int8), False, False),
        (torch.zeros(3, 2).as_subclass(Quantised), False, False),
        (None, False, False),
    ],
)
def test_numbers_that_can_be_summed_into_are_told_from_those_that_cannot(weight, plain, narrowed):
    assert quantization.is_plain_float(weight) is plain
    assert quantization.is_layerwise_cast(nn.Linear(2, 3), weight) is narrowed
    assert not quantization.is_layerwise_cast(nn.Embedding(3, 2), weight)


@pytest.mark.parametrize("others", [{}, {"weights_map": None}, {"weights_map": {}}])
def test_a_weight_that_is_elsewhere_is_found_behind_any_of_several_hooks(others):
    layer, weight = nn.Linear(2, 3, device="meta"), torch.ones(3, 2)
    hooks = [SimpleNamespace(**others), SimpleNamespace(weights_map={"weight": weight})]
    layer._hf_hook = SimpleNamespace(hooks=hooks)
    assert quantization.stored_tensor(layer, "weight") is weight
    assert quantization.stored_tensor(layer, "bias").is_meta  # in none of them
