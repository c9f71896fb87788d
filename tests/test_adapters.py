"""LoRA on plain layers: a no-op at the start, W + scale B A afterwards, gone when detached."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sfumato.adapters import TARGETS, Kind, attach, select
from sfumato.errors import AdapterError
from sfumato.utils import randomness


class Block(nn.Module):
    """A linear and a convolution, named as a U-Net names its attention and residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.attn2 = nn.ModuleDict({"to_q": nn.Linear(6, 5)})
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def trained(block: Block, **options):
    options = {"rank": 2, "alpha": 2.0, **options}
    lora = attach({"unet": select(block, r"attn2\.to_q|conv1")}, **options)
    for layer in lora.layers.values():
        nn.init.normal_(layer.up)
    return lora.eval()


def deltas(lora):
    """The change of every adapted weight, in its shape."""
    return {key: module.delta() for key, module in lora.changes().items()}


def test_an_untrained_adapter_changes_no_bit(block):
    x = torch.randn(2, 6)
    before = block.attn2["to_q"](x)
    attach({"unet": select(block, r"attn2\.to_q")}, rank=2, alpha=2.0)
    assert torch.equal(block.attn2["to_q"](x), before)


def test_a_trained_linear_is_the_layer_with_its_delta_added(block):
    lora = trained(block, alpha=3.0)
    host, x = block.attn2["to_q"], torch.randn(2, 6)
    delta = deltas(lora)["unet", "attn2.to_q"]
    assert_close(host(x), nn.functional.linear(x, host.weight + delta, host.bias))


def test_a_trained_convolution_is_the_layer_with_its_delta_added(block):
    lora = trained(block)
    host, x = block.conv1, torch.randn(1, 3, 8, 8)
    delta = deltas(lora)["unet", "conv1"]
    expected = nn.functional.conv2d(x, host.weight + delta, host.bias, stride=2, padding=1)
    assert_close(host(x), expected)


def test_the_scale_is_alpha_over_rank_or_over_its_root(block):
    assert trained(block, rank=4, alpha=2.0).layers["unet", "conv1"].scale == 0.5
    assert trained(block, rank=4, alpha=2.0, rank_stabilised=True).layers["unet", "conv1"].scale == 1.0


def test_disabled_and_detached_are_the_base_bit_for_bit(block):
    x = torch.randn(2, 6)
    before = block.attn2["to_q"](x)
    lora = trained(block)
    assert not torch.equal(block.attn2["to_q"](x), before)
    with lora.disabled():
        assert torch.equal(block.attn2["to_q"](x), before)
    lora.detach()
    assert torch.equal(block.attn2["to_q"](x), before)


def test_within_scaled_the_updates_of_the_unet_are_so_many_times_what_they_are(block):
    other = Block()
    options = {"rank": 2, "alpha": 2.0}
    lora = attach({"unet": select(block, r"to_q"), "text_encoder": select(other, r"to_q")}, **options).eval()
    for layer in lora.layers.values():
        nn.init.normal_(layer.up)
    x = torch.randn(2, 6)

    def outputs():
        return torch.stack([part.attn2["to_q"](x) for part in (block, other)])

    full = outputs()
    with lora.disabled():
        base = outputs()
    with lora.scaled(0.25):
        found = outputs()
    assert_close(found[0], base[0] + 0.25 * (full[0] - base[0]))
    assert torch.equal(found[1], full[1])
    assert torch.equal(outputs(), full)


def test_a_layer_starts_alike_whatever_else_is_adapted(block):
    one = attach({"unet": select(block, "conv1")}, rank=2, alpha=2.0, seed=5)
    two = attach({"unet": select(block, "conv1|to_q")}, rank=2, alpha=2.0, seed=5)
    assert torch.equal(one.layers["unet", "conv1"].down, two.layers["unet", "conv1"].down)


def test_a_layer_starts_within_its_own_bound_and_unlike_its_namesake_in_another_part(block):
    """PyTorch's and peft's start of A: uniform in +-1 / sqrt(inputs), a convolution's kernel among them."""
    parts = {part: select(block, "to_q|conv1") for part in ("text_encoder", "text_encoder_2")}
    layers = attach(parts, rank=64, alpha=2.0).layers
    for path, inputs in (("attn2.to_q", 6), ("conv1", 3 * 3 * 3)):
        one, other = (layers[part, path].down.detach() for part in parts)
        assert not torch.equal(one, other)
        for down in (one, other):
            assert 0.95 < down.abs().max() * inputs**0.5 <= 1
            assert down.mean().abs() * inputs**0.5 < 0.1


