"""LoHa, LoKr, OFT and DoRA of them on plain layers: no-ops at the start, then the change that their formula makes."""

import copy
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sfumato.adapters import ALGOS, Attached, Kind, attach
from sfumato.adapters.tuners.lokr import factorization
from sfumato.adapters.tuners.lora import weight_norm
from sfumato.adapters.tuners.oft import block_size
from sfumato.errors import AdapterError
from sfumato.files import read_adapter
from sfumato.files.fingerprint import FINGERPRINT_KEY, check_rows, probe_rows, verify
from sfumato.files.keys import KIND_KEYS, kind_named, trained_kinds
from sfumato.files.kinds.dora import Dora
from sfumato.precision import cpu_matmul
from sfumato.training.optim.ema import Ema
from sfumato.training.options import AlgoName
from sfumato.utils import randomness

KINDS = {
    "loha": Kind("loha"),
    "lokr": Kind("lokr"),
    "lokr, factor 2": Kind("lokr", factor=2),
    "oft": Kind("oft"),
    **{f"dora of {algo}": Kind(algo, dora=True) for algo in ("lora", "loha", "lokr")},
}
UNET = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
LAYERS = {"linear": (nn.Linear(12, 18), (2, 30, 12)), "unbiased": (nn.Linear(6, 10, bias=False), (3, 6))}
LAYERS |= {"3x3": (nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 9, 9)), "1x1": (nn.Conv2d(8, 6, 1), (2, 8, 5, 5))}
NAMES = {"linear": "attentions.0.transformer_blocks.0.attn2.to_q", "unbiased": "attentions.0.proj_in"}
NAMES |= {"3x3": "resnets.0.conv1", "1x1": "resnets.0.conv_shortcut"}
PATHS = {name: f"down_blocks.0.{path}" for name, path in NAMES.items()}


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


def attached(kind: Kind, name: str, **options) -> tuple[nn.Module, torch.Tensor, Attached]:
    """A layer of its own, an input, and an adapter of it."""
    host, shape = copy.deepcopy(LAYERS[name][0]).requires_grad_(False), LAYERS[name][1]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return host, x, attach({"unet": {PATHS[name]: host}}, **{"rank": 3, "alpha": 6.0, **options}, kind=kind)


def learn(adapter: Attached) -> Attached:
    """Other numbers in all that is trained."""
    draws = torch.Generator().manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draws)
    return adapter.eval()


