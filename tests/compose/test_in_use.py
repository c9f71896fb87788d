"""Mixes as people use them: in inference mode, with offloading, copied, beside each other, in calls of several rows."""

import copy
import gc
import pickle
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image
from torch.testing import assert_close

from sfumato.compose import Adapter, adapter_guidance, compose, current
from sfumato.compose.hooks import unconditional_rows, unet_lock
from sfumato.compose.per_image import composite, per_picture
from sfumato.compose.regions import Region, regions
from sfumato.compose.schedules import Ramp, Switch, over_steps
from sfumato.errors import AdapterError
from sfumato.files import read_header, write_tensors
from sfumato.files.read import read_tensors
from sfumato.generation.prompt_adapters import TaggedPrompts
from sfumato.precision.cpu_matmul import exact_matmul
from tests.compose.conftest import weights_sha
from tests.compose.test_per_picture import predict
from tests.compose.test_regions import U_NET
from tests.tiny import tiny_pipeline

WHOLE = (0, 0, 1, 1)


def drawn(pipe, prompt="a cat", steps=2, **options):
    """The latents of a picture, without guidance if none is given."""
    options = {"guidance_scale": 1.0, "generator": torch.Generator().manual_seed(0), "output_type": "latent"} | options
    return pipe(prompt, num_inference_steps=steps, **options).images


@pytest.fixture
def a(sd1, write):
    return Adapter(write("a", sd1, "to_q", "to_k", "to_v"), 0.8)


@pytest.mark.parametrize("way", ["baked", "live"])
def test_in_inference_mode_all_is_as_outside_and_is_undone_there(sd1, a, way):
    before = weights_sha(sd1)
    with compose(sd1, a, way=way) as mix:
        plain = predict(sd1, [0, 0])
        with adapter_guidance(mix, 2, guidance=5.0):
            wanted = predict(sd1, [0, 0])
    with torch.inference_mode():
        mix = compose(sd1, a, way=way)
        with adapter_guidance(mix, 2, guidance=5.0):
            assert_close(predict(sd1, [0, 0]), wanted)
    mix.set(a=0.4)
    mix.set(a=0.8)
    assert_close(predict(sd1, [0, 0]), plain)
    mix.undo()
    assert weights_sha(sd1) == before
    assert not any(module._forward_hooks for module in sd1.unet.modules())


