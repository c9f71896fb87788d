"""Weights by block: which module is in which block, in three spellings, and what the mix makes of it."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sfumato.adapters.blocks import LBW_PRESETS, LISTS, Blocks, lbw_block
from sfumato.adapters.weights import weight_at
from sfumato.compose import Adapter, compose
from sfumato.errors import AdapterError
from tests.compose.conftest import weights_sha


@pytest.mark.parametrize(
    ("path", "block"),
    [
        # sgm's input_blocks.4.1, middle_block.1, output_blocks.5.1 and output_blocks.5.2 (an upsampler), SD 1.x
        ("conv_in", "IN00"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "IN02"),
        ("down_blocks.0.downsamplers.0.conv", "IN03"),
        ("down_blocks.1.attentions.0.proj_in", "IN04"),
        ("down_blocks.2.resnets.1.conv1", "IN08"),
        ("down_blocks.3.resnets.1.conv2", "IN11"),
        ("mid_block.attentions.0.proj_out", "M00"),
        ("up_blocks.1.attentions.2.proj_in", "OUT05"),
        ("up_blocks.1.upsamplers.0.conv", "OUT05"),
        ("up_blocks.3.attentions.2.proj_in", "OUT11"),
        ("time_embedding.linear_1", None),
    ],
)
def test_web_interfaces_count_a_level_as_three_blocks(path, block):
    assert lbw_block("unet", path) == block


def test_the_text_encoders_are_the_base():
    assert lbw_block("text_encoder", "text_model.encoder.layers.0.mlp.fc1") == "BASE"


def test_lists_have_the_lengths_that_name_them():
    assert all(len(names) == len(set(names)) == length for length, names in LISTS.items())


@pytest.mark.parametrize(
    ("length", "names"),
    [
        (12, "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"),
        (
            20,
            "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 M00 "
            "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08",
        ),
    ],
)
def test_lists_of_sdxl_name_its_blocks_as_the_web_interfaces_do(length, names):
    assert LISTS[length] == tuple(names.split())


@pytest.mark.parametrize(
    ("preset", "whole"),
    [
        ("NONE", ""),
        ("ALL", "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"),
        ("INS", "BASE IN01 IN02 IN04"),
        ("IND", "BASE IN05 IN07 IN08"),
        ("INALL", "BASE IN01 IN02 IN04 IN05 IN07 IN08"),
        ("MIDD", "BASE IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06"),
        ("OUTD", "BASE OUT03 OUT04 OUT05 OUT06"),
        ("OUTS", "BASE OUT07 OUT08 OUT09 OUT10 OUT11"),
        ("OUTALL", "BASE OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"),
    ],
)
def test_a_preset_takes_its_blocks_whole_and_nothing_of_the_others(preset, whole):
    factors = dict(Blocks.parse(0.5, preset).factors)
    assert {name for name, factor in factors.items() if factor == 1} == set(whole.split())
    assert set(factors.values()) <= {0, 1}


def test_half_of_all_is_the_only_other_preset():
    factors = dict(Blocks.parse(0.5, "ALL0.5").factors)
    assert {name for name, factor in factors.items() if factor == 0.5} == set(LISTS[17])
    assert set(LBW_PRESETS) == {"NONE", "ALL", "INS", "IND", "INALL", "MIDD", "OUTD", "OUTS", "OUTALL", "ALL0.5"}


def test_the_longest_name_counts_and_the_rest_has_its_own_factor():
    blocks = Blocks(0.5, {"up": 0.0, "up.1": 2.0, "te": 0.4}, rest=1.0)
    assert weight_at(blocks, "unet", "up_blocks.0.resnets.0.conv1") == 0.0
    assert weight_at(blocks, "unet", "up_blocks.1.resnets.0.conv1") == 1.0
    assert weight_at(blocks, "unet", "up_blocks.11.resnets.0.conv1") == 0.0
    assert weight_at(blocks, "unet", "mid_block.resnets.0.conv1") == 0.5
    assert weight_at(blocks, "text_encoder", "encoder.layers.0.mlp.fc1") == 0.2


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(2)])
def test_factors_are_any_real_numbers_as_weights_are(number):
    assert Blocks(number, {"up": number}, number) == Blocks(float(number), {"up": float(number)}, float(number))


def test_a_list_of_seventeen_numbers_is_sd_15s():
    """The published preset OUTALL: nothing of the inputs and the middle, all outputs, and the text encoders."""
    outs = Blocks.parse(1.0, "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1")
    assert weight_at(outs, "unet", "up_blocks.1.attentions.0.proj_in") == 1.0
    assert weight_at(outs, "unet", "down_blocks.1.attentions.0.proj_in") == 0.0
    assert weight_at(outs, "text_encoder", "encoder.layers.0.mlp.fc1") == 1.0
    assert weight_at(outs, "unet", "up_blocks.0.resnets.0.conv1") == 0.0  # OUT00, which the list leaves out
    assert weight_at(outs, "unet", "time_embedding.linear_1") == 1.0  # in no block


def test_b_loras_style_is_one_block_of_sdxl():
    style = Blocks.parse(0.7, "b-lora-style")
    assert weight_at(style, "unet", "up_blocks.0.attentions.1.transformer_blocks.3.attn2.to_k") == 0.7
    assert weight_at(style, "unet", "up_blocks.0.attentions.0.transformer_blocks.3.attn2.to_k") == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "MIDD",
        "ALL0.5",
        "b-lora-content",
        "down:0,up.1:1.2",
        "rest:0,mid:1",
        "rest:1",
        "up:0.1234567,rest:-0.00000025",
        ",".join(["0.25"] * 26),
    ],
)
def test_factors_are_written_as_they_are_read(text):
    blocks = Blocks.parse(0.8, text)
    assert Blocks.parse(0.8, blocks.factors_text()) == blocks
    commas = {"MIDD": 16, "ALL0.5": 16, "b-lora-content": 1}.get(text, text.count(","))
    assert blocks.factors_text().count(",") == commas


@pytest.mark.parametrize("text", ["", "up", "up:strong", "1,0,1", "up:nan"])
def test_what_names_no_blocks_is_refused(text):
    with pytest.raises(AdapterError, match="blocks"):
        Blocks.parse(1.0, text)


def test_a_block_that_the_pipeline_lacks_is_refused_and_changes_nothing(sd1, write):
    before = weights_sha(sd1)
    path = write("a", sd1)
    for blocks in (Blocks(1.0, {"upp": 0.0}), Blocks.parse(1.0, "b-lora-style")):  # SD 1.x has no attention there
        with pytest.raises(AdapterError, match=r"^a: blocks up.*: no module of this pipeline"):
            compose(sd1, Adapter(path, blocks))
    assert weights_sha(sd1) == before
    with compose(sd1, Adapter(path, Blocks.parse(1.0, "MIDD"))) as mix:
        mixed = weights_sha(sd1)
        with pytest.raises(AdapterError, match="blocks dwon"):
            mix.set(a=Blocks(1.0, {"dwon": 0.0}))
        assert weights_sha(sd1) == mixed


def test_a_mix_takes_each_block_at_its_weight_and_undoes_it(sd1, write):
    """down at 0 keeps the base's bytes; up at 2 has twice the delta of the plain mix at 1."""
    before = weights_sha(sd1)
    original = {name: value.clone() for name, value in sd1.unet.state_dict().items()}
    path = write("a", sd1)
    with compose(sd1, Adapter(path, 1.0)):
        whole = {name: value.clone() for name, value in sd1.unet.state_dict().items()}
    with compose(sd1, Adapter(path, Blocks(1.0, {"down": 0.0, "up": 2.0}))) as mix:
        state = sd1.unet.state_dict()
        for name, value in state.items():
            times = 0.0 if name.startswith("down_blocks") else 2.0 if name.startswith("up_blocks") else 1.0
            assert_close(value - original[name], times * (whole[name] - original[name]), atol=1e-6, rtol=1e-4)
        mix.set(a=0.0)
        assert all(torch.equal(value, original[name]) for name, value in sd1.unet.state_dict().items())
    assert weights_sha(sd1) == before
