"""`sfumato merge`: adapters into one file, and into a base."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from sfumato.pipelines.merge import main
from torch.testing import assert_close

from sfumato.cli import guarded
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import read_adapter, read_lora
from sfumato.files.header import read_header
from sfumato.files.kinds.ia3 import Ia3
from sfumato.files.metadata import data_sha256
from sfumato.files.save import write_tensors
from sfumato.generation.arguments.adapters import parse_adapters
from sfumato.merging.bake import bake
from sfumato.merging.extract import Deltas
from sfumato.merging.factors import Budget
from sfumato.merging.merge import MergeSource, merge
from sfumato.merging.methods import MethodSettings
from sfumato.merging.model_weights import stored_base
from tests.bundles import add_words
from tests.merging.conftest import random_modules
from tests.tiny import CPU


def deltas(path):
    return {target: module.delta() for target, module in read_lora(path).modules.items()}


def run(*words):
    return guarded(main, [str(word) for word in words])


def test_the_default_is_the_exact_weighted_sum(adapter_file, tmp_path):
    a, b = adapter_file("a", seed=1), adapter_file("b", seed=2, rank=3)
    assert run(f"{a}:0.8", f"{b}:0.6", "-o", tmp_path / "mix.safetensors") == 0
    found, first, second = (deltas(path) for path in (tmp_path / "mix.safetensors", a, b))
    assert found.keys() == first.keys()
    for target, delta in found.items():
        assert_close(delta, 0.8 * first[target] + 0.6 * second[target], rtol=1e-6, atol=1e-7)
    assert {module.rank for module in read_lora(tmp_path / "mix.safetensors").modules.values()} == {5}


def test_unet_and_text_encoders_have_weights_of_their_own(adapter_file, tmp_path):
    a = adapter_file("a")
    assert run(f"{a}:0.5:0.25", "-o", tmp_path / "mix.safetensors") == 0
    found, first = deltas(tmp_path / "mix.safetensors"), deltas(a)
    for target, delta in found.items():
        assert_close(delta, (0.5 if target[0] == "unet" else 0.25) * first[target])


def test_weight_0_is_the_other_file(adapter_file, tmp_path):
    a, b = adapter_file("a", seed=1), adapter_file("b", seed=2)
    other = deltas(b)
    for method in ("linear", "ties", "np-lora"):
        for files in ((f"{a}:0", f"{b}:1"), (f"{b}:1", f"{a}:0"), (f"{b}:1",)):
            out = tmp_path / f"{method}.safetensors"
            whole = ("--density", 1) if method == "ties" else ()
            assert run(*files, "-o", out, "--method", method, *whole, "--overwrite") == 0
            for target, delta in deltas(out).items():
                assert_close(delta, other[target], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method", ["linear", "ties", "dare", "dare-ties", "magnitude", "knots", "core-space", "np-lora"]
)
def test_every_method_writes_a_file_of_the_asked_rank_and_the_same_one_twice(method, adapter_file, tmp_path):
    a, b = adapter_file("a", seed=1), adapter_file("b", seed=2)
    files = [tmp_path / f"{number}" / "mix.safetensors" for number in range(2)]
    for file in files:
        assert run(f"{a}:0.8", f"{b}:0.6", "-o", file, "--method", method, "--rank", 3) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {module.rank for module in read_lora(files[0]).modules.values()} == {3}


def test_dare_depends_on_the_seed(adapter_file, tmp_path):
    a = adapter_file("a")
    files = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, file in enumerate(files):
        assert run(a, "-o", file, "--method", "dare", "--seed", seed, "--rank", 2) == 0
    first, second = map(deltas, files)
    assert all(not torch.equal(first[target], second[target]) for target in first)


def test_a_rank_keeps_the_leading_part_and_says_how_much(adapter_file, tmp_path, capsys):
    a, b = adapter_file("a", seed=1), adapter_file("b", seed=2)
    out = tmp_path / "mix.safetensors"
    assert run(a, b, "-o", out, "--rank", 2) == 0
    kept = float(read_header(out).metadata["sfumato.kept_energy"])
    found, first, second = deltas(out), deltas(a), deltas(b)
    wanted = {target: first[target] + second[target] for target in first}
    lost = sum(float((found[t] - d).square().sum()) for t, d in wanted.items())
    assert kept == pytest.approx(1 - lost / sum(float(d.square().sum()) for d in wanted.values()), abs=1e-5)
    assert f"keeps {kept:.2%} of the energy" in capsys.readouterr().err


def test_the_file_tells_its_parents_its_triggers_and_true_hashes(adapter_file, tmp_path):
    a, b = adapter_file("a", seed=1), adapter_file("b", seed=2)
    out = tmp_path / "mix.safetensors"
    assert run(f"{a}:0.8", f"{b}:0.6:0.3", "-o", out, "--dtype", "fp16", "--title", "Both") == 0
    metadata = read_header(out).metadata
    assert json.loads(metadata["sfumato.parents"]) == [
        {"name": "a.safetensors", "hash": data_sha256(read_header(a))[:12], "weight": 0.8},
        {"name": "b.safetensors", "hash": data_sha256(read_header(b))[:12], "weight": [0.6, 0.3]},
    ]
    assert metadata["modelspec.trigger_phrase"] == "sks a, sks b"
    assert metadata["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "Both"
    assert metadata["ss_sd_model_name"] == "tiny"
    assert metadata["sshs_model_hash"] == data_sha256(read_header(out))
    assert metadata["ss_network_dim"] == "4"
    assert {info.dtype for name, info in read_header(out).tensors.items() if "lora_" in name[9:]} >= {"F16"}
    assert str(tmp_path) not in str(dict(metadata))


def test_a_file_of_weight_0_is_no_parent(adapter_file, tmp_path):
    """What the others ask for holds, as in a mix."""
    a, b, asks, out = adapter_file("a"), adapter_file("b"), tmp_path / "asks.safetensors", tmp_path / "mix.safetensors"
    save_file(load_file(a), asks, {**read_header(a).metadata, "sfumato.adapter_guidance": "2"})
    assert run(f"{asks}:0.8", f"{b}:0", "-o", out) == 0
    metadata = read_header(out).metadata
    assert (metadata["sfumato.adapter_guidance"], metadata["modelspec.merged_from"]) == ("2", "asks.safetensors")
    assert metadata["modelspec.trigger_phrase"] == "sks a"


def test_what_is_0_wherever_the_file_has_something_is_weight_0(adapter_file, tmp_path):
    """Its words are none of the merge's; the file of other layers is."""
    a, b, out = add_words(adapter_file("a"), CAT), adapter_file("b"), tmp_path / "mix.safetensors"
    for number, nothing in enumerate(("a=down:0,mid:0,up:0,te:0", "a=rest:0")):
        assert run(a, b, "-o", out, "--blocks", nothing, *(("--overwrite",) if number else ())) == 0
        assert read_header(out).metadata["modelspec.merged_from"] == "b.safetensors"
        assert not read_adapter(out).embeddings