def test_adapter_guidance_outlives_what_offloading_does_after_a_picture(sd1, a):
    """accelerate's hooks are taken away after each picture and set again."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    add_hook_to_module(sd1.unet, ModelHook())
    with compose(sd1, a) as mix:
        with adapter_guidance(mix, 2, guidance=5.0):
            first = predict(sd1, [0, 0])
            remove_hook_from_module(sd1.unet)
            add_hook_to_module(sd1.unet, ModelHook())
            assert torch.equal(predict(sd1, [0, 0]), first)
        assert not torch.equal(predict(sd1, [0, 0]), first)
    remove_hook_from_module(sd1.unet)
    assert sd1.unet.forward.__func__ is type(sd1.unet).forward


def test_a_mixed_model_can_be_copied_and_pickled(sd1, a):
    with compose(sd1, a):
        wanted = predict(sd1, [0])
        copied, pickled = copy.deepcopy(sd1), copy.copy(sd1)
        pickled.unet = pickle.loads(pickle.dumps(sd1.unet))
    assert torch.equal(predict(copied, [0]), wanted)
    assert torch.equal(predict(pickled, [0]), wanted)
    with compose(copied, a):  # it carries no mix
        pass


@pytest.mark.parametrize("way", ["baked", "live"])
def test_composing_on_a_copy_of_a_mixed_model_says_what_stays_in_it(sd1, a, way, capsys):
    with compose(sd1, a, way=way) as mix:
        copied = copy.deepcopy(sd1)
        mix.mute()
        silent = copy.deepcopy(sd1)
    capsys.readouterr()
    with compose(silent, a):
        pass
    assert "a copy" not in capsys.readouterr().err
    with compose(copied, a, way=way):
        assert current(copied) is not None
    assert "this pipeline is a copy of one that carried a mix (a 0.8), which stays in it" in capsys.readouterr().err


def test_a_copy_of_a_live_mix_is_not_saved_without_it_after_another_mix(sd1, a, tmp_path):
    with compose(sd1, a, way="live"):
        copied = copy.deepcopy(sd1)
    with compose(copied, a, way="live"):
        pass
    with pytest.raises(AdapterError, match="in a copy that was made meanwhile they are for good"):
        copied.unet.save_pretrained(tmp_path / "unet")
    sd1.unet.save_pretrained(tmp_path / "base")


def test_what_divides_a_call_is_not_nested(sd1, a):
    whole = Region((0, 0, 1, 1), a)
    with compose(sd1, a) as mix:
        for outer in (adapter_guidance(mix, 2, guidance=5.0), regions(sd1, whole)):
            with outer:
                for inner in (adapter_guidance(mix, 2, guidance=5.0), regions(sd1, whole)):
                    with pytest.raises(AdapterError, match="and once only"), inner:
                        pass
        with regions(sd1, whole):
            pass


def test_a_call_without_guidance_is_not_divided(sd1, a):
    sd1.do_classifier_free_guidance = False
    with regions(sd1, Region((0, 0, 1, 1), a)):
        with_region = predict(sd1, [0, 1])
    with compose(sd1, a) as mix:
        assert_close(with_region, predict(sd1, [0, 1]), atol=1e-5, rtol=1e-5)
        with adapter_guidance(mix, 2, guidance=5.0), pytest.raises(AdapterError, match="no two halves"):
            predict(sd1, [0, 1])
    with per_picture(sd1, [[a], []]), pytest.raises(AdapterError, match="draw one image of each"):
        predict(sd1, [0, 0, 1, 1])


@pytest.mark.parametrize("way", ["baked", "live"])
def test_pictures_with_adapters_of_their_own_beside_a_mix_are_the_same_at_every_step(sd1, a, write, way):
    """The text is one tensor at all steps, by which a live mix knows what it has answered before."""
    b = Adapter(write("b", sd1, "to_k", "to_v", seed=2), 0.8)
    text = torch.randn(2, 7, sd1.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(3))
    with compose(sd1, a, way=way), per_picture(sd1, [[b], []]), torch.no_grad():
        steps = [sd1.unet(torch.ones(2, 4, 16, 16), torch.tensor(500), text).sample for _ in range(3)]
    assert torch.equal(steps[1], steps[0])
    assert torch.equal(steps[2], steps[0])


def test_a_composite_under_adapter_guidance_is_the_mean_of_single_ones(sd1, a, write):
    b, c = (Adapter(write(name, sd1, "to_q", "to_v", seed=s), 0.8) for s, name in enumerate("bc", start=2))
    with compose(sd1, a) as mix, adapter_guidance(mix, 2, guidance=5.0):
        singles = []
        for one in (b, c):
            with composite(sd1, one):
                singles.append(predict(sd1, [0, 1]))
        with composite(sd1, b, c):
            assert_close(predict(sd1, [0, 1]), (singles[0] + singles[1]) / 2, atol=1e-5, rtol=1e-5)


def test_fused_projections_are_refused(sd1, a):
    sd1.unet.fuse_qkv_projections()
    with pytest.raises(AdapterError, match="unfuse_qkv_projections"):
        compose(sd1, a)


def test_a_text_encoder_that_two_pipelines_share_has_the_mix_of_one(sd1, write):
    other = SimpleNamespace(unet=copy.deepcopy(sd1.unet), text_encoder=sd1.text_encoder)
    of_unet, of_both = write("u", sd1, "to_q"), write("b", sd1, "to_q", "fc1")
    before = weights_sha(other)
    with compose(sd1, Adapter(of_unet)) as mix:
        assert current(sd1) is mix
        assert current(other) is None
        with compose(other, Adapter(of_both)):
            pass
    with compose(sd1, Adapter(of_both)):
        with pytest.raises(AdapterError, match="carries the mix of another pipeline"):
            compose(other, Adapter(of_both))
        assert current(other) is None
        with compose(other, Adapter(of_unet)):
            pass
    assert weights_sha(other) == before


@pytest.fixture
def pipe():
    return tiny_pipeline("sd1", shallow=True)


def test_rows_of_other_guidance_are_told_from_those_without_prompt(sd1, a):
    """Perturbed attention has rows without prompt, with it, and perturbed; InstructPix2Pix has those with it first."""
    text = torch.zeros(6, 7, sd1.unet.config.cross_attention_dim)
    sd1.do_classifier_free_guidance = sd1.do_perturbed_attention_guidance = True
    assert unconditional_rows(sd1, 6) == 2
    with compose(sd1, a) as mix, adapter_guidance(mix, 2, guidance=5.0), pytest.raises(AdapterError, match="6 rows"):
        sd1.unet(torch.zeros(6, 4, 8, 8), torch.tensor(1), text)
    sd1.do_classifier_free_guidance = False  # two rows with the prompt, of which the second is perturbed
    assert unconditional_rows(sd1, 2) == 0
    sd1.do_classifier_free_guidance, sd1.image_guidance_scale = True, 1.5
    with regions(sd1, Region(WHOLE, a)):
        sd1.unet(torch.zeros(6, 4, 8, 8), torch.tensor(1), text)
    with (
        compose(sd1, a) as mix,
        adapter_guidance(mix, 2, guidance=5.0),
        pytest.raises(AdapterError, match="by an image"),
    ):
        sd1.unet(torch.zeros(6, 4, 8, 8), torch.tensor(1), text)


def test_a_pipeline_that_shares_the_unet_says_itself_how_it_draws(pipe, write):
    """As `from_pipe` makes one; what the mixed one's last call said is not what this one draws by."""
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    once = {"num_inference_steps": 1, "output_type": "latent"}
    begun = {**once, "image": Image.new("RGB", (64, 64)), "strength": 1.0}
    with compose(pipe, Adapter(write("a", pipe, "to_q"))) as mix, adapter_guidance(mix, 2, guidance=3.0):
        with pytest.raises(AdapterError, match="draws with guidance 5"):
            pipe("a crab", guidance_scale=5.0, **once)
        other("a crab", guidance_scale=3.0, **begun)
        with pytest.raises(AdapterError, match="draws with guidance 1"):
            other(["a crab"] * 2, guidance_scale=1.0, **begun)
    pipe("a crab", guidance_scale=5.0, **once)
    with regions(pipe, Region((0, 0, 1, 1), prompt="an owl")):
        noise = [torch.Generator().manual_seed(1) for _ in range(2)]
        first, second = other(["a crab"] * 2, guidance_scale=1.0, generator=noise, **begun).images
    assert_close(first, second)


