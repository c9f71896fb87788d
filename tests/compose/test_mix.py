"""The laws of mixing: exact, changeable, and gone without a trace."""

import inspect
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import sfumato
from sfumato.compose import Adapter, compose, current
from sfumato.errors import AdapterError, FileError
from tests.compose.conftest import fresh, layers, weights_sha

QUERY = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")


def query(pipe):
    return pipe.unet.get_submodule(QUERY[1]).weight


def test_weight_0_changes_not_a_bit(sd1, write):
    before = weights_sha(sd1)
    compose(sd1, Adapter(write("a", sd1), 0.0))
    assert weights_sha(sd1) == before


def test_the_sum_is_the_base_plus_each_weighted_delta(sd1, write):
    base = query(sd1).clone()
    a, b = write("a", sd1, seed=1), write("b", sd1, seed=2, rank=5, alpha=1.0)
    deltas = {}
    for path in (a, b):
        with compose(sd1, Adapter(path, 1.0)):
            deltas[path] = query(sd1) - base
    compose(sd1, Adapter(a, 0.8), Adapter(b, -0.5))
    assert_close(query(sd1).detach(), base + 0.8 * deltas[a] - 0.5 * deltas[b], atol=1e-6, rtol=1e-5)


def test_half_of_each_is_the_mean(sd1, write):
    a, b = write("a", sd1, seed=1), write("b", sd1, seed=2)
    alone = []
    for path in (a, b):
        with compose(sd1, Adapter(path)):
            touched = layers(sd1, "to_k", "conv1")
            alone.append({target: layer.weight.detach().clone() for target, layer in touched.items()})
    compose(sd1, Adapter(a, 0.5), Adapter(b, 0.5))
    for target, layer in layers(sd1, "to_k", "conv1").items():
        assert_close(layer.weight.detach(), (alone[0][target] + alone[1][target]) / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_undo_restores_the_base_to_the_byte(sd1, write, dtype):
    for part in (sd1.unet, sd1.text_encoder):
        part.to(dtype)
    before = weights_sha(sd1)
    mix = compose(sd1, Adapter(write("a", sd1), 0.8), Adapter(write("b", sd1, "to_q", seed=2), 0.6))
    assert weights_sha(sd1) != before
    for weight in (0.3, -1.0, 0.0, 2.0):
        mix.set(a=weight)
    mix.undo()
    assert weights_sha(sd1) == before


def test_leaving_the_block_undoes_the_mix_even_by_an_error(sd1, write):
    before = weights_sha(sd1)
    path = write("a", sd1)
    with pytest.raises(ZeroDivisionError), compose(sd1, Adapter(path)):
        raise ZeroDivisionError
    assert weights_sha(sd1) == before
    assert current(sd1) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_weights_give_the_same_bytes_by_any_way(originals, write, dtype):
    one, other = fresh(originals["sd1"]), fresh(originals["sd1"])
    for pipe in (one, other):
        pipe.unet.to(dtype)
        pipe.text_encoder.to(dtype)
    a, b, c = (write(name, one, seed=seed) for seed, name in enumerate("abc"))
    compose(one, Adapter(a, 0.8), Adapter(b, 0.6))
    mix = compose(other, Adapter(c, 1.0), Adapter(b, 0.1))
    mix.add(Adapter(a, 0.3)).set(b=0.6).set(a=0.8).set(a=0.8).remove("c")
    assert weights_sha(one) == weights_sha(other)


def test_order_does_not_matter(originals, write):
    one, other = fresh(originals["sd1"]), fresh(originals["sd1"])
    a, b = write("a", one, seed=1), write("b", one, seed=2)
    compose(one, Adapter(a, 0.8), Adapter(b, 0.6))
    compose(other, Adapter(b, 0.6, name="1"), Adapter(a, 0.8, name="2"))  # stacked the other way round
    for target, layer in layers(one, "to_k").items():
        assert_close(layer.weight, layers(other, "to_k")[target].weight, atol=1e-6, rtol=1e-5)


def test_the_same_file_under_two_labels_counts_twice(originals, write):
    one, other = fresh(originals["sd1"]), fresh(originals["sd1"])
    a = write("a", one)
    compose(one, Adapter(a, 0.25, name="first"), Adapter(a, 0.25, name="second"))
    compose(other, Adapter(a, 0.5))
    assert_close(query(one), query(other))


def test_two_weights_are_for_the_unet_and_the_text_encoders(originals, write):
    one, other = fresh(originals["sd1"]), fresh(originals["sd1"])
    a = write("a", one)
    before = weights_sha(fresh(originals["sd1"]))
    mix = compose(one, Adapter(a, (0.0, 0.5)))
    compose(other, Adapter(a, 0.5))
    assert torch.equal(query(one), query(fresh(originals["sd1"])))
    for target, layer in layers(other, "q_proj").items():
        assert torch.equal(layers(one, "q_proj")[target].weight, layer.weight)
    mix.set(a=(0.0, 0.0))
    assert weights_sha(one) == before


def test_only_modules_whose_sum_changes_are_written(sd1, write):
    mix = compose(sd1, Adapter(write("q", sd1, "attn1.to_q"), 0.5), Adapter(write("k", sd1, "attn1.to_k"), 0.5))
    key = sd1.unet.get_submodule(QUERY[1].replace("to_q", "to_k")).weight
    versions = query(sd1)._version, key._version
    mix.set(q=0.6, k=0.5)
    assert query(sd1)._version > versions[0]
    assert key._version == versions[1]


def test_labels_may_hold_any_characters(sd1, write):
    label = "self: \u00e9 <lora=1>\n"
    mix = compose(sd1, Adapter(write("a", sd1), 0.5, name=label))
    mix.set_weights({label: 0.25})
    mix.add(Adapter(write("b", sd1, seed=2), name="self")).set(self=0.75)
    assert mix.weights == {label: 0.25, "self": 0.75}


def test_an_adapter_goes_where_the_other_stays(originals, write):
    one, other = fresh(originals["sd1"]), fresh(originals["sd1"])
    a, b = write("a", one, "to_q", "to_k"), write("b", one, "to_k", "to_v", seed=2)
    compose(one, Adapter(a, 0.7), Adapter(b, 0.4)).remove("b")
    compose(other, Adapter(a, 0.7))
    assert weights_sha(one) == weights_sha(other)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_pipeline_predicts_what_diffusers_predicts(originals, write, family):
    """load_lora_weights + set_adapters of the same two files, U-Net and text encoders, in fp32."""
    pipe = originals[family]
    # Not "a" and "b": diffusers 0.42 loads nothing under the name "a", as it cuts ".a" out of ".attentions".
    paths = {name: write(name, pipe, seed=seed, family=family) for seed, name in enumerate(("line", "otter"))}
    with compose(pipe, Adapter(paths["line"], 0.8), Adapter(paths["otter"], 0.6)):
        ours = predictions(pipe)
    for name, path in paths.items():
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    pipe.set_adapters(["line", "otter"], [0.8, 0.6])
    try:
        theirs = predictions(pipe)
        with pytest.raises(AdapterError, match="unload_lora_weights"):
            compose(pipe, Adapter(paths["line"]))
    finally:
        pipe.unload_lora_weights()
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def predictions(pipe):
    """The U-Net's first output in drawing a picture of a prompt, which goes through the text encoders."""
    seen = []
    hook = pipe.unet.register_forward_hook(lambda unet, arguments, output: seen.append(output[0]))
    generator = torch.Generator().manual_seed(0)
    pipe("a cat", num_inference_steps=1, guidance_scale=3.0, generator=generator, output_type="latent")
    hook.remove()
    return seen[0]


def test_moving_the_unet_to_another_dtype_keeps_the_mix_and_the_way_back(sd1, write):
    base = query(sd1).detach().clone()
    mix = compose(sd1, Adapter(write("a", sd1), 0.8))
    merged = query(sd1).detach().clone()
    sd1.unet.to(torch.bfloat16)
    mix.set(a=0.3).set(a=0.8)
    assert torch.equal(query(sd1), merged.bfloat16())
    mix.undo()
    assert torch.equal(query(sd1), base.bfloat16())


def test_channels_last_weights_are_mixed_and_restored(originals, write):
    one, other = fresh(originals["sd1"]), fresh(originals["sd1"])
    one.unet.to(memory_format=torch.channels_last)
    before = weights_sha(one)
    a = write("a", one)
    mix = compose(one, Adapter(a, 0.8))
    compose(other, Adapter(a, 0.8))
    assert weights_sha(one) == weights_sha(other)
    mix.undo()
    assert weights_sha(one) == before


@pytest.mark.gpu
def test_on_a_gpu_with_tf32_the_mix_is_that_of_the_cpu_and_undo_is_exact(originals, write):
    here, there = fresh(originals["sd1"]), fresh(originals["sd1"])
    path = write("a", here)
    before = weights_sha(here)
    there.unet.cuda()
    there.text_encoder.cuda()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        mix = compose(there, Adapter(path, 0.3)).set(a=0.8)
        compose(here, Adapter(path, 0.8))
        assert_close(query(there).cpu(), query(here), atol=1e-6, rtol=1e-6)
        assert torch.backends.cuda.matmul.allow_tf32
        mix.undo()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    there.unet.cpu()
    there.text_encoder.cpu()
    assert weights_sha(there) == before


@pytest.mark.slow
def test_sfumato_compose_can_be_called_whatever_was_imported():
    code = "from sfumato.compose import Mix; import sfumato; print(callable(sfumato.compose), callable(sfumato.Mix))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True True\n"
    assert callable(sfumato.compose)


def test_an_editor_shows_the_options_of_the_module_that_can_be_called():
    def options(called):
        return [(each.name, each.kind, each.default) for each in inspect.signature(called).parameters.values()]

    assert options(sfumato.compose) == options(sfumato.compose.compose)


def test_mixing_imports_neither_diffusers_nor_peft_nor_accelerate(tmp_path: Path):
    """In a process of its own: everything but the pipeline, which here is a plain torch module; and few modules beside
    torch's, so that importing takes at most 1.15 times as long, which the bench measures."""
    code = """
import sys, torch
from types import SimpleNamespace
before = len(sys.modules)
from sfumato.compose import Adapter, compose
print(len(sys.modules) - before)
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
block = torch.nn.Module()
block.to_q = torch.nn.Linear(4, 4)
unet = torch.nn.Module()
unet.add_module("mid_block", torch.nn.Module())
path = "mid_block.attentions.0.transformer_blocks.0.attn1"
parent = unet.mid_block
for name in path.split(".")[1:]:
    child = torch.nn.Module()
    parent.add_module(name, child)
    parent = child
parent.to_q = torch.nn.Linear(4, 4)
from pathlib import Path
change = LoraModule(torch.randn(2, 4), torch.randn(4, 2), 2.0)
file = write_lora(Path(sys.argv[1]) / "a.safetensors", {("unet", path + ".to_q"): change}, family="sd1")
mix = compose(SimpleNamespace(unet=unet), Adapter(file, 0.5))
mix.set(a=0.25).undo()
print(sorted({"diffusers", "transformers", "peft", "accelerate"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    count, heavy = result.stdout.splitlines()
    assert int(count) < 150
    assert (heavy, result.stderr.count("\n")) == ("[]", 1)
    assert "baked in place" in result.stderr


# Refusals: each is one line and leaves every byte of the pipeline as it was.


def test_half_applied_is_not_applied(sd1, write, monkeypatch):
    """A failure at the fifth weight takes back the first four."""
    from sfumato.compose.layers import fused

    before = weights_sha(sd1)
    real, calls = fused.write_sum, []

    def fails_late(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return real(*arguments, **options)

    a, b = write("a", sd1, seed=1), write("b", sd1, seed=2)
    monkeypatch.setattr(fused, "write_sum", fails_late)
    with pytest.raises(MemoryError):
        compose(sd1, Adapter(a, 0.8))
    assert weights_sha(sd1) == before
    assert current(sd1) is None
    calls.extend([1] * 5)
    mix = compose(sd1, Adapter(a, 0.8))
    mixed = weights_sha(sd1)
    fails = (lambda: mix.set(a=0.5), lambda: mix.add(Adapter(b, 0.5)), lambda: mix.add(Adapter(b), Adapter("none")))
    for call in fails:
        calls.clear()
        with pytest.raises((MemoryError, FileError)):
            call()
        assert weights_sha(sd1) == mixed
        assert mix.weights == {"a": 0.8}
    mix.undo()
    assert weights_sha(sd1) == before


def refused(call, *words):
    with pytest.raises(AdapterError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


NO_WEIGHTS = [float("nan"), float("inf"), 10.5, -11, "0.8", None, True, (1.0, 2.0, 3.0), (0.5, "1")]


@pytest.mark.parametrize("weight", NO_WEIGHTS)
def test_a_weight_that_cannot_be_meant_is_refused(sd1, write, weight):
    refused(lambda: Adapter("line.safetensors", weight), "line")
    before = weights_sha(sd1)
    mix = compose(sd1, Adapter(write("a", sd1), 0.5))
    mixed = weights_sha(sd1)
    refused(lambda: mix.set(a=weight), "a: ")
    assert weights_sha(sd1) == mixed != before


def test_a_label_is_written_as_a_keyboard_does_whatever_finder_made_of_the_files_name():
    assert Adapter(unicodedata.normalize("NFD", "dossier/été.safetensors")).label == "été"


def test_one_label_twice_is_refused(sd1, write):
    a = write("a", sd1)
    before = weights_sha(sd1)
    refused(lambda: compose(sd1, Adapter(a), Adapter(a)), "'a'", "name=")
    assert weights_sha(sd1) == before


def test_a_label_that_is_not_there_is_refused(sd1, write):
    mix = compose(sd1, Adapter(write("a", sd1)))
    refused(lambda: mix.set(b=0.5), "'b'", "'a'")
    refused(lambda: mix.remove("b"), "'b'", "'a'")


def test_a_second_mix_is_refused_and_the_first_can_be_found(sd1, write):
    a = write("a", sd1)
    mix = compose(sd1, Adapter(a, 0.8))
    mixed = weights_sha(sd1)
    refused(lambda: compose(sd1, Adapter(a, 0.8, name="again")), "a 0.8", "current(pipe)")
    assert weights_sha(sd1) == mixed
    assert current(sd1) is mix


def test_a_mix_that_was_undone_does_nothing_more(sd1, write):
    mix = compose(sd1, Adapter(write("a", sd1)))
    mix.undo()
    mix.undo()
    refused(lambda: mix.set(a=0.5), "undone")


def test_an_adapter_of_another_family_says_so(sd1, sdxl, write):
    path = write("xl", sdxl, "to_q", "to_k", family="sdxl")
    before = weights_sha(sd1)
    refused(lambda: compose(sd1, Adapter(path)), "xl.safetensors", "text width 192", "SD 1.x (64)")
    assert weights_sha(sd1) == before


def test_modules_that_are_not_there_are_counted_and_partial_accepts(sd1, write):
    path = write("both", sd1, "to_q", "q_proj")
    sd1.text_encoder = None
    before = weights_sha(sd1)
    text, total = 2, 2 + len(layers(sd1, "to_q"))
    refused(lambda: compose(sd1, Adapter(path)), f"{text} of {total} modules change the text_encoder", "--partial")
    assert weights_sha(sd1) == before
    mix = compose(sd1, Adapter(path), partial=True)
    assert mix.skipped == {"both": text}
    assert weights_sha(sd1) != before


def test_partial_of_nothing_is_refused(sd1, write):
    path = write("text", sd1, "q_proj")
    sd1.text_encoder = None
    refused(lambda: compose(sd1, Adapter(path), partial=True), "2 of 2 modules")


def test_a_muted_adapter_that_is_removed_and_added_again_is_heard(sd1, write):
    path = write("a", sd1, "to_q")
    with compose(sd1, Adapter(path)):
        wanted = weights_sha(sd1)
    mix = compose(sd1, Adapter(path)).mute("a").remove("a")
    assert not mix.muted
    mix.add(Adapter(path))
    assert weights_sha(sd1) == wanted


def test_a_mix_is_saved_after_an_adapter_was_refused(sd1, write, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    sd1.unet.half()
    a, loud = write("a", sd1, "to_q"), write("loud", sd1, "to_q", alpha=1e7)
    mix = compose(sd1, Adapter(a))
    before = mix.save(a.with_name("before.safetensors"), title="x").read_bytes()
    with pytest.raises(AdapterError, match="overflow"):
        mix.add(Adapter(loud))
    assert mix.save(a.with_name("after.safetensors"), title="x").read_bytes() == before


def test_an_overflow_is_refused_before_it_is_seen(sd1, write):
    for part in (sd1.unet, sd1.text_encoder):
        part.to(torch.float16)
    before = weights_sha(sd1)
    path = write("loud", sd1, "to_q", alpha=1e7)
    refused(lambda: compose(sd1, Adapter(path)), "overflow float16", "loud=1")
    assert weights_sha(sd1) == before


def test_weights_changed_by_something_else_are_noticed(sd1, write):
    before = weights_sha(sd1)
    mix = compose(sd1, Adapter(write("a", sd1)))
    with torch.no_grad():
        query(sd1).add_(1.0)
    refused(lambda: mix.set(a=0.5), QUERY[1], "undo()")
    mix.undo()
    assert weights_sha(sd1) == before


def test_what_is_no_pipeline_is_refused():
    refused(lambda: compose(object()), "object")


def test_quantised_weights_are_refused_by_name(sd1, write):
    path = write("a", sd1, "attn1.to_q")
    sd1.unet.get_submodule(QUERY[1]).weight = torch.nn.Parameter(query(sd1).to(torch.int8), requires_grad=False)
    refused(lambda: compose(sd1, Adapter(path), way="baked"), QUERY[1], "quantised", "way='live'")


def test_a_file_that_is_not_there_is_refused(sd1):
    before = weights_sha(sd1)
    with pytest.raises(FileError, match=r"gone\.safetensors"):
        compose(sd1, Adapter("gone.safetensors"))
    assert weights_sha(sd1) == before


def test_a_weight_of_which_half_was_written_over_is_noticed(sd1, write):
    mix = compose(sd1, Adapter(write("a", sd1, "attn1.to_q")))
    weight = sd1.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").weight
    weight.data[32:] += 1
    with pytest.raises(AdapterError, match="not what was mixed"):
        mix.set(a=0.5)
