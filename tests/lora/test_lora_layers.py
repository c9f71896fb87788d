"""Ranks, scales and rates, of all layers and of some."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from sfumato import cli, data
from sfumato.files import read_header, read_lora, read_tensors
from sfumato.models.family import FAMILIES
from tests.logged import log_beside

pytestmark = pytest.mark.usefixtures("quick")


def test_a_rank_stabilised_scale_is_1_at_the_familys_rank(tmp_path):
    """And falls with the root of the rank: its default rate is for a scale of 1, and any rank learns as fast."""
    from trainers.lora import Config, resolve

    family = FAMILIES["sd1"]
    base = SimpleNamespace(family=family, defaults=family.defaults, alpha_bar=range(1000))
    for rank, stabilised, alpha in ((None, True, 4), (64, True, 4), (64, False, 64)):
        config = Config(images=tmp_path, output=tmp_path, learn="plain", rank=rank, rank_stabilised=stabilised)
        assert resolve(config, base, data.ExampleSet(()), 1, kinds=1)[0].alpha == alpha


def test_unset_convolutions_have_the_rank_and_the_scale_of_the_other_layers(tmp_path):
    from trainers.lora import Config, resolve

    family = FAMILIES["sd1"]
    base = SimpleNamespace(family=family, defaults=family.defaults, alpha_bar=range(1000))
    for options, wanted in (
        ({}, (None, None)),
        ({"conv_rank": 4}, (4, 2.0)),
        ({"conv_alpha": 1.0}, (16, 1.0)),
        ({"conv_rank": 4, "rank_stabilised": True}, (4, 8.0)),
    ):
        config = Config(images=tmp_path, output=tmp_path, learn="plain", alpha=8.0, **options)
        config = resolve(config, base, data.ExampleSet(()), 1, kinds=1)[0]
        assert (config.conv_rank, config.conv_alpha) == wanted


@pytest.mark.slow
def test_convolutions_learn_within_their_own_rank(train, capsys):
    """With that of the others what is learned is the same to the bit. The file says it as sd-scripts does."""
    everything = ("--targets", r"mid_block.*(to_q|conv1|conv_shortcut|proj_in)$")
    plain, same = train("plain", *everything), train("same", *everything, "--conv-rank", "2")
    assert all(torch.equal(read_tensors(plain)[name], value) for name, value in read_tensors(same).items())
    path = train("own", *everything, "--conv-rank", "1", "--conv-alpha", "4", "--ema", "0.5")
    metadata = read_header(path).metadata
    assert metadata["ss_network_dim"] == "2"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "1", "conv_alpha": "2"}  # one alpha in a file
    ranks = {module.rank for (_, name), module in read_lora(path).modules.items() if name.endswith("conv1")}
    assert ranks == {1}
    assert "| conv_rank | 1 |\n| conv_alpha | 4.0 |" in (path.parent / "README.md").read_text()
    went_on = train("on", *everything, "--conv-rank", "1", "--init-from", str(path))
    assert read_header(went_on).metadata["ss_network_dim"] == "2"
    capsys.readouterr()
    with pytest.raises(AssertionError):
        train("refused", *everything, "--init-from", str(path))
    assert "Give the --rank, --conv-rank and --rank-of it was trained with" in capsys.readouterr().err


def test_layers_have_ranks_and_rates_of_their_own(train, capsys):
    """A layer that is left out is not in the file, which says the rules and the ranks. One whose rate is a tenth has
    learned a tenth as much: AdamW's first step is as long as the rate."""
    rules = ("--rank-of", "to_k=0", "--rank-of", "mid=1", "--rate-of", "up=0.1", "--steps", "1", "--alpha", "4")
    path = train("run", *rules, "--weight-decay", "0", "--schedule", "constant", "--precision", "fp32", "--clip", "0")
    modules = read_lora(path).modules
    assert {name.split(".")[-1] for _, name in modules} == {"to_q", "to_v", "0"}
    assert {name.split("_")[0]: module.rank for (_, name), module in modules.items()} == {"down": 2, "mid": 1, "up": 2}
    for (_, name), module in modules.items():  # the scale is 2 in each; the file has one alpha, and the rest in B
        most = module.scale * module.up.abs().max()
        assert_close(float(most), 2e-2 * (0.1 if name.startswith("up") else 1), rtol=1e-3, atol=0)
    metadata = read_header(path).metadata
    assert json.loads(metadata["ss_network_args"]) == {"rank_of": "to_k=0 mid=1", "rate_of": "up=0.1"}
    assert json.loads(metadata["sfumato.config"])["rank_of"] == ["to_k=0", "mid=1"]
    assert {row["rate"] for row in log_beside(path) if "rate" in row} == {1e-2}
    assert "| rank_of | ['to_k=0', 'mid=1'] |" in (path.parent / "README.md").read_text()
    capsys.readouterr()
    assert cli.main(["inspect", str(path)]) == 0
    assert "ranks      2 (18), 1 (3)\n" in capsys.readouterr().out  # in so many layers
    for wrong, said in ((rules[:2], "; the file has 1, 2."), (rules[2:4], "that left layers out")):
        with pytest.raises(AssertionError):
            train("refused", *wrong, "--init-from", str(path))
        assert said in capsys.readouterr().err