def test_what_a_file_asks_for_and_the_result_does_not_is_told(tiny_base, adapter_file, tmp_path, capsys):
    a, b, asks = adapter_file("a"), adapter_file("b"), tmp_path / "asks.safetensors"
    about = {"sfumato.adapter_guidance": "2", "sfumato.over_steps": "0-0.8", "sfumato.negatives": '["<a>"]'}
    save_file(load_file(a), asks, {**read_header(a).metadata, **about})
    assert run(asks, "--into", tiny_base("pocket").folder, "-o", tmp_path / "baked") == 0
    line = "asks.safetensors: asks for adapter guidance 2 and the steps 0-0.8 and the negative prompt '<a>', "
    assert f"{line}which a base cannot; baked in" in capsys.readouterr().err
    assert run(asks, b, "-o", tmp_path / "both.safetensors") == 0
    assert f"{line}others do not, so both.safetensors does not" in capsys.readouterr().err
    assert run(asks, f"{b}:0", "-o", tmp_path / "one.safetensors") == 0
    assert "asks for" not in capsys.readouterr().err
    assert read_header(tmp_path / "one.safetensors").metadata["sfumato.negatives"] == '["<a>"]'


def test_what_was_learned_on_a_base_that_predicts_otherwise_is_told(tiny_base, adapter_file, tmp_path, capsys):
    a, b, base = adapter_file("a", "sd1"), tmp_path / "b.safetensors", tiny_base("sd1").folder
    save_file(load_file(a), b, {**read_header(a).metadata, "modelspec.prediction_type": "v"})
    save_file(load_file(a), a, {**read_header(a).metadata, "modelspec.prediction_type": "epsilon"})
    line = "b.safetensors: learned where the base predicts v_prediction, and "
    for words, said in (
        (("-o", tmp_path / "mix.safetensors"), "a.safetensors"),
        (("--into", base, "-o", tmp_path / "baked"), base.name),
    ):
        assert run(a, b, *words) == 0
        assert [each for each in capsys.readouterr().err.splitlines() if "learned where" in each] == [
            f"{line}{said} epsilon; together they draw something else."
        ]


