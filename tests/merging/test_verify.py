"""`sfumato verify` of full differences: weights, norms and biases, with a base and without one; and of new words."""

import pytest
import torch
from safetensors.torch import load_file
from sfumato.pipelines import convert, verify
from torch.testing import assert_close

from sfumato.adapters import Kind, attach
from sfumato.cli import guarded
from sfumato.errors import AdapterError, FileError
from sfumato.files import fingerprint, read_adapter
from sfumato.files.fingerprint import FINGERPRINT_KEY
from sfumato.files.header import read_header
from sfumato.files.kinds import LoraModule
from sfumato.files.kinds.ia3 import Ia3
from sfumato.files.save import write_tensors
from sfumato.files.writing.kohya import write_difference, write_lora
from sfumato.merging.bake import bake
from sfumato.merging.extract import Deltas
from sfumato.merging.factors import Budget
from sfumato.merging.merge import MergeSource, merge
from sfumato.merging.methods import MethodSettings
from sfumato.merging.model_weights import stored_base

LINEAR = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
OUT = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0")
CONVOLUTION = ("unet", "mid_block.resnets.0.conv1")
NORM = ("unet", "mid_block.resnets.0.norm1")


def run(*words):
    return guarded(verify.main, [str(word) for word in words])


@pytest.fixture
def deltas(tiny_base):
    parts, draws = tiny_base("pocket").parts(), torch.Generator().manual_seed(0)
    layers = {target: parts["unet"].get_submodule(target[1]) for target in (LINEAR, CONVOLUTION, NORM)}
    return {
        target: tuple(
            None if value is None else torch.randn(value.shape, generator=draws) for value in (layer.weight, layer.bias)
        )
        for target, layer in layers.items()
    }


@pytest.mark.parametrize("with_base", [False, True])
def test_a_full_difference_is_what_its_fingerprint_says(with_base, deltas, tiny_base, tmp_path, capsys):
    file = write_difference(tmp_path / "a.safetensors", deltas, family="pocket")
    base = ("--base", tiny_base("pocket").folder) if with_base else ()
    assert run(file, *base) == 0
    assert "the same against its own fingerprint" in capsys.readouterr().out
    named = file.rename(tmp_path / "\x1b[2J.safetensors")
    assert run(named, *base) == 0
    assert "\x1b" not in capsys.readouterr().out
    file = named.rename(file)
    other = write_difference(tmp_path / "b.safetensors", deltas | {LINEAR: (-deltas[LINEAR][0], None)}, family="pocket")
    stated = {FINGERPRINT_KEY: read_header(file).metadata[FINGERPRINT_KEY]}
    assert run(write_tensors(tmp_path / "c.safetensors", load_file(other), stated), *base) == 1


def test_a_bias_alone_is_written_alone_and_is_the_same(deltas, tiny_base, tmp_path):
    alone = {target: (None, bias) for target, (_, bias) in deltas.items() if bias is not None}
    a = write_difference(tmp_path / "a.safetensors", alone, family="pocket")
    base, out = ("--base", tiny_base("pocket").folder), tmp_path / "out.safetensors"
    words = ["--bake", "diff", *base, "-o", out]
    assert guarded(convert.main, [str(word) for word in (a, *words)]) == 0
    assert load_file(out).keys() == load_file(a).keys()
    assert run(out, "--against", a, *base) == 0


def test_factors_of_outputs_are_compared_with_the_biases_that_they_change(tiny_base, tmp_path):
    """peft's IA3 multiplies a bias, too; a layer without one has nothing to multiply."""
    base = stored_base(tiny_base("pocket").folder)
    width = base.weight(LINEAR).shape[0]
    changes = {target: Ia3(torch.linspace(-0.5, 0.5, width), False, scales_bias=True) for target in (LINEAR, OUT)}
    source = MergeSource("a", changes)
    deltas = Deltas(source, base)
    assert deltas[LINEAR][1] is None
    assert_close(deltas[OUT][1], base.weight(OUT, "bias") * changes[OUT].gain)
    low = merge([MergeSource("a", {LINEAR: changes[LINEAR]})], budget=Budget(rank=width), base=base.weight)
    assert_close(low.modules[LINEAR].delta(), deltas[LINEAR][0], atol=1e-5, rtol=1e-4)
    with pytest.raises(AdapterError, match=r"to_out\.0 changes a bias, which a LoRA cannot"):
        merge([MergeSource("a", {OUT: changes[OUT]})], budget=Budget(rank=4), base=base.weight)
    settings = {"method": "linear", "settings": MethodSettings(), "seed": 0}
    baked = stored_base(bake(base, [source], tmp_path / "baked", {}, **settings))
    for target in (LINEAR, OUT):
        assert_close(baked.weight(target), base.weight(target) + deltas[target][0])