@pytest.mark.parametrize("way", ["baked", "live"])
def test_a_mix_stays_and_goes_beside_a_lora_of_diffusers(pipe, write, way):
    line, otter = write("line", pipe, "to_q", "to_k"), write("otter", pipe, "to_q", "to_v", seed=2)
    before = weights_sha(pipe)
    mix = compose(pipe, Adapter(line, 0.8), way=way)
    pipe.load_lora_weights(str(otter.parent), weight_name=otter.name, adapter_name="otter")
    assert current(pipe) is mix
    with pytest.raises(AdapterError, match="unload_lora_weights"):
        mix.add(Adapter(otter))
    both = drawn(pipe)
    mix.set(line=0.3).set(line=0.8)
    assert_close(drawn(pipe), both)
    mix.undo()
    alone = drawn(pipe)
    pipe.unload_lora_weights()
    assert weights_sha(pipe) == before
    with compose(pipe, Adapter(otter)):
        assert_close(drawn(pipe), alone, atol=1e-4, rtol=1e-4)
    with compose(pipe, Adapter(line, 0.8), Adapter(otter)):
        assert_close(drawn(pipe), both, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_what_writes_no_weights_stands_beside_a_lora_of_diffusers(pipe, write):
    """Regions, adapters by picture and adapter guidance; in every kind of layer."""
    line, otter = write("line", pipe, *U_NET), write("otter", pipe, *U_NET, seed=2)
    with compose(pipe, Adapter(line, 0.8), Adapter(otter)) as mix:
        wanted = drawn(pipe)
        with adapter_guidance(mix, {"line": 2.0}, guidance=3.0):
            guided = drawn(pipe, guidance_scale=3.0)
    with compose(pipe, Adapter(line, 0.8)) as mix:
        pipe.load_lora_weights(str(otter.parent), weight_name=otter.name, adapter_name="otter")
        with adapter_guidance(mix, {"line": 2.0}, guidance=3.0):
            assert_close(drawn(pipe, guidance_scale=3.0), guided, atol=1e-4, rtol=1e-4)
    for prompt in (None, "a cat"):
        with regions(pipe, Region(WHOLE, Adapter(line, 0.8), prompt=prompt)):
            assert_close(drawn(pipe), wanted, atol=1e-4, rtol=1e-4)
    with per_picture(pipe, [[Adapter(line, 0.8)]]):
        assert_close(drawn(pipe), wanted, atol=1e-4, rtol=1e-4)
    in_text = Adapter(write("text", pipe, "fc1", "to_q"))
    with (
        pytest.raises(AdapterError, match="unload_lora_weights"),
        regions(pipe, Region(WHOLE, in_text, prompt="a cat")),
    ):
        pass


@pytest.mark.parametrize("way", ["baked", "live"])
def test_weights_by_step_go_on_beside_a_lora_of_diffusers(pipe, write, way):
    line, otter = write("line", pipe, "to_q", "to_k"), write("otter", pipe, "to_q", "to_v", seed=2)
    by_step = {"line": Ramp((0, 1), (0.4, 1), (0.4, 0))}
    with compose(pipe, Adapter(line), Adapter(otter)) as mix, over_steps(mix, **by_step):
        wanted = drawn(pipe, steps=3)
    with compose(pipe, Adapter(line), way=way) as mix:
        pipe.load_lora_weights(str(otter.parent), weight_name=otter.name, adapter_name="otter")
        constant = drawn(pipe, steps=3)
        with over_steps(mix, **by_step):
            assert_close(drawn(pipe, steps=3), wanted, atol=1e-4, rtol=1e-4)
        assert_close(drawn(pipe, steps=3), constant)
    assert not torch.allclose(wanted, constant, atol=1e-2)


def test_a_mix_that_was_cast_to_fewer_bits_and_back_says_what_to_do(sd1, a):
    with compose(sd1, a) as mix:
        sd1.unet.half().float()
        with pytest.raises(AdapterError, match=r"cast to fewer bits and back\. mix\.undo\(\)"):
            mix.set(a=0.5)


@pytest.mark.parametrize("block", [lambda mix: over_steps(mix, a=Ramp((0, 1), (1, 0.2)), b=Ramp((0, 0.3))),
                                   lambda mix: over_steps(mix, Switch(("a", "b"), every=1)),
                                   lambda mix: adapter_guidance(mix, 2, guidance=5.0)])  # fmt: skip
def test_what_is_removed_within_a_block_stays_away_and_the_rest_comes_back(pipe, write, block):
    a, b = (Adapter(write(name, pipe, "to_q", "to_v", seed=s), 0.8) for s, name in enumerate("ab"))
    before, plain = weights_sha(pipe), drawn(pipe, guidance_scale=5.0)
    with compose(pipe, b):
        of_b = weights_sha(pipe)
    mix = compose(pipe, a, b)
    with block(mix):
        drawn(pipe, guidance_scale=5.0)
        mix.remove("a")
        drawn(pipe, guidance_scale=5.0)
    assert mix.weights == {"b": 0.8}
    assert weights_sha(pipe) == of_b
    with block(mix.add(a)):
        mix.undo()
        assert_close(drawn(pipe, guidance_scale=5.0), plain, atol=1e-4, rtol=1e-4)
    assert weights_sha(pipe) == before


def test_what_partial_leaves_out_is_counted_in_modules(sd1, a):
    tensors, header = dict(read_tensors(a.path)), read_header(a.path)
    half, other, *_ = (key.removesuffix(".lora_up.weight") for key in tensors if key.endswith(".lora_up.weight"))
    del tensors[f"{half}.lora_up.weight"]
    for role in ("lora_up.weight", "lora_down.weight", "alpha"):
        tensors[f"lora_unet_nowhere.{role}"] = tensors[f"{other}.{role}"]
    file = write_tensors(a.path.with_name("some.safetensors"), tensors, header.metadata)
    with compose(sd1, Adapter(file), partial=True) as mix:
        assert mix.skipped == {"some": 2}


def test_a_regions_prompt_is_read_with_the_calls_clip_skip():
    """SDXL, as diffusers 0.42 fails at the clip_skip of SD 1.x with the transformers of today."""
    pipe = tiny_pipeline("sdxl", shallow=True)
    plain, skipped = drawn(pipe, steps=1), drawn(pipe, steps=1, clip_skip=1)
    assert not torch.allclose(plain, skipped)
    with regions(pipe, Region(WHOLE, prompt="a cat")):
        assert_close(drawn(pipe, steps=1, clip_skip=1), skipped)
        assert_close(drawn(pipe, steps=1), plain)


def test_regions_of_an_offloaded_pipeline_are_those_of_another(pipe, write):
    from accelerate import cpu_offload

    one = Region((0, 0, 0.5, 1), Adapter(write("b", pipe, "to_q", "to_k", "conv1", "fc1")), prompt="a house")
    with regions(pipe, one):
        wanted = drawn(pipe)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        cpu_offload(part, execution_device=torch.device("cpu"))
    assert pipe.device.type == "meta"
    with regions(pipe, one):
        assert_close(drawn(pipe), wanted)


def ip_adapter(unet):
    """A random IP-Adapter as diffusers reads its file."""
    width, layers = unet.config.cross_attention_dim, {}
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            layers |= {f"{number}.to_{which}_ip.weight": torch.randn(out, width) for which in "kv"}
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    proj = {"proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.zeros(4 * width)}
    return {"image_proj": proj | norm, "ip_adapter": layers}


def test_regions_beside_an_ip_adapter_are_refused_and_leave_it_as_it_is(pipe):
    weights, picture = ip_adapter(pipe.unet), [torch.randn(1, 1, 8)]
    with regions(pipe, Region(WHOLE, prompt="a cat")):
        pipe.unet._load_ip_adapter_weights([weights])
        with pytest.raises(AdapterError, match="unload_ip_adapter"):
            drawn(pipe, ip_adapter_image_embeds=picture)
    drawn(pipe, ip_adapter_image_embeds=picture)
    with pytest.raises(AdapterError, match="unload_ip_adapter"), regions(pipe, Region(WHOLE, prompt="a cat")):
        pass
    pipe.unload_ip_adapter()
    with regions(pipe, Region(WHOLE, prompt="a cat")):
        drawn(pipe)


def calls_at_once(pipe, *prompts):
    """How many calls of the U-Net were under way together, of threads that draw with a scheduler and a tokenizer each:
    between two calls of one tokenizer another thread may change how it pads."""
    under_way, most = [], []

    def within(*_):
        under_way.append(0)
        most.append(len(under_way))
        time.sleep(0.05)  # for another to come
        under_way.pop()

    def draw(prompt):
        own = copy.copy(pipe)
        own.scheduler, own.tokenizer = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.tokenizer)
        return drawn(own, prompt, guidance_scale=5.0)

    handle = pipe.unet.mid_block.register_forward_hook(within)
    with ThreadPoolExecutor(len(prompts)) as threads:
        list(threads.map(draw, prompts))
    handle.remove()
    return max(most)


def stop(error):
    def hook(*_):
        raise error

    return hook


@pytest.mark.parametrize("block", [lambda mix: over_steps(mix, a=Ramp((0, 1), (1, 0.2))),
                                   lambda mix: adapter_guidance(mix, 2, guidance=5.0),
                                   lambda mix: regions(mix.pipe, Region(WHOLE, prompt="an owl"))])  # fmt: skip
def test_threads_wait_where_something_changes_from_call_to_call(pipe, write, block):
    a = Adapter(write("a", pipe, "to_q", "to_v"), 0.8)
    with compose(pipe, a) as mix:
        with block(mix):
            stopped = pipe.unet.mid_block.register_forward_hook(stop(ZeroDivisionError))
            with pytest.raises(ZeroDivisionError):
                drawn(pipe, guidance_scale=5.0)
            stopped.remove()
            assert calls_at_once(pipe, "a cat", "a dog") == 1
        pipe.unet.mid_block.register_forward_hook(stop(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), block(mix):
            drawn(pipe, guidance_scale=5.0)
        with ThreadPoolExecutor(1) as other:
            assert other.submit(unet_lock(pipe).acquire, blocking=False).result()


def test_threads_whose_prompts_name_adapters_wait_for_one_another(pipe, write):
    folder = write("a", pipe, "to_q", "to_v").parent
    pipe.__class__ = type("Tagged", (TaggedPrompts, type(pipe)), {"lora_folder": folder})
    assert calls_at_once(pipe, "a cat <lora:a:0.8>", "a dog") == 1


def test_threads_that_compose_at_once_leave_one_mix_and_the_bases_bytes(sd1, a):
    """Of several threads one has its mix, and the others are told of it."""
    before = weights_sha(sd1)

    def work(start):
        start.wait()
        try:
            return compose(sd1, a)
        except AdapterError as error:
            return str(error)

    for _ in range(3):
        start = threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, [start] * 4))
        (mix,) = [each for each in found if not isinstance(each, str)]
        assert sum("carries a mix already" in each for each in found if isinstance(each, str)) == 3
        mix.undo()
        assert weights_sha(sd1) == before