def test_blocks_are_chosen_for_all_or_for_one(adapter_file, tmp_path):
    a, b = adapter_file("a", seed=1), adapter_file("b", seed=2)
    out = tmp_path / "mix.safetensors"
    assert run(a, b, "-o", out, "--blocks", "unet", "--blocks", "a=down", "--blocks", "b=up,mid") == 0
    found, first, second = (deltas(path) for path in (out, a, b))
    for target in found:
        source = first if target[1].startswith("down") else second
        assert_close(found[target], source[target])
    assert {target for target in first if target[0] == "unet"} == found.keys()


def test_blocks_have_factors_of_the_weight(adapter_file, tmp_path):
    a, b = adapter_file("a", seed=1), adapter_file("b", seed=2)
    out = tmp_path / "mix.safetensors"
    words = ("--blocks", "a=down:0.25,te:0", "--blocks", "b=up:1,rest:0")
    assert run(f"{a}:2", f"{b}:1.0000001", "-o", out, *words) == 0
    found, first, second = (deltas(path) for path in (out, a, b))
    for target, delta in first.items():
        part, path = target
        if part != "unet":
            assert target not in found
            continue
        own = 2 * delta * (0.25 if path.startswith("down") else 1)
        assert_close(found[target], own + second[target] if path.startswith("up") else own)
    told = json.loads(read_header(out).metadata["sfumato.parents"])
    assert [parent["weight"] for parent in told] == ["2 on down:0.25,te:0", "1.0000001 on up:1,rest:0"]


def test_one_file_twice_is_twice_the_file(adapter_file, tmp_path):
    a = adapter_file("a")
    assert [adapter.label for adapter in parse_adapters([str(a), f"{a}:0.5"])] == ["a", "a 2"]
    assert run(a, f"{a}:0.5", "-o", tmp_path / "mix.safetensors") == 0
    found, first = deltas(tmp_path / "mix.safetensors"), deltas(a)
    for target, delta in found.items():
        assert_close(delta, 1.5 * first[target])


def test_families_are_not_mixed(adapter_file, tmp_path, capsys):
    a, b = adapter_file("a", "sd1"), adapter_file("b", "sdxl")
    assert run(a, b, "-o", tmp_path / "mix.safetensors") == 2
    assert "a.safetensors is for SD 1.x, b.safetensors for SDXL; only adapters of one family" in capsys.readouterr().err
    assert not (tmp_path / "mix.safetensors").exists()


def test_shapes_are_not_mixed(tiny_base):
    weights = tiny_base("pocket").weights()
    target = next(iter(weights))
    small, large = ({target: w} for w in (weights[target], torch.cat([weights[target]] * 2)))
    with pytest.raises(AdapterError, match=r"They were trained for different bases"):
        merge([MergeSource("a", random_modules(small, 1)), MergeSource("b", random_modules(large, 2))])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no adapter"),
        (["A:0"], "every adapter has the weight 0"),
        (["A", "--blocks", "x=up"], "no adapter is called 'x'; there are a"),
        (["A", "--blocks", "nothing"], "names none of the"),
        (["A", "--blocks", "a=donw:0.5"], "blocks donw: no module of a is called that"),
        (["A", "--blocks", "a=down:0.5", "--blocks", "up:0.5"], "a has factors already; name them in one"),
        (["A", "--blocks", "a=down:x"], "blocks 'down:x': wanted NAME:FACTOR"),
        (["A", "--rank", "0"], "rank 0: wanted at least 1"),
        (["A", "--method", "ties", "--density", "0"], "density 0"),
        (["A", "--density", "0.2"], "--density has no effect on --method linear"),
        (["A", "--method", "ties", "--inside", "dare"], "--inside has no effect on --method ties"),
        (["A", "--method", "knots", "--null-strength", "2"], "--null-strength has no effect on --method knots"),
        (["A", "--seed", "3"], "--seed has no effect on --method linear"),
        (["A", "--method", "knots", "--inside", "linear", "--density", "0.1"], "--inside linear; leave it out"),
        (["A", "--method", "knots", "--seed", "3"], "no effect on --method knots --inside ties; leave it out, or give"),
        (["A", "--method", "np-lora", "--null-energy", "5"], "--null-energy is 5"),
        (["A", "--method", "dare", "--seed", "-1"], "seed -1: no seed is drawn by lot here"),
        (["A", "--blocks", ""], "blocks '': names no block; wanted such as up"),
        (["A", "--blocks", "a="], "blocks 'a=': names no block"),
        (["A:strong"], "'strong' is no weight"),
        (["A:0.5", "-o", "A"], "exists already"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, adapter_file, tmp_path, capsys):
    a = adapter_file("a")
    words = [word.replace("A", str(a)) if word[:1] == "A" else word for word in words]
    output = [] if "-o" in words else ["-o", tmp_path / "mix.safetensors"]
    assert run(*words, *output) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "mix.safetensors").exists()


