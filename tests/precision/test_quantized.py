"""A frozen U-Net's weights in few bits: what is kept, what is learned and drawn beside them."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sfumato.trainers import dreambooth, finetune, lora, textual_inversion
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from sfumato import Adapter, cli, compose
from sfumato.adapters import attach, target_layers
from sfumato.errors import AdapterError, ConfigError, PrecisionError
from sfumato.files import read_tensors
from sfumato.models import load_base
from sfumato.precision import decide
from sfumato.precision.quantization import FORMATS, Quantized, quantize, stored_weights
from tests.runs.said import lines

CPU = decide("fp32", device="cpu")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# A layer


def layers(kind, name):
    """A layer in this format, and an ordinary one with the weight that it stands for."""
    plain = nn.Linear(96, 64) if kind is nn.Linear else nn.Conv2d(16, 32, 3, stride=2, padding=1)
    weight = plain.weight.detach()
    ours = copy.deepcopy(plain)
    model = nn.ModuleDict({"layer": ours.to("meta")})
    assert quantize(model, name) == 1
    ours.take(weight)
    ours.bias = nn.Parameter(plain.bias.detach(), requires_grad=False)
    plain.weight.data = FORMATS[name].made(FORMATS[name].held(weight), weight.shape, torch.float32)
    return ours, plain.requires_grad_(False), (5, 96) if kind is nn.Linear else (2, 16, 9, 9)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_a_layer_computes_with_the_weight_that_it_stands_for(kind, name):
    layer, plain, shape = layers(kind, name)
    assert isinstance(layer, kind)
    assert torch.equal(layer.weight, plain.weight)
    x, y = normal(*shape).requires_grad_(), normal(*shape).requires_grad_()
    ours, theirs = layer(x), plain(y)
    assert_close(ours, theirs)
    grad = normal(*ours.shape, seed=1)
    ours.backward(grad)
    theirs.backward(grad)
    assert_close(x.grad, y.grad)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_nothing_of_the_weight_s_size_is_kept_for_the_way_back_but_its_codes(kind, name):
    layer, _, shape = layers(kind, name)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(normal(*shape).requires_grad_())
    assert sum(each.nbytes for each in kept) == sum(each.nbytes for each in layer.held)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_under_autocast_weight_and_product_are_in_its_dtype(kind, name, monkeypatch):
    layer, plain, shape = layers(kind, name)
    made, own = [], FORMATS[name].made
    monkeypatch.setattr(FORMATS[name], "made", lambda *asked: made.append(asked[-1]) or own(*asked))
    x = normal(*shape).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = layer(x), plain(x)
    ours.sum().backward()
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert made == [torch.bfloat16] * 2
    assert_close(ours, theirs, rtol=0.02, atol=0.02)


# A base


def test_other_formats_are_refused():
    with pytest.raises(PrecisionError, match="--quantize int4: unknown; wanted int8 or nf4"):
        decide("fp32", device="cpu", quantized="int4")


def test_small_layers_and_those_that_all_of_the_picture_passes_stay(pocket_folder):
    base = load_base(str(pocket_folder), precision=CPU, unet=False)
    found = quantize(base.unet, "int8")
    layers = {name: module for name, module in base.unet.named_modules() if isinstance(module, Quantized)}
    assert len(layers) == found > 0
    assert not any(name.startswith(("conv_in", "conv_out", "time_embedding")) for name in layers)
    assert min(module.codes.numel() for module in layers.values()) >= 4096


def test_of_large_layers_those_stay_that_all_of_the_picture_passes_and_those_that_pad_in_other_ways():
    names = ("conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding")
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in names})
    model["circular"] = nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular")
    model["same"] = nn.Conv2d(64, 64, 3, padding="same")
    model["mid"] = nn.ModuleDict({"conv_in": nn.Linear(64, 64)})  # of a block, and just large enough
    ours = model.to("meta")["mid"]["conv_in"]
    ours.forward = lambda x: x
    assert quantize(model, "nf4") == 1
    assert isinstance(ours, Quantized)
    assert "forward" not in vars(ours)
    assert "mid.conv_in.codes" not in model.state_dict()


@pytest.mark.parametrize("name", FORMATS)
def test_the_weights_come_from_the_files_and_come_again_after_a_rest(name, pocket_folder):
    plain = load_base(str(pocket_folder), precision=CPU)
    base = load_base(str(pocket_folder), precision=CPU, unet=False)
    quantize(base.unet, name)
    names = {f"{path}.{name}" for path, module in base.unet.named_modules() for name in stored_weights(module)}
    assert names == {f"{path}.{name}" for path, module in plain.unet.named_modules() for name in stored_weights(module)}
    base.lazy_weights.load("unet")
    layers = {path: module for path, module in base.unet.named_modules() if isinstance(module, Quantized)}
    weights = {path: module.weight for path, module in layers.items()}
    for path, weight in weights.items():
        whole = plain.unet.get_submodule(path).weight
        assert_close(weight, whole, rtol=0, atol=float(whole.abs().max()) / (250 if name == "int8" else 6))
    base.lazy_weights.load_only("vae")
    assert all(tensor.is_meta for module in layers.values() for tensor in module.held)
    base.lazy_weights.load("unet")
    assert all(torch.equal(module.weight, weights[path]) for path, module in layers.items())


def test_a_u_net_that_is_read_already_is_refused(pocket_folder):
    with pytest.raises(PrecisionError, match="not read yet"):
        quantize(load_base(str(pocket_folder), precision=CPU).unet, "int8")


@pytest.mark.parametrize(("name", "most"), [("int8", 0.05), ("nf4", 0.25)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_the_u_net_predicts_is_nearly_the_same(pocket_folder, precision, name, most):
    found = []
    for is_quantized in (False, True):
        base = load_base(str(pocket_folder), precision=decide(precision, device="cpu", adapting=True), unet=False)
        if is_quantized:
            quantize(base.unet, name)
        text = base.encode_text(["a square"])
        latents = normal(1, 4, 16, 16)
        with torch.no_grad():
            found.append(base.predict(latents, torch.tensor([500]), text).float())
    assert 0 < (found[1] - found[0]).norm() / found[0].norm() < most


@pytest.mark.parametrize(("name", "least"), [("int8", 0.99), ("nf4", 0.9)])
def test_an_adapter_beside_it_has_nearly_the_same_gradients(pocket_folder, name, least):
    found = []
    for is_quantized in (False, True):
        base = load_base(str(pocket_folder), precision=CPU, unet=False)
        if is_quantized:
            quantize(base.unet, name)
        base.lazy_weights.load("unet")
        adapter = attach(target_layers(base.parts(text=False), "everything"), rank=2, alpha=2.0)
        F.mse_loss(
            base.predict(normal(1, 4, 16, 16), torch.tensor([500]), base.encode_text(["a"])), normal(1, 4, 16, 16)
        ).backward()
        found.append(torch.cat([weight.grad.flatten() for weight in adapter.parameters() if weight.grad is not None]))
    assert F.cosine_similarity(*found, dim=0) > least


# A training


@pytest.fixture
def asked(pocket_folder, pictures, tmp_path):
    quiet = {"sample_every": 0, "measure_every": 0, "device": "cpu", "precision": "fp32", "name": "a"}
    where = {"images": pictures, "base": str(pocket_folder), "output": tmp_path / "run"}
    return {**where, **quiet, "steps": 3, "batch": 2, "caption": "a square", "learning_rate": 1e-3}


@pytest.mark.parametrize(("name", "least", "size"), [("int8", 0.98, "one byte"), ("nf4", 0.75, "half a byte")])
@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"algo": "lokr"}, {"algo": "loha"}, {"algo": "oft", "rank": 4}])
def test_adapters_of_every_kind_learn_nearly_the_same_beside_it(kind, name, least, size, asked, tmp_path, capsys):
    plain = lora.Config(**asked | {"learn": "plain", "rank": 2} | kind)
    ours = replace(plain, quantize=name, output=tmp_path / "ours", sample_every=3)
    whole, beside = (read_tensors(lora.train(config)) for config in (plain, ours))
    said = next(line for line in lines(capsys) if line.startswith(f"large weights    {name}"))
    assert f": {size} each" in said
    assert whole.keys() == beside.keys()
    both = [torch.cat([tensors[each].float().flatten() for each in whole]) for tensors in (whole, beside)]
    assert F.cosine_similarity(*both, dim=0) > least
    assert not torch.equal(*both)
    assert (tmp_path / "ours/samples/000003/0.png").is_file()


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_that_goes_on_has_the_same_bits_and_needs_the_same_weights(name, asked, tmp_path):
    config = lora.Config(**asked | {"learn": "plain", "rank": 2, "quantize": name, "checkpoint_every": 1})
    whole = read_tensors(lora.train(config))
    again = read_tensors(lora.train(replace(config, resume=True)))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_words_learn_nearly_the_same_beside_it(asked, tmp_path):
    config = textual_inversion.Config(**asked | {"caption": "<x>", "placeholder": ("<x>",)})
    plain = read_tensors(textual_inversion.train(config))
    eight = read_tensors(textual_inversion.train(replace(config, quantize="int8", output=tmp_path / "eight")))
    for name, tensor in plain.items():
        assert F.cosine_similarity(tensor.flatten(), eight[name].flatten(), dim=0) > 0.99


def test_where_all_weights_learn_it_is_refused(asked):
    said = "--quantize is for frozen weights, and here all learn; leave it out, or train a LoRA."
    with pytest.raises(ConfigError) as ended:
        finetune.train(finetune.Config(**asked, quantize="int8"))
    assert str(ended.value) == said
    with pytest.raises(ConfigError, match="--quantize has no effect without --method lora"):
        dreambooth.train(dreambooth.Config(**asked, class_name="square", method="full", quantize="int8"))


# Drawing, and mixing


@pytest.fixture
def drawn_by(pocket_folder, tmp_path):
    """Pixels of an image that `sfumato generate` draws with these words."""

    def draw(*words):
        path = tmp_path / f"{len(list(tmp_path.glob('*.png')))}.png"
        at = ["--base", str(pocket_folder), "--device", "cpu", "--precision", "fp32", "--size", "64", "--steps", "3"]
        assert cli.main(["generate", "a square", *at, "-o", str(path), *map(str, words)]) == 0
        return torch.from_numpy(np.array(Image.open(path))).float()

    return draw


@pytest.mark.parametrize(("name", "most"), [("int8", 4), ("nf4", 20)])
def test_an_image_is_drawn_nearly_as_before_and_says_so(name, most, drawn_by, tmp_path, capsys):
    plain, ours = drawn_by(), drawn_by("--quantize", name)
    assert 0 < (plain - ours).abs().mean() < most
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "1.png")]) == 0
    assert f"--quantize {name}" in capsys.readouterr().out


@pytest.fixture
def adapter(asked, tmp_path):
    """One of all layers, strong enough to be seen."""
    config = lora.Config(**asked | {"learn": "plain", "rank": 2, "targets": "everything", "learning_rate": 0.05})
    return lora.train(config)


def test_an_adapter_is_drawn_beside_it(adapter, drawn_by):
    alone, plain, ours = drawn_by(), drawn_by("--lora", adapter), drawn_by("--lora", adapter, "--quantize", "int8")
    assert (plain - alone).abs().mean() > 10
    assert (plain - ours).abs().mean() < 0.2 * (plain - alone).abs().mean()


@pytest.mark.parametrize("name", FORMATS)
def test_a_mix_is_beside_the_layers_and_leaves_the_codes(name, adapter, pocket_folder):
    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu", quantized=name))
    assert {each.format for each in base.unet.modules() if isinstance(each, Quantized)} == {name}
    before = {path: buffer.clone() for path, buffer in base.unet.named_buffers()}
    x = normal(1, 4, 16, 16), torch.tensor([500]), base.encode_text(["a square"])
    with torch.no_grad():
        alone = base.predict(*x)
        mix = compose(base, Adapter(adapter, 1.0))
        mixed = base.predict(*x)
        mix.undo()
        again = base.predict(*x)
    assert (mixed - alone).norm() > 0.05 * alone.norm()
    assert torch.equal(again, alone)
    assert all(torch.equal(buffer, before[path]) for path, buffer in base.unet.named_buffers())
    with pytest.raises(AdapterError, match="quantised"):
        compose(base, Adapter(adapter, 1.0), way="baked")