def test_a_rank_above_the_width_of_layers_is_told_and_above_that_of_all_refused(block):
    """Of a layer with so many inputs or outputs a change has so many directions at most."""
    parts = {"unet": select(block, "to_q|conv1")}
    widths = sorted(min(host.weight.shape[0], host.weight[0].numel()) for host in parts["unet"].values())
    assert widths[0] < widths[-1]
    assert Kind().notes(parts, widths[0]) == []
    assert Kind().notes(parts, widths[0] + 1) == [
        f"--rank {widths[0] + 1}: 1 of 2 layers is narrower ({widths[0]}), where it takes memory and learns no more"
    ]
    with pytest.raises(AdapterError, match=f"--rank 5000: the widest layer has {widths[-1]} directions"):
        Kind().notes(parts, 5000)


def test_convolutions_of_more_than_1x1_have_their_own_rank_and_alpha(block):
    """As conv_dim and conv_alpha of sd-scripts, where a 1x1 one counts as linear."""
    block.conv_shortcut = nn.Conv2d(3, 4, 1)
    parts = {"unet": select(block, "to_q|conv")}
    layers = attach(parts, rank=3, alpha=6.0, conv_rank=2, conv_alpha=1.0).layers
    found = {path: (layer.rank, layer.scale) for (_, path), layer in layers.items()}
    assert found == {"attn2.to_q": (3, 2.0), "conv_shortcut": (3, 2.0), "conv1": (2, 0.5)}
    rooted = attach(parts, rank=3, alpha=6.0, conv_rank=4, conv_alpha=1.0, rank_stabilised=True).layers
    assert rooted["unet", "conv1"].scale == 0.5


def test_convolutions_with_the_rank_of_the_others_start_as_without_one(block):
    parts = {"unet": select(block, "to_q|conv1")}
    one, two = (attach(parts, rank=2, alpha=3.0, seed=1, **own) for own in ({}, {"conv_rank": 2, "conv_alpha": 3.0}))
    for key, layer in one.layers.items():
        assert torch.equal(layer.down, two.layers[key].down)
        assert layer.scale == two.layers[key].scale


def test_the_rank_of_convolutions_is_held_against_their_widths(block):
    parts = {"unet": select(block, "to_q|conv1")}
    assert Kind().notes(parts, 5, 4) == []
    with pytest.raises(AdapterError, match="--conv-rank 5: the widest convolution has 4 directions"):
        Kind().notes(parts, 5, 5)
    with pytest.raises(AdapterError, match="--rank 6: the widest layer has 5 directions"):
        Kind().notes(parts, 6, 4)
    with pytest.raises(AdapterError, match="are for convolutions of more than 1x1, and none is adapted"):
        Kind().notes({"unet": select(block, "to_q")}, 2, 2)


def test_the_base_gets_no_gradient_and_the_adapter_does(block):
    block.requires_grad_(False)
    lora = trained(block)
    block.attn2["to_q"](torch.randn(2, 6)).sum().backward()
    assert block.attn2["to_q"].weight.grad is None
    assert lora.layers["unet", "attn2.to_q"].down.grad.abs().sum() > 0


def test_starting_from_an_adapter_gives_its_delta(block):
    first = trained(block, alpha=6.0)
    second = attach({"unet": select(block, r"attn2\.to_q|conv1")}, rank=2, alpha=1.0)
    second.load(first.changes(), "first")
    for key, delta in deltas(first).items():
        assert_close(deltas(second)[key], delta)


def test_starting_from_another_shape_is_refused(block):
    lora = trained(block)
    with pytest.raises(AdapterError, match=r"has 0 modules, this run trains 2; 2 missing .* --conv and --train"):
        lora.load({}, "other")
    more = lora.changes()
    with pytest.raises(
        AdapterError, match=r"has 3 modules, this run trains 2; 0 missing and 1 extra, first unet\.conv2"
    ):
        lora.load({**more, ("unet", "conv2"): more["unet", "conv1"]}, "other")