def test_an_undone_mix_lets_go_of_its_pipeline(sd1, a):
    pipe = copy.deepcopy(sd1)
    with compose(pipe, a) as mix:
        assert mix.pipe is pipe
    unet = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert unet() is None
    assert (mix.pipe, mix.family, repr(mix)) == (None, "sd1", "Mix(undone)")
    assert mix.show()


def test_a_mix_whose_pipeline_has_another_unet_says_so(sd1, a):
    pipe = copy.deepcopy(sd1)
    before = weights_sha(pipe)
    mix = compose(pipe, a)
    first, pipe.unet = pipe.unet, copy.deepcopy(sd1.unet)
    with pytest.raises(AdapterError, match="the pipeline has another unet than the one that this mix is in"):
        mix.set(a=0.1)
    with pytest.raises(AdapterError, match="has another unet"), adapter_guidance(mix, 2.0, guidance=5.0):
        pass
    mix.undo()
    pipe.unet = first
    assert weights_sha(pipe) == before


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 21.0])
def test_a_strength_that_cannot_be_meant_is_refused(strength, sd1, a):
    with compose(sd1, a) as mix:
        with pytest.raises(AdapterError, match="wanted a number of at most 20"):
            adapter_guidance(mix, strength, guidance=5.0).__enter__()
        with pytest.raises(AdapterError, match="guidance nan: wanted the number"):
            adapter_guidance(mix, 2.0, guidance=float("nan")).__enter__()


def test_products_are_exact_while_any_thread_needs_it_and_then_as_before():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        first, second = exact_matmul(), exact_matmul()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_module_and_its_function_are_one_name():
    import sfumato

    import sfumato.compose.per_image as by_picture  # isort: skip

    assert sfumato.compose.current is current
    assert by_picture.per_picture is per_picture
    assert callable(sfumato.compose)