class Nudge:
    """A change that depends on the weight: w times it."""

    kind, needs_weight, bias_delta = "OFT", True, None

    def __init__(self, factor):
        self.factor = factor

    def fits(self, shape):
        return True

    def delta(self, weight):
        return self.factor * weight.float()

    def low_rank(self):
        return None


def test_a_kind_without_low_rank_is_factored_from_its_delta_on_the_base(tiny_base):
    base = tiny_base("pocket")
    weights = base.weights()
    target = next(t for t in weights if t[1].endswith("attn2.to_q"))
    lora = random_modules({target: weights[target]}, 1)
    sources = [MergeSource("nudge", {target: Nudge(0.1)}, 0.5), MergeSource("lora", lora, 2.0)]
    with pytest.raises(AdapterError, match=r"nudge: the delta of OFT .* Name the base it was made for with --base"):
        merge(sources, budget=Budget(rank=4))
    at = stored_base(base.folder).weight
    for given in (sources, sources[::-1]):  # whose it is, is said, wherever it comes
        with pytest.raises(AdapterError, match=r"^nudge: OFT .* has no exact low-rank form. Say how much to keep"):
            merge(given, base=at)
    wanted = 0.05 * weights[target] + 2 * lora[target].delta()
    merged = merge(sources, budget=Budget(keep_energy=1.0), base=at)
    assert_close(merged.modules[target].delta(), wanted, rtol=1e-5, atol=1e-6)
    cut = merge(sources, budget=Budget(rank=4), base=at)
    lost = (cut.modules[target].delta() - wanted).norm() / wanted.norm()
    assert cut.error == pytest.approx(float(lost), rel=1e-4)


def test_a_changed_bias_is_not_lost_in_silence(tiny_base):
    weights = tiny_base("pocket").weights()
    target = next(iter(weights))
    module = replace(random_modules({target: weights[target]}, 1)[target], bias_delta=torch.ones(len(weights[target])))
    with pytest.raises(AdapterError, match=r"a: .* changes a bias, which a LoRA cannot"):
        merge([MergeSource("a", {target: module})])


def everything(weights):
    return weights