@pytest.mark.parametrize("options", [{"dropout": 0.4}, {"rank_dropout": 0.4, "rank": 8}])
def test_what_is_dropped_of_a_sample_depends_on_its_place_and_not_on_the_batch(options, block):
    """Four samples and a prior's four beside them: at once, or two and two."""
    lora = trained(block, **options).train()
    host, x = block.attn2["to_q"], torch.ones(8, 6)

    def draw(step, places):
        lora.set_dropout_samples(3, step, places)
        return host(x[: 2 * len(places)])

    whole = draw(7, range(4))
    halves = [draw(7, range(first, first + 2)) for first in (0, 2)]
    # Products of four rows and of two are rounded otherwise on some processors.
    assert_close(whole, torch.cat([half[rows] for rows in (slice(2), slice(2, 4)) for half in halves]))
    assert len({tuple(row) for row in whole.tolist()}) > 4
    assert not torch.equal(draw(8, range(4)), whole)
    lora.eval()
    assert_close(host(x), host(x[:1]).expand(8, -1))


def test_each_samples_dropout_is_drawn_by_a_generator_of_its_own(block):
    """So that a run goes on as it began, whatever the version."""
    lora = attach({"unet": select(block, "to_q")}, rank=2, alpha=2.0, dropout=0.4).train()
    lora.set_dropout_samples(3, 7, range(2, 4))
    streams = [(f"dropout {again}/unet/attn2.to_q", place) for again in range(2) for place in (2, 3)]
    drawn = [torch.rand(5, 6, generator=randomness.generator(3, stream, 7, place)) for stream, place in streams]
    dropped = lora.dropped(torch.ones(4, 5, 6), "unet", "attn2.to_q")
    assert torch.equal(dropped == 0, torch.stack(drawn) < 0.4)


def test_dropout_is_of_a_share_and_keeps_the_mean(block):
    """Captions are encoded once, however many samples have them: of all of them the same numbers are dropped."""
    lora = attach({"text_encoder": select(block, "to_q")}, rank=2, alpha=2.0, dropout=0.25).train()
    lora.set_dropout_samples(0, 0, range(3))
    dropped = lora.dropped(torch.ones(5, 10_000), "text_encoder", "attn2.to_q")
    assert all(torch.equal(row, dropped[0]) for row in dropped)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("path", ["attn2.to_q", "conv1"])
def test_rank_dropout_is_that_of_sd_scripts(path, dropout, block):
    """Each sample by itself: A x, whole ranks of it zero and the others 1 / (1 - p) as large, and B of that; beside
    dropout of the inputs, which is drawn as it is alone."""
    lora = trained(block, rank=5, alpha=10.0, dropout=dropout, rank_dropout=0.3).train()
    block.requires_grad_(False)
    host = block.get_submodule(path)
    x = torch.randn((8, 3, 9, 9) if path == "conv1" else (8, 4, 6)).requires_grad_()
    lora.set_dropout_samples(3, 7, range(2, 6))
    again, layer = x.detach().clone().requires_grad_(), lora.layers["unet", path]
    inputs = lora.dropped(again, "unet", path) if dropout else again
    down, up = (factor.detach().clone().requires_grad_() for factor in (layer.down, layer.up))
    wanted = []
    for row in range(8):
        stream = f"rank dropout {row // 4}/unet/{path}"
        drawn = torch.rand(5, generator=randomness.generator(3, stream, 7, 2 + row % 4))
        update = 2 * up.flatten(1) @ torch.diag((drawn >= 0.3) / 0.7) @ down.flatten(1)
        update = update.view_as(host.weight)
        if path == "conv1":
            base, more = (
                nn.functional.conv2d(each[row], weight, stride=2, padding=1)
                for each, weight in ((again, host.weight), (inputs, update))
            )
            wanted.append(base + more + host.bias.view(-1, 1, 1))
        else:
            wanted.append(again[row] @ host.weight.T + host.bias + inputs[row] @ update.T)
    found, wanted = host(x), torch.stack(wanted)
    assert_close(found, wanted)
    weights = torch.randn(wanted.shape)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for mine, true in ((x, again), (layer.down, down), (layer.up, up)):
        assert_close(mine.grad, true.grad, rtol=1e-4, atol=1e-5)
    lora.eval()
    assert_close(host(x), torch.cat([host(row[None]) for row in x]))
    assert not torch.equal(host(x), found)


