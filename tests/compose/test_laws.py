"""What holds whatever is done to a mix, and what its other methods do: mute, save, show."""

import random

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sfumato.adapters.weights import weight_at
from sfumato.compose import Adapter, compose
from sfumato.errors import AdapterError
from sfumato.files import read_header
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from tests.compose.conftest import fresh, layers, weights_sha
from tests.compose.test_kinds_mixed import difference

QUERY = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")


def query(pipe):
    return pipe.unet.get_submodule(QUERY[1]).weight


def random_steps(pipe, files, count, seed=0):
    """A mix after `count` random steps of adding, weighing, muting and removing."""
    dice = random.Random(seed)
    mix = compose(pipe)
    for _ in range(count):
        inside = list(mix.weights)
        outside = [name for name in files if name not in inside]
        step = dice.choice(["add", "weigh", "weigh", "mute", "remove"])
        if outside and (step == "add" or not inside):
            name = dice.choice(outside)
            mix.add(Adapter(files[name], dice.choice([0.0, 0.5, -0.3, 1.0]), name=name))
        elif step == "weigh":
            mix.set_weights({dice.choice(inside): dice.uniform(-1, 1)})
        elif step == "mute":
            dice.choice([mix.mute, mix.unmute])(dice.choice(inside))
        elif inside:
            mix.remove(dice.choice(inside))
    return mix


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_random_steps_of_eight_adapters_leave_the_base(sd1, write, dtype):
    sd1.unet.to(dtype)
    before = weights_sha(sd1)
    endings = ["attn1.to_q", "attn2.to_k", "mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in"]
    files = {f"f{i}": write(f"f{i}", sd1, *random.Random(i).sample(endings, 2), seed=i) for i in range(8)}
    mix = random_steps(sd1, files, 1000)
    mix.set_weights({label: 0.0 for label in mix.weights})
    assert weights_sha(sd1) == before
    mix.unmute().set_weights({label: 0.7 for label in mix.weights})
    mix.undo()
    assert weights_sha(sd1) == before


def test_after_any_steps_the_bytes_are_those_of_a_fresh_mix(originals, write):
    one, other = fresh(originals["sd1"]), fresh(originals["sd1"])
    files = {f"f{i}": write(f"f{i}", one, "attn1.to_q", "mid_block.resnets.0.conv1", seed=i) for i in range(4)}
    mix = random_steps(one, files, 60, seed=3).unmute()
    compose(other, *(Adapter(files[name], weight, name=name) for name, weight in reversed(mix.weights.items())))
    assert weights_sha(one) == weights_sha(other)


@pytest.mark.parametrize("way", ["baked", "live"])
def test_a_muted_adapter_does_nothing_and_comes_back(sd1, write, way):
    x = torch.randn(1, 3, 64)
    layer = sd1.unet.get_submodule(QUERY[1])
    with torch.no_grad():
        base = layer(x)
        mix = compose(sd1, Adapter(write("a", sd1), 0.8), Adapter(write("b", sd1, seed=2), 0.4), way=way)
        both = layer(x)
        mix.mute("b").set(a=0.0)
        assert torch.equal(layer(x), base)
        assert mix.weights == {"a": 0.0, "b": 0.4}
        assert "b 0.4 (muted)" in mix.describe()
        mix.unmute().set(a=0.8)
        assert torch.equal(layer(x), both)
        mix.mute()
        assert torch.equal(layer(x), base)


def test_the_saved_mix_is_the_mix(originals, write, tmp_path):
    """Two ranks, alphas and weights for each part, in one file that composes to the same sums."""
    one, other = fresh(originals["sd1"]), fresh(originals["sd1"])
    a, b = write("a", one, seed=1), write("b", one, "to_q", "conv1", "q_proj", seed=2, rank=5, alpha=1.0)
    mix = compose(one, Adapter(a, (0.8, 0.2)), Adapter(b, -0.5), Adapter(a, 0.3, name="twice"))
    file = mix.mute("twice").save(tmp_path / "mix.safetensors")
    compose(other, Adapter(file))
    for target, layer in layers(one).items():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            assert_close(layers(other)[target].weight, layer.weight, atol=1e-6, rtol=1e-6)
    assert '"a.safetensors"' in read_header(file).metadata["sfumato.parents"]


def test_what_diffusers_does_not_read_of_a_saved_mix_is_said(sd1, write, tmp_path, capsys):
    with compose(sd1, Adapter(write("a", sd1, "to_q"))) as mix:
        mix.save(tmp_path / "whole.safetensors")
    assert "diffusers" not in capsys.readouterr().err
    compose(sd1, Adapter(write("b", sd1, "to_q", "q_proj", "v_proj"))).save(tmp_path / "mix.safetensors")
    assert "mix.safetensors: diffusers" in capsys.readouterr().err


def test_a_mix_that_is_no_lora_is_not_saved_as_one(sd1, write, tmp_path):
    mix = compose(sd1, Adapter(write("a", sd1)), Adapter(difference(tmp_path, sd1), 0.5))
    with pytest.raises(AdapterError, match="norms is a difference"):
        mix.save(tmp_path / "mix.safetensors")
    mix.mute("norms").save(tmp_path / "mix.safetensors")
    with pytest.raises(AdapterError, match="nothing"):
        mix.mute().save(tmp_path / "nothing.safetensors")


def test_the_table_names_file_weight_kind_rank_modules_and_way(sd1, write):
    a = write("a", sd1, "attn1.to_q", "q_proj")
    text = compose(sd1, Adapter(a, (0.8, 0.2), name="line"), Adapter(a, 0.3, name="other")).mute("other").show()
    _, line, other, reason = text.splitlines()
    assert line.split() == ["line", "0.8:0.2", "a.safetensors", "LoRA", "3", "4", "2", "baked"]
    assert other.split()[:3] == ["other", "0.3", "(muted)"]
    assert reason == "6 weights baked in place (none is quantised, so this is exact, and drawing takes no longer)"


def test_the_reason_for_the_way_is_printed(sd1, write, capsys):
    compose(sd1, Adapter(write("a", sd1, "attn1.to_q"))).undo()
    assert "4 weights baked in place" in capsys.readouterr().err
    compose(sd1, Adapter(write("a", sd1, "attn1.to_q")), way="live")
    assert "4 layers live" in capsys.readouterr().err


@pytest.mark.parametrize("words_known", [False, True])
def test_words_that_a_file_brings_are_told_of_where_nobody_has_them_known(words_known, sd1, tmp_path, capsys):
    out, inner = query(sd1).shape
    lora = LoraModule(torch.ones(1, inner), torch.ones(out, 1), 1.0)
    rows = {"<fox>": {"text_encoder": torch.ones(1, 64)}}
    file = write_lora(tmp_path / "fox.safetensors", {QUERY: lora}, family="sd1", words=rows)
    compose(sd1, Adapter(file), words_known=words_known)
    assert ("fox: brings the words <fox>, which a mix leaves out" in capsys.readouterr().err) is not words_known


def test_a_way_that_is_none_is_refused(sd1):
    with pytest.raises(AdapterError, match="auto, baked, live"):
        compose(sd1, way="fast")


def test_weight_at_tells_unet_and_text_encoders_apart():
    assert weight_at((0.8, 0.4), "unet", "conv_in") == 0.8
    assert weight_at((0.8, 0.4), "text_encoder_2", "text_projection") == 0.4
    assert weight_at(0.6, "text_encoder", "encoder.layers.0.mlp.fc1") == 0.6
