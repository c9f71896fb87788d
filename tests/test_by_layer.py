"""Ranks and learning rates by layer: which layers a pattern names, and what those have then."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sfumato.adapters import ByLayer, Kind, attach, target_layers
from sfumato.errors import AdapterError, ConfigError
from sfumato.files import read_header, read_lora
from sfumato.training.optim import optimizers
from sfumato.training.options import KindOptions
from tests.tiny import tiny_pipeline


def rules(*ranks, rates=()):
    return ByLayer.of(SimpleNamespace(rank_of=ranks, rate_of=rates))


@pytest.fixture(scope="module")
def parts():
    """The layers of a small SD 1.x, by part and path."""
    pipe = tiny_pipeline("sd1")
    return target_layers({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, "everything")


def layers_of(parts):
    return [(part, path) for part, some in parts.items() for path in some]


@pytest.mark.parametrize(
    ("pattern", "part", "expression"),
    [
        ("up.1", "unet", r"^up_blocks\.1\."),
        ("mid", "unet", r"^mid_block\."),
        ("IN04", "unet", r"^down_blocks\.1\.\w+\.0\.(?!conv$)"),
        ("IN03", "unet", r"^down_blocks\.0\.downsamplers\."),
        ("OUT05", "unet", r"^up_blocks\.1\.((resnets|attentions)\.2|upsamplers)\."),
        ("IN04,mid", "unet", r"^mid_block\.|^down_blocks\.1\.(resnets|attentions)\.0\."),
        ("attn2", "unet", r"\.attn2\."),
        ("attn2.to_k", "unet", r"\.attn2\.to_k$"),
        ("cross-attention", "unet", r"\.attn2\."),
        ("attention+mlp", "unet", r"\.attn[12]\.|\.ff\."),
        (r"\.to_(k|v)$", "unet", r"\.to_[kv]$"),
        (r"^down_blocks\.1\.", "unet", r"^down_blocks\.1\."),
        ("te", "text_encoder", ""),
        (r"_proj$", "unet|text_encoder", r"_proj$"),
    ],
)
def test_a_pattern_names_layers(pattern, part, expression, parts):
    (rule,) = rules(f"{pattern}=2").ranks
    found = {layer for layer in layers_of(parts) if rule.fits(*layer)}
    assert found == {
        (own, path) for own, path in layers_of(parts) if re.fullmatch(part, own) and re.search(expression, path)
    }
    assert 0 < len(found) < len(layers_of(parts))


def test_the_first_rule_that_fits_a_layer_counts(parts):
    own = rules("attn2=8", "down=2", "down,mid=3")
    found = {path: own.rank_at("unet", path) for path in parts["unet"]}
    for path, rule in found.items():
        wanted = 8 if ".attn2." in path else {"d": 2, "m": 3, "u": None}[path[0]]
        assert (rule and rule.value) == wanted, path


def block():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"down": nn.ModuleDict({"to_q": nn.Linear(12, 10), "conv1": nn.Conv2d(6, 8, 3)}), "to_k": nn.Linear(12, 10)}
    )


def hosts():
    return {"unet": {name: each for name, each in block().named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}}


@pytest.mark.parametrize(
    ("given", "options", "wanted"),
    [
        ("to_q=2", {}, (2, 1.5)),
        ("to_q=2:1", {}, (2, 0.5)),
        ("conv1=2", {"conv_rank": 4, "conv_alpha": 1.0}, (2, 0.25)),
        ("conv1=2", {}, (2, 1.5)),
        ("to_q=1", {"rank_stabilised": True}, (1, 6.0)),
        ("to_q=4:8", {"rank_stabilised": True}, (4, 4.0)),
    ],
)
def test_a_rank_of_its_own_keeps_the_scale_unless_an_alpha_is_given(given, options, wanted):
    name = given.partition("=")[0]
    lora = attach(hosts(), rank=4, alpha=6.0, by_layer=rules(given), **options)
    others = attach(hosts(), rank=4, alpha=6.0, **options)
    for (part, path), layer in lora.layers.items():
        plain = others.layers[part, path]
        expected = wanted if path.endswith(name) else (plain.rank, plain.scale)
        assert (layer.rank, layer.scale) == expected


@pytest.mark.parametrize("kind", [Kind(), Kind("loha"), Kind("lokr"), Kind(dora=True)])
def test_what_is_left_out_is_not_there_and_the_others_start_as_without(kind):
    for own in (rules("conv1=0"), rules(rates=("conv1=0",))):
        left = own.kept(hosts())
        assert left["unet"].keys() == {"down.to_q", "to_k"}
        lora = attach(left, rank=2, alpha=2.0, kind=kind, by_layer=own, seed=3)
        whole = attach(hosts(), rank=2, alpha=2.0, kind=kind, seed=3)
        for key, layer in lora.layers.items():
            for mine, theirs in zip(layer.parameters(), whole.layers[key].parameters(), strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_each_layer_steps_by_its_share_of_the_rate(name):
    """As with an optimizer for each layer, which has that rate; LoRA+ gives B four times as much in each."""
    own = rules(rates=("to_q=0.5", "conv1=3"))
    factors = {"down.to_q": 0.5, "down.conv1": 3, "to_k": 1}
    one, several = (attach(hosts(), rank=2, alpha=2.0, by_layer=own) for _ in range(2))
    groups = optimizers.parameter_groups(
        one.by_part(), 1e-2, None, ups=one.ups(), up_ratio=4, factors=one.rate_factors()
    )
    stepping = [optimizers.build_optimizer(name, groups, weight_decay=0.1)]
    for (_, path), layer in several.layers.items():
        for parameter, ratio in ((layer.down, 1), (layer.up, 4)):
            alone = [{"params": [parameter], "lr": 1e-2 * ratio * factors[path]}]
            stepping.append(optimizers.build_optimizer(name, alone, weight_decay=0.1))
    for step in range(3):
        for lora in (one, several):
            torch.manual_seed(step)
            for parameter in lora.parameters():
                parameter.grad = torch.randn_like(parameter)
        for optimizer in stepping:
            optimizer.step()
    for mine, theirs in zip(one.parameters(), several.parameters(), strict=True):
        assert_close(mine, theirs)
        assert mine.abs().sum() > 0


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            rules("IN99=2"),
            r"--rank-of IN99=2: names none of the 3 adapted layers, such as down.to_q, to_k; wanted down",
        ),
        (rules("to_q,down.2=2"), r"--rank-of to_q,down.2=2: down.2 names none of"),
        (rules("te=2"), "--rank-of te=2: names none"),
        (rules(rates=("^up=2",)), r"--rate-of \^up=2: names none"),
        (rules("to_=2"), "--rank-of to_=2: names none"),  # a part of a name is an expression: .*to_
        (rules("to_q|to_k=2", "to_q=4"), "--rank-of to_q=4: rules before it have all of its layers"),
        (rules("to_q=2", rates=("to_q=0",)), "--rank-of to_q=2: --rate-of to_q=0 leaves all of its layers out"),
        (rules("to_q=0", rates=("to_q=2",)), "--rate-of to_q=2: --rank-of to_q=0 leaves all of its layers out"),
        (rules(".*=0"), "leave no layer of the U-Net to adapt"),
    ],
)
def test_a_rule_that_no_layer_follows_is_refused(own, said):
    with pytest.raises(AdapterError, match=said):
        own.kept(hosts())


def test_of_two_text_encoders_one_may_be_left_out():
    given = {"unet": hosts()["unet"], "text_encoder": hosts()["unet"], "text_encoder_2": hosts()["unet"]}
    assert rules("te2=0").kept(given).keys() == {"unet", "text_encoder"}
    with pytest.raises(AdapterError, match=r"leave no layer of the text encoders .* leave --train-text-encoder out"):
        rules("te,te2=0").kept(given)


@pytest.mark.parametrize(
    ("ranks", "rates", "said"),
    [
        (
            ["up.1"],
            [],
            "--rank-of 'up.1': wanted PATTERN=RANK, or PATTERN=RANK:ALPHA, such as up.1=8, mid=8:4, or te=0",
        ),
        (["=4"], [], "--rank-of '=4': wanted PATTERN=RANK"),
        (["up=-1"], [], "--rank-of 'up=-1': a rank is 0 or more"),
        (["up=4:0"], [], "--rank-of 'up=4:0': a rank is 0 or more, and an alpha a positive number"),
        (["up=4:nan"], [], "an alpha a positive number"),
        (["up=0:4"], [], "--rank-of 'up=0:4': an alpha has no effect beside a rank of 0"),
        (["up=1.5"], [], "--rank-of 'up=1.5': wanted PATTERN=RANK"),
        (["(up=4"], [], r"--rank-of '\(up=4': no regular expression \(missing"),
        ([], ["up=a"], "--rate-of 'up=a': wanted PATTERN=FACTOR, such as up.1=0.5, or mid=0 to leave it out"),
        ([], ["up=-0.5"], "--rate-of 'up=-0.5': wanted PATTERN=FACTOR"),
        ([], ["up=inf"], "--rate-of 'up=inf': wanted PATTERN=FACTOR"),
    ],
)
def test_what_is_no_rule_is_refused(ranks, rates, said):
    with pytest.raises(ConfigError, match=said):
        rules(*ranks, rates=rates)


def test_ranks_are_held_against_the_widths_of_their_own_layers():
    own = rules("to_q=11", "conv1=2")
    assert Kind().notes(hosts(), 4, by_layer=rules("conv1=2")) == []
    with pytest.raises(AdapterError, match="--rank-of to_q=11: the widest layer has 10 directions"):
        Kind().notes(hosts(), 4, by_layer=own)
    assert Kind().notes(hosts(), 4, by_layer=rules(r"^down=9")) == [
        "--rank-of ^down=9: 1 of 2 layers is narrower (8), where it takes memory and learns no more"
    ]
    with pytest.raises(AdapterError, match=r"--conv-rank and --conv-alpha .* none is adapted without a --rank-of"):
        Kind().notes(hosts(), 4, 2, rules("conv1=2"))


@pytest.mark.parametrize("kind", [Kind(), Kind("lokr")])
def test_a_file_tells_the_rules_and_has_the_ranks(kind, tmp_path, parts):
    own = rules("up.1,mid=3", "to_k=0", rates=("down=0.5",))
    left = own.kept({"unet": {path: host for path, host in parts["unet"].items() if ".attn2.to_" in path}})
    lora = attach(left, rank=2, alpha=4.0, kind=kind, by_layer=own)
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    path = lora.write(tmp_path / "a.safetensors", family="sd1", metadata={"ss_network_module": "networks.lora"})
    args = read_header(path).metadata["ss_network_args"]
    assert '"rank_of":"up.1,mid=3 to_k=0","rate_of":"down=0.5"' in args
    if kind == Kind():
        found = read_lora(path).modules
        assert {part_path: module.rank for part_path, module in found.items()} == {
            ("unet", path): 3 if path.startswith(("up_blocks.1.", "mid")) else 2 for path in left["unet"]
        }
        for key, change in lora.changes().items():
            assert_close(found[key].delta(), change.delta())


def test_going_on_from_a_file_with_other_ranks_names_the_options():
    first = attach(hosts(), rank=2, alpha=2.0, by_layer=rules("to_k=3"))
    second = attach(hosts(), rank=2, alpha=2.0)
    with pytest.raises(
        AdapterError, match=r"unet.to_k has rank 3, this run has 2 there; the file has 2, 3. .*--rank-of"
    ):
        second.load(first.changes(), "first")
    again = attach(hosts(), rank=2, alpha=1.0, by_layer=rules("to_k=3"))
    again.load(first.changes(), "first")
    own = rules("to_k=0")
    fewer = attach(own.kept(hosts()), rank=2, alpha=2.0, by_layer=own)
    with pytest.raises(AdapterError, match=r"0 missing and 1 extra, first unet.to_k. .*that left layers out"):
        fewer.load(second.changes(), "second")


def test_the_options_are_of_both_trainers_of_adapters():
    assert {"rank_of", "rate_of"} <= KindOptions.__dataclass_fields__.keys()