def test_of_all_captions_the_same_ranks_are_dropped(block):
    lora = attach({"text_encoder": select(block, "to_q")}, rank=8, alpha=2.0, rank_dropout=0.5).train()
    lora.set_dropout_samples(0, 0, range(3))
    dropped = lora.dropped_ranks(torch.ones(5, 7, 8), "text_encoder", "attn2.to_q")
    assert all(torch.equal(row, dropped[0, 0]) for row in dropped.flatten(0, 1))
    assert dropped.unique().tolist() == [0.0, 2.0]


def many(count, part="unet", **options):
    """Layers, by path, and an adapter of them that changes each."""
    hosts = {f"{at}": nn.Linear(3, 3).requires_grad_(False) for at in range(count)}
    adapter = attach({part: hosts}, rank=2, alpha=2.0, **options)
    for layer in adapter.layers.values():
        nn.init.normal_(layer.up)
    return hosts, adapter.train()


def share(host, x):
    """What an update adds to its layer's output."""
    return host(x) - nn.functional.linear(x, host.weight, host.bias)


def test_module_dropout_leaves_whole_updates_out_of_a_step():
    """By (seed, layer, step) alone, whatever the samples; without a gradient, so that no optimizer moves them."""
    hosts, adapter = many(40, module_dropout=0.3)
    x = torch.ones(2, 3)
    for step in range(3):
        for places in (range(2), range(2, 4)):
            adapter.set_dropout_samples(5, step, places)
            out = [path for path in hosts if randomness.uniform(5, f"module dropout/unet/{path}", step) < 0.3]
            assert 0 < len(out) < 30
            sum(host(x).sum() for host in hosts.values()).backward()
            for (_, path), layer in adapter.layers.items():
                update = torch.zeros(3, 3) if path in out else layer.change().delta()
                assert_close(share(hosts[path], x), x @ update.T)  # and the others are not scaled up
                assert [factor.grad is None for factor in layer.parameters()] == [path in out] * 2
            adapter.zero_grad()
    adapter.eval()
    assert all(share(host, x).any() for host in hosts.values())


def test_module_dropout_leaves_one_layer_of_the_unet_in():
    """Of a step that changes nothing there would be no gradient to clip, scale or sum."""
    hosts, adapter = many(3, module_dropout=0.9999)
    x, kept = torch.ones(1, 3), set()
    for step in range(20):
        adapter.set_dropout_samples(0, step, [0])
        drawn = {path: randomness.uniform(0, f"module dropout/unet/{path}", step) for path in hosts}
        learning = [path for path, host in hosts.items() if share(host, x).any()]
        assert learning == [max(drawn, key=drawn.get)]
        kept |= set(learning)
    assert len(kept) == 3
    hosts, adapter = many(3, part="text_encoder", module_dropout=0.9999)  # beside which the U-Net's learn
    adapter.set_dropout_samples(0, 0, [0])
    assert not any(share(host, x).any() for host in hosts.values())


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout", "module_dropout"])
def test_dropout_without_places_is_refused(kind, block):
    lora = attach({"unet": select(block, "to_q")}, rank=2, alpha=2.0, **{kind: 0.5}).train()
    with lora.disabled():
        block.attn2["to_q"](torch.ones(1, 6))
    with pytest.raises(AdapterError, match="call set_dropout_samples"):
        block.attn2["to_q"](torch.ones(1, 6))


@pytest.mark.parametrize(("pattern", "said"), [("nothing", "matches none"), ("(", "nor a regular"), ("", "is empty")])
def test_targets_that_choose_nothing_say_what_there_is(block, pattern, said):
    with pytest.raises(AdapterError, match=said):
        select(block, pattern)


def test_the_named_targets_choose_what_they_say():
    """On a real SD 1.5 structure: 64 cross-attention, 128 attention, 160 with mlp, 192 as sd-scripts, 278 in all."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(4, 8, 16, 16), cross_attention_dim=8, norm_num_groups=2, attention_head_dim=2, sample_size=8
    )
    counts = {name: len(select(unet, name)) for name in TARGETS}
    some = {"cross-attention": 64, "attention": 128, "attention+mlp": 160}
    assert counts == some | {"transformers": 192, "everything": 278}
    assert len(select(unet, "cross-attention", conv=True)) == 64 + 22 * 2 + 14 + 3 + 3