def op(host: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if isinstance(host, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    return nn.functional.conv2d(x, weight, bias, host.stride, host.padding)


def naive(kind: Kind, layer: nn.Module, weight: torch.Tensor, *, detached: bool = True) -> torch.Tensor:
    """W' by the papers' formulas in fp64, of the layer's own factors."""
    factors = {key: value.double() for key, value in layer.named_parameters()}
    factors = {key.removeprefix("inner."): value for key, value in factors.items()}
    scale, weight = 6.0 / 3, weight.double()
    if kind.algo == "lora":
        update = factors["up"].flatten(1) @ factors["down"].flatten(1)
    elif kind.algo == "oft":
        q = torch.block_diag(*(factors["blocks"] - factors["blocks"].transpose(1, 2)))
        one = torch.eye(len(q), dtype=q.dtype)
        rotation = (one + q) @ (one - q).inverse()
        return (rotation.T @ weight.flatten(1)).reshape(weight.shape)
    elif kind.algo == "loha":
        update = (factors["w1_a"] @ factors["w1_b"]) * (factors["w2_a"] @ factors["w2_b"])
    else:
        whole = "w2.1" not in factors
        scale = 1 if whole else scale
        second = factors["w2.0"] if whole else factors["w2.0"] @ factors["w2.1"]
        first = factors["w1"]
        second = second.reshape(weight.shape[0] // first.shape[0], weight.shape[1] // first.shape[1], -1)
        blocks = [torch.cat([each * second for each in row], dim=1) for row in first]  # by the product's definition
        update = torch.cat(blocks, dim=0)
    changed = weight + scale * update.reshape(weight.shape)
    if not kind.dora:
        return changed
    axes = [axis for axis in range(weight.ndim) if axis != 1]
    start = weight.square().sum(axes, keepdim=True).sqrt()
    length = changed.square().sum(axes, keepdim=True).sqrt()
    return (start + factors["shift"]) * changed / (length.detach() if detached else length)


def test_an_untrained_adapter_changes_no_bit(kind, name):
    host, x, adapter = attached(kind, name)
    adapter.detach()
    assert "forward" not in vars(host)
    cpu_matmul.use_fast_matmul(nn.ModuleList([host]))  # as a base's layers are for training
    untouched, before = host.forward, host(x)
    adapter = attach({"unet": {PATHS[name]: host}}, rank=3, alpha=6.0, kind=kind)
    assert torch.equal(host(x), before)
    adapter.detach()
    assert host.forward == untouched


def test_values_and_gradients_are_those_of_the_formula(kind, name):
    host, x, adapter = attached(kind, name)
    learn(adapter)
    (layer,) = adapter.layers.values()
    exact = copy.deepcopy(layer).double()
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    wanted = op(host, theirs, naive(kind, exact, host.weight), None if host.bias is None else host.bias.double())
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    found = host(ours)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    pairs = [(ours, theirs), *zip(layer.parameters(), exact.parameters(), strict=True)]
    for mine, true in pairs:
        assert (mine.grad - true.grad).norm() < 3e-6 * true.grad.norm()


def test_where_autocast_rounds_the_update_is_added_to_the_layers_output(kind, name):
    """Beside W it would be rounded away; its factors' gradients are fp32."""
    host, x, adapter = attached(kind, name)
    learn(adapter)
    for parameter in adapter.parameters():
        parameter.data *= 0.5
    (layer,) = adapter.layers.values()
    exact = copy.deepcopy(layer).double()
    wanted = op(host, x.double(), naive(kind, exact, host.weight) - host.weight)
    wanted.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        with adapter.disabled():
            base = host(x)
        found = host(x)
    share = found.float() - base.float()
    assert (share - wanted).norm() < 2e-2 * (wanted.norm() + base.float().norm())
    with torch.autocast("cpu", torch.bfloat16):
        layer(host, x).float().square().sum().backward()
    for mine, true in zip(layer.parameters(), exact.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - true.grad).norm() < 5e-2 * true.grad.norm()


def test_beside_a_frozen_layer_in_half_precision_nothing_is_lost(kind):
    """As of a text encoder that is called outside of autocast."""
    host, x, adapter = attached(kind, "linear")
    adapter.detach()
    host.to(torch.bfloat16)
    adapter = attach({"unet": {PATHS["linear"]: host}}, rank=3, alpha=6.0, kind=kind)
    x = x.to(torch.bfloat16)
    with adapter.disabled():
        before = host(x)
    assert torch.equal(host(x), before)
    learn(adapter)
    assert host(x).dtype == torch.bfloat16
    (layer,) = adapter.layers.values()
    wanted = op(host, x.double(), naive(kind, copy.deepcopy(layer).double(), host.weight) - host.weight.double())
    assert (layer(host, x) - wanted).norm() < 1e-5 * wanted.norm()


def test_scaled_counts_the_whole_change_so_often(kind, name):
    """Of a DoRA base + factor (changed - base), and not a change of another length."""
    host, x, adapter = attached(kind, name)
    learn(adapter)
    with adapter.disabled():
        base = host(x)
    full = host(x)
    with adapter.scaled(0.25):
        assert_close(host(x), base + 0.25 * (full - base))
    assert torch.equal(host(x), full)


def test_what_is_dropped_is_of_the_updates_input_alone(kind):
    host, x, adapter = attached(kind, "linear", dropout=0.5)
    learn(adapter)
    adapter.train()
    adapter.set_dropout_samples(0, 0, range(2))
    dropped = adapter.dropped(x, "unet", PATHS["linear"])
    (layer,) = adapter.layers.values()
    delta = naive(kind, copy.deepcopy(layer).double(), host.weight).float() - host.weight
    assert_close(host(x), op(host, x, host.weight, host.bias) + op(host, dropped, delta), rtol=1e-4, atol=1e-4)


def test_rank_dropout_leaves_rows_of_each_samples_change_out(kind, name):
    """The others 1 / (1 - p) as large; the gradients are those of the formula, too."""
    host, x, adapter = attached(kind, name, rank_dropout=0.3)
    learn(adapter)
    adapter.train()
    adapter.set_dropout_samples(3, 7, range(4, 4 + len(x)))
    (layer,) = adapter.layers.values()
    exact = copy.deepcopy(layer).double()
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    weight = host.weight.double()
    change = naive(kind, exact, host.weight) - weight
    wanted = []
    for row, place in enumerate(range(4, 4 + len(x))):
        draws = randomness.generator(3, f"rank dropout 0/unet/{PATHS[name]}", 7, place)
        kept = (torch.rand(len(weight), generator=draws) >= 0.3).view(-1, *[1] * (weight.ndim - 1))
        bias = None if host.bias is None else host.bias.double()
        wanted.append(op(host, theirs[row : row + 1], weight + change * kept / 0.7, bias))
    found, wanted = host(ours), torch.cat(wanted)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    for mine, true in [(ours, theirs), *zip(layer.parameters(), exact.parameters(), strict=True)]:
        assert (mine.grad - true.grad).norm() < 3e-6 * true.grad.norm()
    with adapter.disabled():
        base = host(x)
    with adapter.scaled(0.5):
        assert_close(host(x), (base + found) / 2)
    adapter.eval()
    assert_close(host(x), op(host, x, (weight + change).float(), host.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_read_back_makes_the_trained_change(kind, dtype, tmp_path):
    hosts = {PATHS[name]: copy.deepcopy(host).requires_grad_(False) for name, (host, _) in LAYERS.items()}
    adapter = learn(attach({"unet": hosts}, rank=3, alpha=6.0, kind=kind))
    file = read_adapter(adapter.write(tmp_path / "a.safetensors", family="sd1", dtype=dtype))
    assert file.changes.keys() == adapter.layers.keys()
    for (part, path), layer in adapter.layers.items():
        change, weight = file.changes[part, path], hosts[path].weight
        assert change.kind == layer.kind
        wanted = naive(kind, copy.deepcopy(layer).double(), weight) - weight
        limit = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        assert (change.delta(weight) - wanted).norm() < limit * wanted.norm(), path
    if not kind.dora and dtype == torch.float32:
        deltas = {target: change.delta(hosts[target[1]].weight) for target, change in file.changes.items()}
        assert check_rows(file.metadata[FINGERPRINT_KEY], probe_rows(deltas), "a").same()


def test_starting_from_a_file_gives_its_change_at_another_scale(kind, tmp_path):
    hosts = {PATHS[name]: copy.deepcopy(host).requires_grad_(False) for name, (host, _) in LAYERS.items()}
    first = learn(attach({"unet": hosts}, rank=3, alpha=6.0, kind=kind))
    file = read_adapter(first.write(tmp_path / "a.safetensors", family="sd1"))
    first.detach()
    second = attach({"unet": hosts}, rank=3, alpha=1.0, kind=kind)
    second.load(file.changes, "a")
    for key, change in second.changes().items():
        weight = hosts[key[1]].weight
        assert_close(change.delta(weight), first.changes()[key].delta(weight), rtol=1e-4, atol=1e-5)


def test_starting_from_another_kind_or_shape_is_refused(kind):
    *_, adapter = attached(kind, "3x3")
    other = Kind("loha" if kind.algo != "loha" else "lokr", dora=kind.dora)
    *_, another = attached(other, "3x3")
    with pytest.raises(AdapterError, match=r"this run trains .* Give the --algo and --dora it was trained with"):
        adapter.load(another.changes(), "a")
    *_, other = attached(kind, "1x1" if kind.algo == "oft" else "3x3", rank=1)  # an OFT takes blocks of any size
    with pytest.raises(AdapterError, match=r"a: unet\.down_blocks.*this run.*Give its own"):
        adapter.load(dict(zip(adapter.changes(), other.changes().values(), strict=True)), "a")


def test_lengths_of_outputs_are_not_started_from():
    *_, adapter = attached(KINDS["dora of lora"], "linear")
    ((key, change),) = adapter.changes().items()
    turned = Dora(change.inner, torch.ones(18), on_input=False)
    with pytest.raises(AdapterError, match="has a length for each output, and those of inputs are trained"):
        adapter.load({key: turned}, "a")


def test_a_layer_starts_as_lycoris_has_it_and_as_a_function_of_seed_part_and_path():
    """hada_w1_a with a deviation of 0.1, both b of 1; lokr_w1 and lokr_w2_a uniform in +-1 / sqrt(inputs)."""
    host = nn.Linear(400, 900)
    parts = {part: {"to_q": host} for part in ("text_encoder", "text_encoder_2")}
    loha = [layer.factors() for layer in attach(parts, rank=50, alpha=1.0, kind=Kind("loha")).layers.values()]
    assert not torch.equal(loha[0][0], loha[1][0])
    assert [round(factor.detach().std().item(), 2) for factor in loha[0]] == [0.1, 1.0, 0.0, 1.0]
    (lokr,) = attach({"unet": {"to_q": host}}, rank=5, alpha=1.0, seed=4, kind=Kind("lokr")).layers.values()
    w1, left, right = lokr.factors()
    assert (w1.shape, left.shape, right.shape) == ((30, 20), (30, 5), (5, 20))
    draws = randomness.generator(4, "lokr/unet/to_q")
    bounds = [(2 * torch.rand(shape, generator=draws) - 1) / shape[1] ** 0.5 for shape in ((30, 20), (30, 5))]
    assert_close([w1, left], bounds)
    assert not right.any()
    dora = attach(parts, rank=5, alpha=1.0, seed=4, kind=Kind(dora=True)).layers["text_encoder", "to_q"]
    lora = attach(parts, rank=5, alpha=1.0, seed=4).layers["text_encoder", "to_q"]
    assert torch.equal(dora.inner.down, lora.down)
    assert torch.equal(dora.change().magnitude, weight_norm(host.weight)[0])


@pytest.mark.parametrize(
    ("dimension", "factor", "found"),
    [
        *((127, factor, (1, 127)) for factor in (None, 2, 16)),
        *((128, None, (8, 16)), (128, 2, (2, 64)), (128, 16, (8, 16)), (250, None, (10, 25)), (250, 8, (5, 50))),
        *((360, None, (18, 20)), (360, 12, (12, 30)), (1024, None, (32, 32)), (320, 7, (5, 64)), (20, 6, (4, 5))),
        *((1, None, (1, 1)), (4, 4, (1, 4)), (6, 100, (2, 3))),
    ],
)
def test_a_dimension_is_factored_as_lycoris_does(dimension, factor, found):
    assert factorization(dimension, factor) == found


def test_second_factors_that_are_whole_are_told(tmp_path):
    """Of 12 and 18 as 3 x 4 and 3 x 6 the longer side is 6: from rank 3 on."""
    parts = {"unet": {"to_q": nn.Linear(12, 18), "to_k": nn.Linear(64, 640)}}
    assert Kind("lokr").notes(parts, 2) == []
    assert Kind("lokr").notes(parts, 3) == [
        "--rank 3: in 1 of 2 layers the second factor is whole, as from half of its longer side on; its scale is 1 "
        "whatever the alpha"
    ]
    adapter = attach(parts, rank=3, alpha=12.0, kind=Kind("lokr"))
    assert [layer.scale for layer in adapter.layers.values()] == [1.0, 4.0]
    rooted = attach(parts, rank=4, alpha=12.0, rank_stabilised=True, kind=Kind("lokr"))
    assert [layer.scale for layer in rooted.layers.values()] == [1.0, 6.0]
    assert Kind("lokr", factor=1).notes(parts, 3) == []
    with pytest.raises(AdapterError, match="--conv-rank and --conv-alpha are for convolutions"):
        Kind("lokr").notes(parts, 3, 3)
    assert "narrower" in Kind("loha").notes(parts, 13)[0]


def test_convolutions_have_their_own_rank_and_alpha(kind):
    hosts = {name: copy.deepcopy(LAYERS[name][0]) for name in ("linear", "3x3", "1x1")}
    layers = attach({"unet": hosts}, rank=2, alpha=1.0, conv_rank=1, conv_alpha=3.0, kind=kind).layers
    assert {name: layer.rank for (_, name), layer in layers.items()} == {"linear": 2, "3x3": 1, "1x1": 2}
    whole = kind.algo == "lokr" and len(layers["unet", "3x3"].factors()) == 2 + kind.dora
    assert layers["unet", "3x3"].scale == (1.0 if whole or kind.algo == "oft" else 3.0)


def test_an_oft_keeps_the_lengths_of_outputs_and_their_angles_within_a_block(name):
    """Qiu et al. 2023: within each block the rows turn together, so that what the inputs see keeps its Gram matrix."""
    host, _, adapter = attached(Kind("oft"), name)
    (layer,) = learn(adapter).layers.values()
    before = host.weight.flatten(1)
    after = (before + layer.delta(host.weight, *layer.factors()).flatten(1)).detach()
    assert (after - before).norm() > 0.1 * before.norm()
    assert_close(after.T @ after, before.T @ before, rtol=1e-4, atol=1e-5)
    for old, new in zip(before.split(layer.rank), after.split(layer.rank), strict=True):
        assert_close(new.T @ new, old.T @ old, rtol=1e-4, atol=1e-5)


def test_an_ofts_blocks_are_the_largest_that_divide_the_outputs_and_are_no_larger_than_their_number():
    """LyCORIS's `factorization` has the same where the rank is below the root of the outputs."""
    assert [block_size(outputs, 32) for outputs in (32, 64, 320, 640, 1024, 1280)] == [4, 8, 16, 20, 32, 32]
    hosts = {str(size): nn.Linear(3, size) for size in (320, 640, 768, 96, 9)}
    layers = attach({"unet": hosts}, rank=8, alpha=1.0, kind=Kind("oft")).layers
    assert {path: layer.rank for (_, path), layer in layers.items()} == {"320": 8, "640": 8, "768": 8, "96": 8, "9": 3}
    for size in (320, 640, 768, 96):
        assert layers["unet", str(size)].rank == factorization(size, 8)[0]
    assert Kind("oft").notes({"unet": hosts}, 8) == [
        "--rank 8: blocks of so many outputs are rotated, which has no scale, whatever the alpha",
        "--rank 8: in 1 of 5 layers the blocks have 3 outputs, which divide the layer's, not more than the root",
    ]
    with pytest.raises(AdapterError, match=r"--rank 8: 11 outputs make blocks of one, which nothing turns; wanted"):
        Kind("oft").notes({"unet": hosts | {"11": nn.Linear(3, 11)}}, 8)


def test_what_was_begun_with_larger_blocks_goes_on_with_them():
    """0.27's blocks could be larger than their number, in files and in checkpoints, with a mean of them."""
    blocks = torch.randn(2, 9, 9)
    *_, of_file = attached(Kind("oft"), "linear")
    ((key, change),) = of_file.changes().items()
    old = replace(change, blocks=blocks)
    of_file.load({key: old}, "a")
    host, _, of_checkpoint = attached(Kind("oft"), "linear")
    ema = Ema(of_checkpoint.parameters(), 0.9)
    of_checkpoint.load_state_dict(of_file.state_dict())
    ema.load_state_dict({"mean": [2 * blocks], "updates": [5]})
    for adapter in (of_file, of_checkpoint):
        (layer,) = adapter.layers.values()
        assert layer.rank == 9
        assert_close(layer.delta(host.weight, *layer.factors()), old.delta(host.weight), rtol=1e-4, atol=1e-5)
    ema.swap()
    assert torch.equal(layer.blocks, 2 * blocks)


@pytest.mark.parametrize("other", [{"kohya": True, "alpha": 1.0}, {"alpha": 0.1}, {"rescale": torch.ones(18)}])
def test_an_oft_that_is_constrained_or_rescaled_is_nothing_to_start_from(other):
    *_, adapter = attached(Kind("oft"), "linear")
    ((key, change),) = adapter.changes().items()
    with pytest.raises(AdapterError, match="none of which is trained"):
        adapter.load({key: replace(change, **other)}, "a")


def test_the_kinds_are_those_of_the_option():
    assert get_args(AlgoName) == tuple(trained_kinds())
    assert set(ALGOS) == {algo for algo in trained_kinds() if KIND_KEYS[kind_named(algo)].module is None}


def test_loraplus_is_of_the_factors_b():
    *_, lora = attached(Kind(dora=True), "linear")
    assert [up.shape for up in lora.ups()] == [(18, 3)]
    *_, loha = attached(Kind("loha"), "linear")
    assert loha.ups() == []


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "oft"], indirect=True)  # which has no such limit
@pytest.mark.parametrize("most", [0.1, 1e6])
def test_a_norm_over_the_limit_is_shrunk_to_it_and_the_direction_stays(kind, name, most):
    host, _, adapter = attached(kind, name)
    (layer,) = learn(adapter).layers.values()
    update = getattr(layer, "inner", layer)
    before = update.delta(host.weight, *update.factors()).detach()
    assert_close(update.norm(host).detach(), before.norm())
    limited = adapter.limit_norms(most)
    after = update.delta(host.weight, *update.factors()).detach()
    assert float(limited) == (before.norm() > most)
    if most == 1e6:
        assert torch.equal(after, before)
    else:
        assert_close(after, before * (most / before.norm()), rtol=1e-4, atol=1e-6)
    again = [factor.clone() for factor in layer.factors()]
    adapter.limit_norms(most)
    assert_close(list(layer.factors()), again, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_the_limit_of_a_lora_is_sd_scripts(name):
    """LoRANetwork.apply_max_norm_regularization of sd-scripts' networks/lora.py, on one pair of factors."""
    *_, adapter = attached(Kind(), name)
    (layer,) = learn(adapter).layers.values()
    down, up = (factor.detach().clone() for factor in layer.factors())
    if down.ndim == 4:
        updown = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    else:
        updown = up @ down
    norm = (updown * layer.scale).norm().clamp(min=0.5 / 2)
    ratio = torch.clamp(norm, max=0.5) / norm
    adapter.limit_norms(0.5)
    assert ratio < 1
    assert_close(layer.down.detach(), down * ratio**0.5)
    assert_close(layer.up.detach(), up * ratio**0.5)


def test_a_dora_is_verified_on_its_base_alone(tmp_path):
    *_, adapter = attached(Kind("lokr", dora=True), "linear")
    file = read_adapter(learn(adapter).write(tmp_path / "a.safetensors", family="sd1"))
    with pytest.raises(Exception, match="cannot be verified without its base"):
        verify(file.metadata, file.changes, "a")


def test_in_half_precision_a_scaled_update_counts_as_much_less():
    host, x, adapter = attached(Kind("loha"), "linear")
    (layer,) = learn(adapter).layers.values()
    with torch.autocast("cpu", torch.bfloat16):
        full = layer(host, x)
        with adapter.scaled(0.25):
            assert_close(layer(host, x), 0.25 * full, rtol=2e-2, atol=2e-2)


def test_an_adapter_that_changes_a_bias_is_nothing_to_start_from():
    adapter = attach({"unet": {"to_q": nn.Linear(6, 5)}}, rank=2, alpha=2.0)
    ((key, change),) = adapter.changes().items()
    with pytest.raises(AdapterError, match="changes a bias as well"):
        adapter.load({key: replace(change, bias_delta=torch.ones(5))}, "a")


def test_the_share_of_limited_updates_is_told_and_a_norm_below_the_limit_is_none():
    adapter = attach({"unet": {name: nn.Linear(6, 5) for name in "abcd"}}, rank=2, alpha=2.0)
    for layer, size in zip(adapter.layers.values(), (1.0, 0.0, 0.0, 0.0), strict=True):
        nn.init.constant_(layer.up, size)
    assert float(adapter.limit_norms(0.1)) == 0.25
    assert float(adapter.limit_norms(1.05 * 0.1)) == 0
