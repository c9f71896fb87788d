"""Adapters of every kind in one mix, against the definition W + sum of w_i delta_i(W) written out in float64."""

from itertools import combinations

import pytest
import torch
from torch import kron
from torch.testing import assert_close

from sfumato.compose import Adapter, compose
from sfumato.compose.layers.fused import FusedWeight
from sfumato.errors import AdapterError
from sfumato.files.save import write_tensors
from tests.compose.conftest import fresh, weights_sha

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # (64, 64)
CONVOLUTION = "mid_block.resnets.0.conv1"  # (64, 64, 3, 3)
NORM = "mid_block.resnets.0.norm1"
WEIGHTS = {"lora": 0.7, "dora": -0.4, "loha": 1.3, "lokr": 0.25, "ia3": 0.9}


@pytest.fixture
def kinds(tmp_path):
    """{name: (file, delta of the linear layer's weight in float64)}, each file of another kind."""
    g = torch.Generator().manual_seed(7)

    def draw(*shape, scale=0.1):
        return torch.randn(shape, generator=g) * scale

    def file(name, tensors):
        flat = "lora_unet_" + LINEAR.replace(".", "_")
        return write_tensors(tmp_path / f"{name}.safetensors", {f"{flat}.{key}": t for key, t in tensors.items()})

    up, down = draw(64, 4), draw(4, 64)
    two_up, two_down, magnitude = draw(64, 3), draw(3, 64), 0.5 + draw(1, 64).abs()
    a1, b1, a2, b2 = draw(64, 3, scale=0.3), draw(3, 64), draw(64, 3, scale=0.3), draw(3, 64)
    w1, w2 = draw(8, 8, scale=0.3), draw(8, 8, scale=0.3)
    gain = draw(64)

    def dora(weight):
        sum_ = weight + 0.5 * two_up.double() @ two_down.double()
        return magnitude.double() * sum_ / sum_.norm(dim=0, keepdim=True) - weight

    lora = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
    with_scale = {"lora_up.weight": two_up, "lora_down.weight": two_down, "alpha": torch.tensor(1.5)}
    hada = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(3.0)}
    return {
        "lora": (file("lora", lora), lambda weight: 0.5 * up.double() @ down.double()),
        "dora": (file("dora", with_scale | {"dora_scale": magnitude}), dora),
        "loha": (file("loha", hada), lambda w: (a1.double() @ b1.double()) * (a2.double() @ b2.double())),
        "lokr": (file("lokr", {"lokr_w1": w1, "lokr_w2": w2}), lambda w: kron(w1.double(), w2.double())),
        "ia3": (
            file("ia3", {"weight": gain, "on_input": torch.tensor(False)}),
            lambda weight: weight * gain.double()[:, None],
        ),
    }


SUBSETS = [names for size in range(1, 6) for names in combinations(WEIGHTS, size)]


def test_every_subset_of_five_kinds_is_the_sum_of_their_deltas(originals, kinds):
    """All 31 subsets, and after each the base's very bytes."""
    pipe = fresh(originals["sd1"])
    before = weights_sha(pipe)
    layer = pipe.unet.get_submodule(LINEAR)
    base = layer.weight.detach().double()
    for names in SUBSETS:
        mix = compose(pipe, *(Adapter(kinds[name][0], WEIGHTS[name], name=name) for name in names))
        wanted = base + sum(WEIGHTS[name] * kinds[name][1](base) for name in names)
        assert_close(layer.weight.detach().double(), wanted, atol=1e-6, rtol=0)
        mix.undo()
    assert weights_sha(pipe) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_five_kinds_in_half_precision_are_rounded_once(originals, kinds, dtype):
    pipe = fresh(originals["sd1"])
    pipe.unet.to(dtype)
    layer = pipe.unet.get_submodule(LINEAR)
    base = layer.weight.detach().double()
    wanted = base + sum(WEIGHTS[name] * delta(base) for name, (_, delta) in kinds.items())
    compose(pipe, *(Adapter(file, WEIGHTS[name], name=name) for name, (file, _) in kinds.items()))
    once = (wanted.to(dtype).double() - wanted).norm()
    assert (layer.weight.detach().double() - wanted).norm() <= 1.01 * once


