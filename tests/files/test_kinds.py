"""The tables of kinds: what roles and shapes tell of an adapter."""

import pytest
import torch

from sfumato.files import read_adapter
from sfumato.files.keys import KIND_KEYS, base_kind, is_complete, kind_of, rank_of, weight_shape
from sfumato.files.kinds import KINDS
from sfumato.files.kinds.ia3 import Difference
from sfumato.files.kinds.lokr import Factor, Lokr
from sfumato.files.kinds.oft import skew
from sfumato.files.norms import _SQUARES
from sfumato.files.save import write_tensors


@pytest.mark.parametrize(
    ("roles", "kind", "whole"),
    [
        ("down up alpha", "LoRA", True),
        ("down", "LoRA", False),
        ("down up magnitude", "DoRA", True),
        ("magnitude", "DoRA", False),
        ("hada_w1_a peft_magnitude", "DoRA of LoHa", False),
        ("oft_blocks", "OFT", True),
        ("oft_r down", "LoRA + OFT", True),
        ("bias", "difference", True),
        ("alpha", "", True),
    ],
)
def test_roles_make_a_kind(roles, kind, whole):
    assert kind_of(roles.split()) == kind
    assert is_complete(kind, roles.split()) is whole


def test_four_dimensions_make_oft_boft():
    assert [kind_of(["oft_blocks"], dimensions) for dimensions in (None, 3, 4)] == ["OFT", "OFT", "BOFT"]
    assert is_complete("BOFT", ["oft_blocks"])
    assert not is_complete("BOFT", ["boft_r"])
    assert [base_kind(kind) for kind in ("DoRA", "DoRA of LoKr", "OFT")] == ["LoRA", "LoKr", "OFT"]


@pytest.mark.parametrize(
    ("shapes", "weight", "rank"),
    [
        ({"down": (2, 8), "up": (6, 2)}, (6, 8), 2),
        ({"up": (6, 2)}, (6, None), None),
        ({"down": (2, 8)}, (None, 8), 2),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 8)}, (6, 8), 2),
        ({"hada_w1_a": (2, 6), "hada_w1_b": (2, 8), "hada_t1": (2, 2, 3, 3)}, (6, 8), 2),
        ({"lokr_w1": (2, 4), "lokr_w2": (3, 5)}, (6, 20), None),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (3, 7), "lokr_w2_b": (7, 5)}, (6, 20), 7),
        ({"lokr_w1": (2, 4), "lokr_w2_a": (7, 3), "lokr_w2_b": (7, 5), "lokr_t2": (7, 7, 3, 3)}, (6, 20), 7),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 4), "lokr_w2": (3, 5)}, (6, 20), 1),
        ({"lokr_w1": (2, 4)}, (None, None), None),
        ({"diff": (6, 8)}, (6, 8), None),
        ({"set_weight": (6, 8, 3, 3)}, (6, 8), None),
        ({"diff": (6,)}, (6, None), None),
        ({"a1": (8, 2), "a2": (2, 8), "b1": (6, 2), "b2": (2, 8)}, (6, 8), 2),
        ({"a1": (2, 8), "a2": (8, 2), "b1": (2, 8), "b2": (6, 2)}, (6, 8), 2),
        ({"oft_blocks": (2, 3, 3)}, (6, None), 3),
        ({"oft_blocks": (5, 2, 3, 3)}, (6, None), 3),
        ({"oft_r": (2, 6)}, (None, None), 4),
        ({"boft_r": (1, 2, 5, 5), "boft_s": (6,)}, (None, None), 5),
        ({"down": (), "up": ()}, (None, None), None),
    ],
)
def test_what_the_shapes_tell(shapes, weight, rank):
    assert weight_shape(shapes) == weight
    assert rank_of(shapes) == rank


def test_each_kind_that_is_read_is_applied_and_measured():
    assert {kind for kind, row in KIND_KEYS.items() if row.module is None} == set(KINDS) == set(_SQUARES)


def test_what_fits_a_weight_is_told_by_its_factors():
    change = Lokr(Factor(torch.ones(2, 3)), Factor(torch.ones(3, 12)), 1.0)
    assert change.fits((6, 9, 2, 2))
    assert change.fits((6, 4, 3, 3))  # as ComfyUI takes it, with a channel's kernel on both sides of a factor's edge
    assert not change.fits((6, 5, 3, 3))
    assert not Difference(None, torch.ones(3)).fits((6, 8))


def test_an_oft_s_constraint_is_the_norm_that_it_has_at_most():
    blocks = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    norm = float(skew(blocks, None, always=False).norm())
    assert float(skew(blocks, norm / 1.5, always=False).norm()) == pytest.approx(norm / 1.5)


def test_a_dora_of_a_weight_of_zeros_is_finite(tmp_path):
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        "lora_down.weight": torch.zeros(1, 4),
        "lora_up.weight": torch.zeros(4, 1),
        "dora_scale": torch.ones(1, 4),
    }
    file = write_tensors(tmp_path / "a.safetensors", {f"{flat}.{name}": value for name, value in tensors.items()})
    (change,) = read_adapter(file).changes.values()
    assert torch.isfinite(change.delta(torch.zeros(4, 4))).all()