@pytest.mark.parametrize(
    "family",
    ["sd1", "pocket", pytest.param("sd2", marks=pytest.mark.slow), pytest.param("sdxl", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("form", ["folder", "file"])
def test_into_a_base_is_what_the_mixer_makes(family, form, tiny_base, adapter_file, tmp_path):
    base = tiny_base(family)
    if (source := getattr(base, form)) is None:
        pytest.skip("pocket is a folder")
    a, b = (adapter_file(name, family, seed, choose=everything) for name, seed in (("a", 1), ("b", 2)))
    out = tmp_path / ("baked.safetensors" if form == "file" else "baked")
    assert run(f"{a}:0.8", f"{b}:0.6:0.2", "--into", source, "-o", out) == 0

    from sfumato.models import load_base

    baked = load_base(out, precision=CPU, prediction_type="epsilon" if family == "sd2" else None)
    parts = dict(zip(("text_encoder", "text_encoder_2"), baked.text_encoders, strict=False)) | {"unet": baked.unet}
    first, second = deltas(a), deltas(b)
    for (part, path), weight in base.weights().items():
        want = weight + 0.8 * first[part, path] + (0.6 if part == "unet" else 0.2) * second[part, path]
        assert_close(parts[part].get_submodule(path).weight, want, rtol=1e-5, atol=1e-5)
    for part, module in base.parts().items():
        written = parts[part].state_dict()
        for name, value in module.state_dict().items():
            if (part, name.removesuffix(".weight")) not in first:
                assert torch.equal(written[name], value), name


def test_a_baked_folder_is_read_by_diffusers_and_keeps_its_dtype(tiny_base, adapter_file, tmp_path):
    base = tiny_base("sd1")
    half = tmp_path / "half"
    import copy

    copy.deepcopy(base.pipe).to(torch.bfloat16).save_pretrained(str(half))
    a = adapter_file("a", "sd1")
    # As the hub's SD 1.5 says it, of which we fetch neither; and what else may lie in a training's folder.
    index = json.loads((half / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (half / "model_index.json").write_text(json.dumps(index))
    for name in ("safety_checker/config.json", "safety_checker/pytorch_model.bin", "old/line.safetensors"):
        (half / name).parent.mkdir(exist_ok=True)
        (half / name).write_text("{}")
    assert run(a, "--into", half, "-o", tmp_path / "baked") == 0
    assert not (tmp_path / "baked/old").exists()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(tmp_path / "baked"))
    target = next(t for t in deltas(a) if t[0] == "unet")
    exact = base.weights()[target].bfloat16().float() + deltas(a)[target]
    assert torch.equal(pipe.unet.get_submodule(target[1]).weight, exact.bfloat16().float())
    tensors = load_file(tmp_path / "baked/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_baked_checkpoint_tells_its_parents_and_its_own_hash(tiny_base, adapter_file, tmp_path):
    base, a = tiny_base("sd1"), adapter_file("a", "sd1")
    out = tmp_path / "baked.safetensors"
    assert run(a, "--into", base.file, "-o", out) == 0
    metadata = read_header(out).metadata
    assert json.loads(metadata["sfumato.parents"])[0]["name"] == "a.safetensors"
    assert metadata["modelspec.hash_sha256"] == f"0x{data_sha256(read_header(out))}"
    assert metadata["modelspec.prediction_type"] == "epsilon"


def test_a_baked_checkpoint_names_its_base_s_words_authors_and_licences_and_the_adapters(
    tiny_base, adapter_file, tmp_path
):
    keys = ("modelspec.author", "modelspec.license", "modelspec.trigger_phrase")
    files = {}
    for file, said in (
        (tiny_base("sd1").file, ("Ann", "mit", "sks")),
        (adapter_file("a", "sd1"), ("Ben", "nc", "hen")),
    ):
        files[file] = tmp_path / f"told-{file.name}"
        save_file(load_file(file), files[file], dict(zip(keys, said, strict=True)))
    base, a = files.values()
    out = tmp_path / "baked.safetensors"
    assert run(a, "--into", base, "-o", out, "--family", "sd1") == 0
    metadata = read_header(out).metadata
    assert [metadata[key] for key in keys] == ["Ann, Ben", "mit, nc", "sks, hen"]


@pytest.mark.parametrize("architecture", ["stable-diffusion-v2-768-v", "stable-diffusion-v2/inpainting"])
def test_a_baked_checkpoint_is_of_the_architecture_that_its_base_says(architecture, tiny_base, adapter_file, tmp_path):
    base, out = tmp_path / "base.safetensors", tmp_path / "baked.safetensors"
    save_file(load_file(tiny_base("sd2").file), base, {"modelspec.architecture": architecture})
    assert run(adapter_file("a", "sd2"), "--into", base, "-o", out) == 0
    assert read_header(out).metadata["modelspec.architecture"] == architecture


def test_baking_what_does_not_fit_writes_nothing(tiny_base, adapter_file, tmp_path, capsys):
    a = adapter_file("a", "sdxl")
    assert run(a, "--into", tiny_base("sd1").folder, "-o", tmp_path / "baked") == 2
    assert "is SD 1.x, the adapters are for sdxl" in capsys.readouterr().err
    assert not (tmp_path / "baked").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_factor_on_the_outputs_takes_the_bias_with_it(tiny_base, tmp_path):
    """peft's IA3 (Liu et al. 2022): the layer's whole output is multiplied."""
    base = stored_base(tiny_base("pocket").folder)
    target = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0")
    weight, bias = base.weight(target), base.weight(target, "bias")
    source = MergeSource("a", {target: Ia3(torch.linspace(-1, 1, len(bias)), on_input=False, scales_bias=True)}, 0.5)
    factor = 1 + 0.5 * torch.linspace(-1, 1, len(bias))
    baked = stored_base(
        bake(base, [source], tmp_path / "baked", {}, method="linear", settings=MethodSettings(), seed=0)
    )
    assert_close(baked.weight(target), weight * factor[:, None])
    assert_close(baked.weight(target, "bias"), bias * factor)
    of_weight, of_bias = Deltas(source, base)[target]
    assert_close((of_weight, of_bias), (2 * (baked.weight(target) - weight), 2 * (baked.weight(target, "bias") - bias)))


@pytest.mark.parametrize("option", ["--dtype fp32", "--base pocket", "--null-energy 0.5"])
def test_into_refuses_what_it_has_no_use_for(option, tiny_base, adapter_file, tmp_path, capsys):
    a = adapter_file("a")
    assert run(a, "--into", tiny_base("pocket").folder, "-o", tmp_path / "b", *option.split()) == 2
    assert f"in the base's own dtype: leave out {option.split()[0]}, or" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_into_refuses_a_seed_where_nothing_is_drawn_by_lot(method, tiny_base, adapter_file, tmp_path, capsys):
    words = ["--into", tiny_base("pocket").folder, "-o", tmp_path / "b", "--seed", "1", "--method", method]
    assert run(adapter_file("a"), *words) == 2
    assert f"--seed has no effect on --method {method}; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weight", "form", "output", "said"),
    [
        ("", "file", "baked", "is a single file; name a .safetensors file to write"),
        ("", "folder", "baked.safetensors", "is a diffusers folder; name a folder to write"),
        (":0", "file", "baked.safetensors", "nothing is left to bake: every adapter has the weight 0"),
    ],
)
def test_a_base_is_written_in_its_own_form_and_not_for_nothing(
    weight, form, output, said, tiny_base, adapter_file, tmp_path, capsys
):
    a = adapter_file("a", "sd1")
    assert run(f"{a}{weight}", "--into", getattr(tiny_base("sd1"), form), "-o", tmp_path / output) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / output).exists()


def test_second_weights_of_a_checkpoint_are_said_to_stay(tiny_base, adapter_file, tmp_path, capsys):
    base, both = tiny_base("sd1").file, tmp_path / "both.safetensors"
    save_file(load_file(base) | {"model_ema.decay": torch.ones(1)}, both, dict(read_header(base).metadata))
    for source, is_said in ((base, False), (both, True)):
        assert run(adapter_file("a", "sd1"), "--into", source, "-o", tmp_path / f"{is_said}.safetensors") == 0
        assert (
            "the running mean (model_ema), are both.safetensors's as they were" in capsys.readouterr().err
        ) == is_said


def test_a_folder_is_given_no_title(tiny_base, adapter_file, tmp_path, capsys):
    assert run(adapter_file("a"), "--into", tiny_base("pocket").folder, "-o", tmp_path / "b", "--title", "T") == 2
    assert "is a folder, which has no metadata" in capsys.readouterr().err


CAT = {"<cat>": {"text_encoder": torch.ones(2, 8)}}


def test_words_are_kept_and_two_meanings_of_one_refused(tiny_base, adapter_file, tmp_path, capsys):
    a, b = add_words(adapter_file("a"), CAT), adapter_file("b", seed=2)
    out = tmp_path / "mix.safetensors"
    assert run(f"{a}:0.5", b, "-o", out) == 0
    assert torch.equal(read_adapter(out).embeddings["<cat>"]["text_encoder"], torch.ones(2, 8))
    add_words(b, {"<cat>": {"text_encoder": torch.zeros(2, 8)}})
    assert run(a, b, "-o", out, "--overwrite") == 2
    assert "a and b bring different vectors for '<cat>'" in capsys.readouterr().err
    assert run(a, "--into", tiny_base("pocket").folder, "-o", tmp_path / "baked") == 2
    assert "which would be lost" in capsys.readouterr().err


def test_values_at_the_end_of_fp32_are_one_line(tmp_path, capsys):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.full((1, 8), 1e38), f"{name}.lora_B.weight": torch.ones(8, 1)}
    file = write_tensors(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sfumato_pocket"})
    assert run(file, "-o", tmp_path / "mix.safetensors") == 2
    error = capsys.readouterr().err
    assert "more than fp32 holds, so the file was not written" in error
    assert error.count("\n") == 1
