"""The states that real pipelines are in: offloaded, compiled, quantised, touched by peft, loaded from a file."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.testing import assert_close

from sfumato.adapters.blocks import Blocks
from sfumato.compose import Adapter, compose, current
from sfumato.compose.guidance import adapter_guidance
from sfumato.compose.layers.original_weights import OriginalWeights, find_original
from sfumato.compose.per_image import composite, per_picture
from sfumato.compose.regions import Region, regions
from sfumato.compose.schedules import over_steps
from sfumato.errors import AdapterError
from sfumato.files.save import write_tensors
from sfumato.generation.draw import draw
from sfumato.models import load_base
from tests.compose.conftest import fresh, weights_sha
from tests.tiny import CPU, tiny_pipeline, write_single_file

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def predict(unet):
    """The U-Net's output for fixed inputs; at 16 x 16, so that no norm of these few channels is over two numbers."""
    g = torch.Generator().manual_seed(0)
    dtype = next(p.dtype for p in unet.parameters() if p.is_floating_point())
    x, text = torch.randn(2, 4, 16, 16, generator=g).to(dtype), torch.randn(2, 7, 64, generator=g).to(dtype)
    with torch.no_grad():
        return unet(x, 500, encoder_hidden_states=text, return_dict=False)[0].clone()


# The live way


@pytest.mark.parametrize("endings", [ATTENTION, ()])
def test_live_predicts_what_baked_predicts(originals, write, endings):
    """All attention; and everything, convolutions of either kernel included."""
    outputs = []
    for way in ("baked", "live"):
        pipe = fresh(originals["sd1"])
        files = [write(name, pipe, *endings, seed=seed, rank=seed + 2) for seed, name in enumerate("abc")]
        mix = compose(pipe, *(Adapter(file, 0.3) for file in files), way=way).set(a=0.7, b=-0.2)
        outputs.append(predict(pipe.unet))
        mix.undo()
        assert torch.equal(predict(pipe.unet), predict(originals["sd1"].unet))
    assert_close(outputs[0], outputs[1], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(outputs[0], predict(originals["sd1"].unet), atol=1e-3)


def test_live_changes_no_weight_and_new_weights_no_memory(sd1, write):
    before = weights_sha(sd1)
    mix = compose(sd1, Adapter(write("a", sd1)), Adapter(write("b", sd1, seed=2), 0.5), way="live")
    path = mix._sites["unet", LAYER, "weight"]._path
    where = path.now.up.data_ptr(), path._down.data_ptr()
    mix.set(a=0.2, b=0.0).set(b=0.9)
    assert (path.now.up.data_ptr(), path._down.data_ptr()) == where
    assert weights_sha(sd1) == before
    mix.remove("a", "b")
    assert not sd1.unet.get_submodule(LAYER)._forward_hooks


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the dispatched operations that are no views (of which `_unsafe_view` is one)."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is not torch.ops.aten._unsafe_view.default and not any(
            argument.alias_info is not None and not argument.alias_info.is_write
            for argument in function._schema.arguments
        )
        return function(*arguments, **(options or {}))


def test_eight_live_adapters_add_two_operations_a_layer(sd1, write):
    files = [write(f"f{i}", sd1, *ATTENTION, seed=i) for i in range(8)]
    with Operations() as without:
        predict(sd1.unet)
    compose(sd1, *(Adapter(file, 0.1) for file in files), way="live")
    with Operations() as live:
        predict(sd1.unet)
    captions = sum(path.endswith(("attn2.to_k", "attn2.to_v")) for path, _ in sd1.unet.named_modules())
    assert live.count - without.count == 2 * 32 + 2 * captions  # what is added to these is kept for the next step
    assert live.count <= 1.4 * without.count