def test_any_order_and_any_history_give_the_same_bytes(originals, kinds):
    one, other = fresh(originals["sd1"]), fresh(originals["sd1"])
    compose(one, *(Adapter(kinds[name][0], WEIGHTS[name], name=name) for name in WEIGHTS))
    mix = compose(other, *(Adapter(kinds[name][0], 0.1, name=name) for name in ("ia3", "lokr", "dora")))
    mix.add(Adapter(kinds["loha"][0], WEIGHTS["loha"]), Adapter(kinds["lora"][0], 2.0)).remove("ia3")
    mix.add(Adapter(kinds["ia3"][0], WEIGHTS["ia3"])).set_weights({n: WEIGHTS[n] for n in ("lokr", "dora", "lora")})
    assert weights_sha(one) == weights_sha(other)


def test_the_live_way_is_the_baked_way(originals, kinds):
    """Low-rank kinds stacked, the others in one dense path."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    outputs = []
    for way in ("baked", "live"):
        pipe = fresh(originals["sd1"])
        compose(pipe, *(Adapter(file, WEIGHTS[name], name=name) for name, (file, _) in kinds.items()), way=way)
        with torch.no_grad():
            outputs.append(pipe.unet.get_submodule(LINEAR)(x))
    assert_close(outputs[0], outputs[1], atol=2e-6, rtol=1e-5)


def test_an_original_in_main_memory_goes_to_its_weight_once(originals, kinds, monkeypatch):
    pipe, fetched = fresh(originals["sd1"]), []
    kept = FusedWeight._kept
    monkeypatch.setattr(FusedWeight, "_kept", lambda site, weight: fetched.append(site.path) or kept(site, weight))
    with compose(pipe, *(Adapter(kinds[name][0], 1.0, name=name) for name in ("dora", "loha", "lokr"))) as mix:
        assert fetched == [LINEAR]
        mix.set(loha=0.5)
        assert fetched == [LINEAR] * 2


def difference(tmp_path, pipe, name="norms"):
    """A full difference of a convolution and its bias, and of a norm's weight and bias."""
    g = torch.Generator().manual_seed(3)
    tensors = {}
    for path, weight, bias in ((CONVOLUTION, "diff", "diff_b"), (NORM, "w_norm", "b_norm")):
        layer = pipe.unet.get_submodule(path)
        flat = "lora_unet_" + path.replace(".", "_")
        tensors[f"{flat}.{weight}"] = torch.randn(layer.weight.shape, generator=g)
        tensors[f"{flat}.{bias}"] = torch.randn(layer.bias.shape, generator=g)
    return write_tensors(tmp_path / f"{name}.safetensors", tensors)


@pytest.mark.parametrize("way", ["baked", "live"])
def test_biases_and_norms_change_too(sd1, tmp_path, way):
    before = weights_sha(sd1)
    file = difference(tmp_path, sd1)
    norm, layer = sd1.unet.get_submodule(NORM), sd1.unet.get_submodule(CONVOLUTION)
    was = [t.detach().clone() for t in (norm.weight, norm.bias, layer.bias)]
    mix = compose(sd1, Adapter(file, 0.5), way=way)
    from sfumato.files.read import read_tensors

    tensors = read_tensors(file)
    flat = {path: "lora_unet_" + path.replace(".", "_") for path in (NORM, CONVOLUTION)}
    names = (f"{flat[NORM]}.w_norm", f"{flat[NORM]}.b_norm", f"{flat[CONVOLUTION]}.diff_b")
    for now, old, name in zip((norm.weight, norm.bias, layer.bias), was, names, strict=True):
        assert_close(now.detach(), old + 0.5 * tensors[name])
    mix.set(norms=0.0)
    assert weights_sha(sd1) == before
    mix.set(norms=1.0).undo()
    assert weights_sha(sd1) == before


