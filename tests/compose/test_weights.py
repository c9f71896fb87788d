"""Weights and factors as scripts give them, and a base as they copy it."""

import copy

import pytest
import torch

from sfumato import load_base
from sfumato.adapters.blocks import Blocks
from sfumato.compose import Adapter
from sfumato.errors import AdapterError
from tests.tiny import CPU


@pytest.mark.parametrize("weight", [10**400, -(10**400), float("nan"), float("inf"), 10.5])
def test_a_weight_beyond_the_limits_is_one_line(weight):
    with pytest.raises(
        AdapterError, match=r"line: weight .{1,40} is outside -10 to 10\. Most adapters want"
    ) as refused:
        Adapter("line.safetensors", weight)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("factors", ["down:0", {3: 1.0}, [1.0], [("down", 1.0, 2.0)]])
def test_factors_of_blocks_are_by_name(factors):
    with pytest.raises(AdapterError, match="wanted factors by name"):
        Blocks(1.0, factors)


def test_a_base_is_copied_whole(pocket_folder):
    base = load_base(str(pocket_folder), precision=CPU)
    again = copy.deepcopy(base)
    assert again.unet is not base.unet
    assert again.precision.reasons == base.precision.reasons
    assert torch.equal(again.encode_text(["a crab"]).hidden, base.encode_text(["a crab"]).hidden)