def test_live_under_autocast_and_in_another_dtype(sd1, write):
    compose(sd1, Adapter(write("a", sd1)), way="live")
    exact = predict(sd1.unet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(predict(sd1.unet).float(), exact, atol=0.1, rtol=0.1)
    sd1.unet.to(torch.bfloat16)
    assert_close(predict(sd1.unet).float(), exact, atol=0.1, rtol=0.1)


def test_live_lets_gradients_through(sd1, write):
    compose(sd1, Adapter(write("a", sd1, "attn1.to_q")), way="live")
    x = torch.randn(1, 3, 64, requires_grad=True)
    sd1.unet.get_submodule(LAYER)(x).sum().backward()
    assert x.grad.abs().sum() > 0


# Quantised bases


class Int8Linear(nn.Module):
    """A linear layer as quantisers make them: packed int8 weights, scales, no float weight to be had."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = nn.Parameter(layer.weight.detach().abs().amax(1) / 127, requires_grad=False)
        packed = (layer.weight.detach() / self.scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(packed.flatten()[:, None], requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        weight = self.weight.view(self.out_features, self.in_features).to(x.dtype) * self.scale[:, None].to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def quantised(pipe):
    """The pipe with its U-Net's linear layers quantised."""
    for module in list(pipe.unet.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
    return pipe


def test_a_quantised_unet_takes_adapters_live_and_the_rest_is_baked(originals, write, capsys):
    """Against the same quantised weights in fp32 with the adapters baked in."""
    pipe, plain = quantised(fresh(originals["sd1"])), fresh(originals["sd1"])
    for path, module in pipe.unet.named_modules():
        if isinstance(module, Int8Linear):
            weight = module.weight.view(module.out_features, -1).float() * module.scale[:, None]
            plain.unet.get_submodule(path).weight.data = weight
    files = [write(name, plain, seed=seed) for seed, name in enumerate("ab")]
    base = predict(pipe.unet)
    mix = compose(pipe, *(Adapter(file, 0.4) for file in files))
    assert "quantised" in capsys.readouterr().err
    compose(plain, *(Adapter(file, 0.4) for file in files))
    assert_close(predict(pipe.unet), predict(plain.unet), atol=2e-5, rtol=1e-4)
    mix.undo()
    assert torch.equal(predict(pipe.unet), base)


def test_a_torch_quantised_unet_takes_adapters_live(originals, write):
    """torch's own dynamic int8, whose layers have no tensor for a weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = fresh(originals["sd1"])
        file = write("a", pipe, *ATTENTION)
        pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {nn.Linear}, dtype=torch.qint8)
    base = predict(pipe.unet)
    mix = compose(pipe, Adapter(file))
    changed = predict(pipe.unet)
    mix.undo()
    assert torch.equal(predict(pipe.unet), base)
    reference = fresh(originals["sd1"])
    unchanged = predict(reference.unet)
    compose(reference, Adapter(file))
    assert_close(changed - base, predict(reference.unet) - unchanged, atol=0.1, rtol=0.2)


def test_a_change_that_depends_on_the_weight_asks_the_quantised_layer(originals, tmp_path):
    gain = torch.linspace(-0.5, 0.5, 64)
    flat = "lora_unet_" + LAYER.replace(".", "_")
    tensors = {f"{flat}.weight": gain, f"{flat}.on_input": torch.tensor(False)}
    file = write_tensors(tmp_path / "ia3.safetensors", tensors)
    pipe = quantised(fresh(originals["sd1"]))
    layer, x = pipe.unet.get_submodule(LAYER), torch.randn(3, 64)
    with torch.no_grad():
        before = layer(x)
        compose(pipe, Adapter(file, 0.5))
        assert_close(layer(x), before * (1 + 0.5 * gain), atol=1e-5, rtol=1e-4)


def test_baking_into_a_quantised_unet_is_refused(originals, write):
    pipe = fresh(originals["sd1"])
    file = write("a", pipe, *ATTENTION)
    with pytest.raises(AdapterError, match=r"quantised.*way='live'"):
        compose(quantised(pipe), Adapter(file), way="baked")


# torch.compile


HOW = ["block", pytest.param("whole", marks=pytest.mark.slow)]


def compiled(pipe, how):
    """The pipe with its middle block, or its whole U-Net, compiled."""
    torch._dynamo.reset()
    if how == "block":
        pipe.unet.mid_block.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_compiled_unet_follows_baked_weights(originals, write, how):
    pipe, plain = compiled(fresh(originals["sd1"]), how), fresh(originals["sd1"])
    file = write("a", plain, *ATTENTION)
    base = predict(pipe.unet)
    mix = compose(pipe, Adapter(file, 0.8))
    compose(plain, Adapter(file, 0.8))
    assert_close(predict(pipe.unet), predict(plain.unet), atol=1e-5, rtol=1e-4)
    mix.undo()
    assert torch.equal(predict(pipe.unet), base)


def test_a_block_that_was_wrapped_to_be_compiled_is_mixed_as_any_other(originals, write):
    pipe, plain = fresh(originals["sd1"]), fresh(originals["sd1"])
    adapter = Adapter(write("a", plain, *ATTENTION), Blocks(0.8, {"down.0.attentions": 0.5}))
    blocks = pipe.unet.down_blocks
    block, blocks[0] = blocks[0], torch.compile(blocks[0], backend="eager")
    mix = compose(pipe, adapter)
    compose(plain, adapter)
    blocks[0] = block
    assert weights_sha(pipe) == weights_sha(plain)
    blocks[0] = torch.compile(block, backend="eager")
    mix.undo()
    blocks[0] = block
    assert weights_sha(pipe) == weights_sha(fresh(originals["sd1"]))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_unet_compiled_after_a_live_mix_follows_its_weights(originals, write, how):
    pipe, plain = fresh(originals["sd1"]), fresh(originals["sd1"])
    base = predict(pipe.unet)
    file = write("a", pipe, *ATTENTION)
    mix, baked = compose(pipe, Adapter(file, 0.8), way="live"), compose(plain, Adapter(file, 0.8))
    compiled(pipe, how)
    for weight in (0.8, 0.3, 0.0, -0.5):
        mix.set(a=weight)
        baked.set(a=weight)
        assert_close(predict(pipe.unet), predict(plain.unet), atol=2e-5, rtol=1e-4)
    with pytest.raises(AdapterError, match="compiled"):
        mix.add(Adapter(file, name="again"))
    assert mix.weights == {"a": -0.5}
    mix.undo()
    assert_close(predict(pipe.unet), base, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_what_follows_the_steps_is_not_compiled_with_the_unet(originals, write):
    """It sets weights, which torch took minutes to compile."""
    pipe = SimpleNamespace(**vars(fresh(originals["sd1"])), scheduler=DDIMScheduler())
    compiling = []

    def weight(progress):
        compiling.append(torch.compiler.is_compiling())
        return progress

    with compose(pipe, Adapter(write("a", pipe, *ATTENTION))) as mix:
        predict(compiled(pipe, "whole").unet)
        with over_steps(mix, a=weight):
            predict(pipe.unet)
    assert compiling == [False]


@pytest.mark.parametrize("how", ["whole", "in place", "blocks"])
def test_a_live_mix_on_a_compiled_unet_is_refused(sd1, write, how):
    file = write("a", sd1, *ATTENTION)
    if how == "whole":
        sd1.unet = torch.compile(sd1.unet, backend="eager")
    else:
        (sd1.unet if how == "in place" else sd1.unet.mid_block).compile(backend="eager")
    with pytest.raises(AdapterError, match=r"compiled already.*baked"):
        compose(sd1, Adapter(file), way="live")
    assert current(sd1) is None


HOOKED = {
    "by image": lambda pipe, adapter: per_picture(pipe, [[adapter], []]),
    "composite": lambda pipe, adapter: composite(pipe, adapter),
    "by region": lambda pipe, adapter: regions(pipe, Region((0, 0, 0.5, 1), adapter)),
}


@pytest.mark.parametrize(
    "how", ["blocks", *(pytest.param(how, marks=pytest.mark.slow) for how in ("whole", "in place"))]
)
@pytest.mark.parametrize("way", HOOKED)
def test_adapters_of_one_picture_or_region_are_refused_on_a_compiled_unet(way, how, originals, write):
    """A layer that was compiled and called would not see them."""
    sd1 = fresh(originals["sd1"])
    adapter = Adapter(write("a", sd1, *ATTENTION))
    with HOOKED[way](sd1, adapter):
        pass
    if how == "whole":
        sd1.unet = torch.compile(sd1.unet, backend="eager")
    else:
        (sd1.unet if how == "in place" else sd1.unet.mid_block).compile(backend="eager")
    with pytest.raises(AdapterError, match="the unet is compiled"), HOOKED[way](sd1, adapter):
        pass


# diffusers' offloading in groups


def test_a_unet_on_disk_is_not_mixed_into_and_a_live_mix_works(originals, write, tmp_path):
    pipe, wanted = fresh(originals["sd1"]), fresh(originals["sd1"])
    adapter = Adapter(write("a", pipe, *ATTENTION))
    compose(wanted, adapter)
    before = compose(pipe, adapter)
    where = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path / "disk")}
    pipe.unet.enable_group_offload(torch.device("cpu"), **where)
    for change in (lambda: before.set(a=0.5), before.undo):
        with pytest.raises(AdapterError, match="the unet is offloaded to disk in groups"):
            change()
    other = fresh(originals["sd1"])
    base = predict(other.unet)
    other.unet.enable_group_offload(torch.device("cpu"), **where | {"offload_to_disk_path": str(tmp_path / "other")})
    with pytest.raises(AdapterError, match="the unet is offloaded to disk in groups"):
        compose(other, adapter)
    assert current(other) is None
    with compose(other, adapter, way="live"):
        assert_close(predict(other.unet), predict(wanted.unet), atol=2e-5, rtol=1e-4)
    assert torch.equal(predict(other.unet), base)


class Streamed:
    """A layer's tensors as diffusers' ModuleGroup with a stream has them: each call's are copies of those it holds."""

    offload_to_disk_path, stream = None, "a stream"

    def __init__(self, layer):
        self.held = {parameter: parameter.data for parameter in layer.parameters(recurse=False)}
        layer._diffusers_hook = SimpleNamespace(hooks={"group_offloading": SimpleNamespace(group=self)})
        layer.register_forward_pre_hook(lambda *_: self.fill(torch.clone))
        layer.register_forward_hook(lambda *_: self.fill(lambda tensor: tensor))

    def fill(self, taken):
        for parameter, tensor in self.held.items():
            parameter.data = taken(tensor)


def test_adapter_guidance_where_diffusers_holds_on_to_the_weights(originals, write):
    adapter = Adapter(write("a", originals["sd1"], *ATTENTION))
    found = []
    for is_streamed in (False, True):
        pipe = fresh(originals["sd1"])
        base = predict(pipe.unet)
        if is_streamed:
            for layer in pipe.unet.modules():
                if next(layer.parameters(recurse=False), None) is not None:
                    Streamed(layer)
        mix = compose(pipe, adapter)
        with adapter_guidance(mix, 2, guidance=7.5):
            found.append(predict(pipe.unet))
        mix.undo()
        assert torch.equal(predict(pipe.unet), base)
    assert torch.equal(*found)
    assert not torch.allclose(found[0], base, atol=1e-3)


# accelerate's offloading


def test_sequential_offload_is_mixed_in_main_memory(originals, write):
    from accelerate import cpu_offload

    pipe, plain = fresh(originals["sd1"]), fresh(originals["sd1"])
    file = write("a", pipe, *ATTENTION)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert pipe.unet.get_submodule(LAYER).weight.is_meta
    base = predict(pipe.unet)
    mix = compose(pipe, Adapter(file, 0.8))
    compose(plain, Adapter(file, 0.8))
    assert_close(predict(pipe.unet), predict(plain.unet), atol=1e-5, rtol=1e-4)
    mix.set(a=0.1).undo()
    assert torch.equal(predict(pipe.unet), base)


def test_sequential_offload_takes_the_live_way_too(originals, write):
    from accelerate import cpu_offload

    pipe, plain = fresh(originals["sd1"]), fresh(originals["sd1"])
    file = write("a", pipe, *ATTENTION)
    compose(plain, Adapter(file, 0.8))
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    compose(pipe, Adapter(file, 0.8), way="live")
    assert_close(predict(pipe.unet), predict(plain.unet), atol=2e-5, rtol=1e-4)


def test_model_offload_is_no_obstacle(originals, write):
    """The hook of enable_model_cpu_offload, which moves whole models in and out around their calls."""
    from accelerate import cpu_offload_with_hook

    pipe, plain = fresh(originals["sd1"]), fresh(originals["sd1"])
    file = write("a", pipe, *ATTENTION)
    pipe.unet, hook = cpu_offload_with_hook(pipe.unet, execution_device=torch.device("cpu"))
    base = predict(pipe.unet)
    mix = compose(pipe, Adapter(file, 0.8))
    compose(plain, Adapter(file, 0.8))
    hook.offload()
    assert_close(predict(pipe.unet), predict(plain.unet), atol=1e-5, rtol=1e-4)
    mix.undo()
    assert torch.equal(predict(pipe.unet), base)


def test_an_empty_shell_is_refused(sd1, write):
    file = write("a", sd1, *ATTENTION)
    sd1.unet.to("meta")
    with pytest.raises(AdapterError, match="not in memory"):
        compose(sd1, Adapter(file))


@pytest.mark.parametrize("way", ["baked", "live"])
def test_a_base_whose_unet_was_not_needed_yet_reads_it_for_the_mix(pocket_folder, write, way):
    whole, unread = (load_base(str(pocket_folder), precision=CPU, unet=unet) for unet in (True, False))
    adapter = Adapter(write("a", whole, *ATTENTION, family="pocket"), 0.8)
    with compose(whole, adapter, way=way), compose(unread, adapter, way=way):
        assert not any(weight.is_meta for weight in unread.unet.parameters())
        assert draw(unread, "red square", 0, steps=1) == draw(whole, "red square", 0, steps=1)
    assert weights_sha(unread) == weights_sha(load_base(str(pocket_folder), precision=CPU))


# peft's traces


def test_what_was_fused_before_is_the_base(originals, write):
    """Refused while peft's layers are in; after unload_lora_weights the fused weights are the base."""
    pipe = tiny_pipeline("sd1", shallow=True)
    first, second = write("first", pipe, *ATTENTION), write("second", pipe, *ATTENTION, seed=2)
    pipe.load_lora_weights(str(first.parent), weight_name=first.name, adapter_name="first")
    pipe.fuse_lora(components=["unet"])
    with pytest.raises(AdapterError, match="unload_lora_weights"):
        compose(pipe, Adapter(second))
    pipe.unload_lora_weights()
    fused = weights_sha(pipe)
    mix = compose(pipe, Adapter(second, 0.5))
    assert weights_sha(pipe) != fused
    mix.undo()
    assert weights_sha(pipe) == fused


# Where the originals are


def from_folder(path, dtype=torch.float32):
    import diffusers

    tiny_pipeline("sd1", shallow=True).to(torch.float32).save_pretrained(str(path))
    return diffusers.StableDiffusionPipeline.from_pretrained(str(path), torch_dtype=dtype, safety_checker=None)


@pytest.fixture
def copied(monkeypatch):
    """The bytes of all weights that were copied."""
    from sfumato.compose.layers import original_weights

    seen, real = [], original_weights._copies
    monkeypatch.setattr(
        original_weights, "_copies", lambda weights: seen.extend(w.nbytes for w in weights) or real(weights)
    )
    return seen


def test_the_originals_are_in_the_file_of_the_base(tmp_path, write, copied):
    pipe = from_folder(tmp_path / "base")
    before = weights_sha(pipe)
    mix = compose(pipe, Adapter(write("a", pipe), 0.8)).set(a=0.2)
    assert copied == []
    mix.undo()
    assert weights_sha(pipe) == before


def test_weights_that_their_file_does_not_hold_are_copied(tmp_path, write, copied):
    """One weight was changed since it was loaded; and all of them in another dtype."""
    pipe = from_folder(tmp_path / "base")
    with torch.no_grad():
        pipe.unet.get_submodule(LAYER).weight[0, 0] += 1
    before = weights_sha(pipe)
    file = write("a", pipe, *ATTENTION)
    compose(pipe, Adapter(file)).undo()
    assert copied == [pipe.unet.get_submodule(LAYER).weight.nbytes]
    assert weights_sha(pipe) == before
    pipe.unet.to(torch.bfloat16)
    before = weights_sha(pipe)
    compose(pipe, Adapter(file)).undo()
    assert len(copied) == 1 + 32
    assert weights_sha(pipe) == before


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file_is_a_source_too(tmp_path, family):
    pipe = tiny_pipeline(family, shallow=True, whole_vocabulary=True)
    file = write_single_file(pipe, tmp_path / "model.safetensors")
    weights = {
        ("unet", path, "weight"): module.weight
        for path, module in pipe.unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    found = {
        p: find_original(weights[p], c) for p, c in OriginalWeights({"unet": pipe.unet}, [file]).of(weights).items()
    }
    mapped = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    assert len(found) == len(weights)
    assert all(torch.equal(found[place], weight) for place, weight in weights.items())
    assert len(mapped) == len(weights)  # each a view of the file, no common arena


def test_what_outputs_are_multiplied_with_beside_a_quantised_layer_leaves_its_bias(originals, tmp_path):
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    gain = torch.linspace(-0.5, 0.5, 64)
    roles = {"weight": gain, "on_input": torch.tensor(False)}
    tensors = {f"lora_unet_{path.replace('.', '_')}.{name}": value for name, value in roles.items()}
    pipe = quantised(fresh(originals["sd1"]))
    layer, x = pipe.unet.get_submodule(path), torch.randn(3, 64)
    with torch.no_grad():
        before = layer(x)
        compose(pipe, Adapter(write_tensors(tmp_path / "ia3.safetensors", tensors), 0.5))
        assert_close(layer(x), before + 0.5 * gain * (before - layer.bias), atol=1e-5, rtol=1e-4)


def test_a_full_difference_of_a_strided_convolution_is_the_same_in_both_ways(originals, tmp_path):
    path, found = "down_blocks.0.downsamplers.0.conv", []
    for way in ("baked", "live"):
        pipe, draws = fresh(originals["sd1"]), torch.Generator().manual_seed(1)
        layer = pipe.unet.get_submodule(path)
        x = torch.randn(1, layer.in_channels, 8, 8, generator=draws)
        difference = {f"lora_unet_{path.replace('.', '_')}.diff": torch.randn(layer.weight.shape, generator=draws)}
        compose(pipe, Adapter(write_tensors(tmp_path / f"{way}.safetensors", difference), 0.5), way=way)
        with torch.no_grad():
            found.append(layer(x))
    assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