def test_words_that_were_loaded_into_a_mixed_embedding_stay_beside_the_mix(sd1, tmp_path):
    """transformers gives the same embedding more rows, as diffusers' load_textual_inversion asks for."""
    encoder = sd1.text_encoder
    was = encoder.get_input_embeddings().weight.detach().clone()
    name, delta = "lora_te_text_model_embeddings_token_embedding.diff", torch.ones_like(was)
    mix = compose(sd1, Adapter(write_tensors(tmp_path / "table.safetensors", {name: delta}), 0.5))
    encoder.resize_token_embeddings(len(was) + 1, mean_resizing=False)
    now = encoder.get_input_embeddings().weight
    word = now[-1].clone()
    for change, wanted in ((lambda: mix.set(table=0.25), was + 0.25), (mix.undo, was)):
        change()
        assert torch.equal(now[:-1], wanted)
        assert torch.equal(now[-1], word)


def test_a_layer_that_is_widened_to_compute_takes_what_depends_on_its_weight(originals, kinds):
    """diffusers' layerwise casting: weights in float8, sums in fp32."""
    pipe = fresh(originals["sd1"])
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    layer = pipe.unet.get_submodule(LINEAR)
    base, x = layer.weight.detach().double(), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    before = layer(x)
    file, delta = kinds["dora"]
    mix = compose(pipe, Adapter(file, 0.5))
    assert_close(layer(x), before + 0.5 * x @ delta(base).float().t(), atol=1e-5, rtol=1e-4)
    mix.undo()
    assert torch.equal(layer(x), before)


def test_a_bias_in_float8_is_added_in_fp32(sd1, tmp_path):
    norm = sd1.unet.get_submodule(NORM)
    was = norm.bias.detach().clone()
    name = "lora_unet_" + NORM.replace(".", "_")
    change = torch.full(norm.bias.shape, 0.5).to(torch.float8_e4m3fn)
    compose(sd1, Adapter(write_tensors(tmp_path / "b.safetensors", {f"{name}.diff_b": change})))
    assert_close(norm.bias.detach(), was + 0.5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_float8_are_multiplied_in_fp32(dtype, sd1, tmp_path):
    weight = sd1.unet.get_submodule(LINEAR).weight
    was = weight.detach().clone()
    g, name = torch.Generator().manual_seed(6), "lora_unet_" + LINEAR.replace(".", "_")
    down, up = (torch.randn(*shape, generator=g).to(dtype) for shape in ((4, was.shape[1]), (was.shape[0], 4)))
    half = {f"{name}.lora_down.weight": down.half(), f"{name}.lora_up.weight": up.half()}
    eighth = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    files = [Adapter(write_tensors(tmp_path / f"{n}.safetensors", t), 0.5) for n, t in (("a", eighth), ("b", half))]
    compose(sd1, *files)
    assert_close(weight.detach(), was + up.float() @ down.float())


def test_a_bias_that_the_layer_does_not_have_is_refused(sd1, tmp_path):
    flat = "lora_unet_" + LINEAR.replace(".", "_")
    file = write_tensors(
        tmp_path / "b.safetensors", {f"{flat}.diff": torch.zeros(64, 64), f"{flat}.diff_b": torch.zeros(64)}
    )
    with pytest.raises(AdapterError, match="bias"):
        compose(sd1, Adapter(file))


def test_a_tucker_convolution_is_not_rounded_on_its_way(sd1, tmp_path):
    g = torch.Generator().manual_seed(5)
    flat = "lora_unet_" + CONVOLUTION.replace(".", "_")
    up, down, mid = (torch.randn(shape, generator=g).half() for shape in ((64, 4, 1, 1), (4, 64, 1, 1), (4, 4, 3, 3)))
    parts = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid, "alpha": torch.tensor(0.04)}
    file = write_tensors(tmp_path / "t.safetensors", {f"{flat}.{name}": tensor for name, tensor in parts.items()})
    layer = sd1.unet.get_submodule(CONVOLUTION)
    base = layer.weight.detach().double()
    delta = torch.einsum("op,pqhw,qi->oihw", up.double().flatten(1), mid.double(), down.double().flatten(1))
    compose(sd1, Adapter(file))
    assert_close(layer.weight.detach().double(), base + 0.01 * delta, atol=1e-6, rtol=0)
