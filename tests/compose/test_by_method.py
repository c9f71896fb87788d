"""Adapters merged for as long as a block lasts."""

import pytest
import torch
from torch.testing import assert_close

from sfumato.adapters.blocks import Blocks
from sfumato.compose import Adapter, compose, current
from sfumato.compose.by_method import by_method
from sfumato.errors import AdapterError
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from sfumato.merging.factors import Budget
from sfumato.merging.methods import METHODS
from tests.compose.conftest import weights_sha
from tests.compose.test_per_picture import predict


@pytest.fixture
def pair(sd1, write):
    a, b = (write(name, sd1, "to_v", "fc1", seed=seed) for seed, name in enumerate("ab"))
    return Adapter(a, 0.8), Adapter(b, (-0.5, 0.3))


def test_linear_is_the_plain_mix_and_the_bytes_come_back(sd1, pair):
    before = weights_sha(sd1)
    with compose(sd1, *pair):
        wanted, text = predict(sd1, [0]), sd1.text_encoder(torch.ones(1, 77, dtype=torch.long))[0]
    with by_method(sd1, *pair, method="linear"):
        assert_close(predict(sd1, [0]), wanted, atol=1e-5, rtol=1e-5)
        assert_close(sd1.text_encoder(torch.ones(1, 77, dtype=torch.long))[0], text, atol=1e-5, rtol=1e-5)
    assert current(sd1) is None
    assert weights_sha(sd1) == before


@pytest.mark.parametrize("method", [method for method in METHODS if method != "linear"])
def test_each_method_differs_from_the_sum(sd1, pair, method):
    with compose(sd1, *pair):
        summed = predict(sd1, [0])
    with by_method(sd1, *pair, method=method):
        assert (predict(sd1, [0]) - summed).abs().max() > 1e-4


def test_adapters_of_weight_0_are_not_there(sd1, pair):
    base = predict(sd1, [0])
    with by_method(sd1, *(Adapter(each.path, 0.0) for each in pair), method="ties"):
        assert torch.equal(predict(sd1, [0]), base)


@pytest.mark.parametrize("weight", [(0.0, 0.5), Blocks(0.0, {"down": 2.0})])
def test_weights_that_count_nowhere_in_what_files_hold_are_the_base(sd1, write, weight):
    """As in a plain mix: a U-Net's adapter of which the text encoders' weight alone is left, and factors of 0."""
    file = write("a", sd1, "to_v")
    base = predict(sd1, [0])
    with by_method(sd1, Adapter(file, weight), method="ties"):
        assert torch.equal(predict(sd1, [0]), base)


def test_a_pipeline_with_a_mix_and_an_unknown_method_are_refused_and_nothing_is_left(sd1, pair):
    before = weights_sha(sd1)
    with pytest.raises(AdapterError, match="known are linear"), by_method(sd1, *pair, method="tie"):
        pass
    idle = Adapter(pair[0].path, 0.0)
    with pytest.raises(AdapterError, match="known are linear"), by_method(sd1, idle, method="tie"):
        pass  # as at any other weight, and not only once the adapter counts
    assert current(sd1) is None
    assert weights_sha(sd1) == before
    with compose(sd1, pair[0]) as mix:
        with pytest.raises(AdapterError, match="carries a mix already"), by_method(sd1, *pair, method="ties"):
            pass
        assert current(sd1) is mix


def test_what_depends_on_the_weight_takes_the_pipelines_own(sd1, pair, tmp_path):
    """IA3 multiplies the weight: merged within a full rank it is the adapter itself."""
    from safetensors.torch import save_file

    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
    layer = sd1.unet.get_submodule(path)
    name = "lora_unet_" + path.replace(".", "_")
    file = tmp_path / "ia3.safetensors"
    gain = torch.linspace(-0.5, 0.5, layer.weight.shape[0]).view(-1, 1)
    save_file({f"{name}.weight": gain, f"{name}.on_input": torch.tensor(False)}, file)
    with compose(sd1, Adapter(file)):
        wanted = predict(sd1, [0])
    with by_method(sd1, Adapter(file), method="linear", budget=Budget(rank=layer.weight.shape[0])):
        assert_close(predict(sd1, [0]), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(AdapterError, match="--rank"), by_method(sd1, Adapter(file), method="linear"):
        pass


def test_words_that_files_bring_are_the_mixs_and_said(sd1, tmp_path, capsys):
    target = ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v")
    layer = sd1.unet.get_submodule(target[1])
    module = LoraModule(torch.ones(1, layer.in_features), torch.ones(layer.out_features, 1), 1.0)
    vectors = torch.ones(2, sd1.text_encoder.config.hidden_size)
    file = write_lora(
        tmp_path / "a.safetensors", {target: module}, family="sd1", words={"<new>": {"text_encoder": vectors}}
    )
    with by_method(sd1, Adapter(file), method="ties") as mix:
        ((words),) = mix.embeddings.values()
    assert_close(words["<new>"]["text_encoder"], vectors)
    assert "brings the words <new>" in capsys.readouterr().err
    with by_method(sd1, Adapter(file), method="ties", words_known=True):
        assert not capsys.readouterr().err