def test_keys_that_were_left_out_are_told_and_are_no_sameness(tiny_base, adapter_file, tmp_path, capsys):
    tensors = load_file(adapter_file("a"))
    lost = sorted(name for name in tensors if name.endswith("lora_up.weight"))[:3]
    broken, out = tmp_path / "broken.safetensors", tmp_path / "out.safetensors"
    write_tensors(broken, {name: tensor for name, tensor in tensors.items() if name not in lost})
    words = (broken, "--partial", "--family", "pocket", "-o", out)
    assert guarded(convert.main, [str(word) for word in words]) == 0
    assert "broken: 6 keys left out (--partial), first lora_" in capsys.readouterr().err
    assert run(out, "--against", broken) == 1
    assert "6 keys there cannot be read, first lora_" in capsys.readouterr().err


@pytest.mark.parametrize("which", [0, 1], ids=["weight", "bias"])
@pytest.mark.parametrize("target", [LINEAR, CONVOLUTION, NORM], ids=["linear", "convolution", "norm"])
def test_against_another_every_change_counts(target, which, deltas, tmp_path, capsys):
    a = write_difference(tmp_path / "a.safetensors", deltas, family="pocket")
    same = write_difference(tmp_path / "b.safetensors", deltas, family="pocket", dtype=torch.bfloat16)
    assert run(same, "--against", a) == 0
    pair = list(deltas[target])
    pair[which] = torch.ones(len(pair[0])) if pair[which] is None else -pair[which]
    other = write_difference(tmp_path / "c.safetensors", deltas | {target: tuple(pair)}, family="pocket")
    assert run(other, "--against", a) == 1
    assert "differs against a.safetensors" in capsys.readouterr().err


WORDS = {"<x>": {"text_encoder": torch.arange(6.0).view(2, 3)}}
OTHERS = {
    "missing": ({}, "the word <x> of a.safetensors is missing"),
    "new": (WORDS | {"<y>": WORDS["<x>"]}, "its word <y> is not in a.safetensors"),
    "fewer": ({"<x>": {"text_encoder": torch.ones(1, 3)}}, "1 of width 3, there it has 2 of width 3"),
    "another": ({"<x>": {"text_encoder": torch.arange(6.0).view(2, 3) * 1.5}}, "<x> has a relative error of 0.5"),
}


def with_words(path, words, dtype=torch.float32):
    module = LoraModule(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    return write_lora(path, {LINEAR: module}, family="pocket", words=words, dtype=dtype)


def test_against_another_with_the_same_words_in_half_precision_it_is_the_same(tmp_path, capsys):
    a = with_words(tmp_path / "a.safetensors", WORDS)
    assert run(with_words(tmp_path / "b.safetensors", WORDS, torch.bfloat16), "--against", a) == 0
    assert "the new words <x> are alike" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), OTHERS.values(), ids=OTHERS)
def test_against_another_the_words_count(words, said, tmp_path, capsys):
    a = with_words(tmp_path / "a.safetensors", WORDS)
    assert run(with_words(tmp_path / "b.safetensors", words), "--against", a) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("b.safetensors: differs against a.safetensors: ")
    assert said in error


def test_a_word_counts_in_the_text_encoder_in_which_it_differs_most(tmp_path, capsys):
    def word(second):
        return {"<x>": {"text_encoder": torch.ones(2, 3), "text_encoder_2": torch.full((2, 3), second)}}

    a, b = (with_words(tmp_path / f"{name}.safetensors", word(second)) for name, second in (("a", 1.0), ("b", 1.5)))
    assert run(b, "--against", a) == 1
    assert "its word <x> has a relative error of 0.5" in capsys.readouterr().err


def test_a_small_difference_in_fp16_is_what_its_fingerprint_says(deltas, tmp_path, capsys):
    """Of what is written: fp16 has few digits of so small a change."""
    small = {target: tuple(each if each is None else each * 2e-7 for each in pair) for target, pair in deltas.items()}
    assert run(write_difference(tmp_path / "a.safetensors", small, family="pocket", dtype=torch.float16)) == 0
    assert "the same against its own fingerprint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("algo", "factor"), [("lora", None), ("loha", None), ("lokr", 4)], ids=["lora", "loha", "lokr"]
)
def test_a_trained_adapter_of_every_kind_is_what_its_fingerprint_says_with_and_without_a_base(
    algo, factor, tiny_base, tmp_path, capsys
):
    made = tiny_base("pocket")
    layers = {"unet": {name: made.parts()["unet"].get_submodule(name) for _, name in (LINEAR, CONVOLUTION)}}
    adapter = attach(layers, rank=2, alpha=2.0, kind=Kind(algo, factor=factor))
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    file = adapter.write(tmp_path / "a.safetensors", family="pocket")
    adapter.detach()
    for base in ((), ("--base", made.folder)):
        assert run(file, *base) == 0
        assert "the same against its own fingerprint" in capsys.readouterr().out
    changes = read_adapter(file).changes
    fingerprint.verify(read_header(file).metadata, changes, "a")
    with pytest.raises(FileError, match="not the same ones"):
        fingerprint.verify(read_header(file).metadata, dict([*changes.items()][1:]), "a")
