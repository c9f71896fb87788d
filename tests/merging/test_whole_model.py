"""Whole models in mixes and in bases: the weighted sum of checkpoints, what one adds to another, and other methods."""

import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from sfumato.pipelines import clash, convert, extract, generate, grid, merge
from torch.testing import assert_close

from sfumato import load_base
from sfumato.adapters.blocks import Blocks
from sfumato.cli import guarded
from sfumato.compose import Adapter, compose
from sfumato.compose.per_image import per_picture
from sfumato.compose.regions import Region, regions
from sfumato.errors import AdapterError, FileError
from sfumato.files import LoraModule, write_lora
from sfumato.files.adapter_file import read_adapter
from sfumato.generation.metadata.png_info import read_picture_info
from sfumato.merging import whole_model
from sfumato.merging.methods import DENSE, MethodSettings
from sfumato.merging.model_weights import stored_base
from sfumato.merging.sources import adapter_hash
from sfumato.merging.whole_model import files_of_parts, is_whole_model, model_as_adapter
from sfumato.utils import randomness
from tests.merging.conftest import TinyBase
from tests.tiny import CPU, tiny_pipeline, write_folder, write_single_file

SLOW = [pytest.param("sd2", "file", marks=pytest.mark.slow), pytest.param("sdxl", "folder", marks=pytest.mark.slow)]
CASES = [("sd1", "file"), *SLOW]
"""Each family once, in a form each."""


def run(program, *words):
    return guarded(program.main, [str(word) for word in words])


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """models("sd1", 1) is a tiny model; every weight, bias and norm of it is another than that of models("sd1", 0)."""

    @cache
    def make(family, seed):
        root = tmp_path_factory.mktemp(f"{family}-{seed}")
        pipe = tiny_pipeline(family, shallow=True)
        draws = randomness.generator(seed, "whole model")
        for part in (pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            for parameter in () if part is None else part.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=draws)
        said = {"modelspec.prediction_type": "epsilon"}
        file = write_single_file(pipe, root / f"m{seed}.safetensors", metadata=said)
        return TinyBase(family, pipe, write_folder(pipe, root / f"m{seed}"), file)

    return make


def parameters(source):
    """All of a stored model's parameters, fp32."""
    model = stored_base(source)
    return {parameter: model.read(parameter).float() for parameter in model.places}


def state(base):
    """The same of a loaded base."""
    parts = {"unet": base.unet} | dict(
        zip((encoder.folder for encoder in base.family.encoders), base.text_encoders, strict=True)
    )
    return {
        (part, name): value.clone() for part, module in parts.items() for name, value in module.state_dict().items()
    }


def assert_same(found, wanted, *, rtol=1e-5, atol=1e-6):
    assert found.keys() == wanted.keys()
    other = [at for at, value in wanted.items() if not torch.allclose(found[at], value, rtol=rtol, atol=atol)]
    assert other == []


@pytest.mark.parametrize(("family", "form"), [("sd1", "folder"), *SLOW])
def test_a_mix_is_the_weighted_sum_of_both_models(family, form, models):
    first, second = models(family, 0), models(family, 1)
    base = load_base(first.file, precision=CPU)
    before = state(base)
    a, b = parameters(first.file), parameters(second.file)
    assert_same(before, a, rtol=0, atol=0)
    mix = compose(base, Adapter(getattr(second, form), 0.3, "second"))
    assert_same(state(base), {p: a[p] + 0.3 * (b[p] - a[p]) for p in a})
    mix.set(second=1)
    assert_same(state(base), b)
    mix.undo()
    assert_same(state(base), before, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_model_counts_in_any_dtype(dtype, models, tmp_path):
    first, second, out = models("sd1", 0), tmp_path / "second.safetensors", tmp_path / "out.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(models("sd1", 1).file).items()}, second)
    a, b = parameters(first.file), parameters(second)
    base = load_base(first.file, precision=CPU)
    compose(base, Adapter(second, 0.5))
    wanted = {p: torch.lerp(a[p], b[p], 0.5) for p in a}
    assert_same(state(base), wanted)
    assert run(merge, f"{second}:0.5", "--into", first.file, "-o", out) == 0
    assert_same(parameters(out), wanted)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_quantised_model_whose_scales_would_be_left_out_is_refused(form, models, tmp_path, capsys):
    """ComfyUI's scaled 8-bit weights, which are no weights without their scales."""
    first, second, scale = models("sd1", 0), tmp_path / "second", {"scale_weight": torch.ones(())}
    shutil.copytree(models("sd1", 1).folder, second)
    file = second / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {f"conv_in.{name}": value for name, value in scale.items()}, file)
    if form == "file":
        second, name = tmp_path / "second.safetensors", "model.diffusion_model.input_blocks.0.0"
        save_file(load_file(models("sd1", 1).file) | {f"{name}.{key}": value for key, value in scale.items()}, second)
    assert run(merge, f"{second}:0.5", "--into", first.file, "-o", tmp_path / "out.safetensors") == 2
    assert "weights are missing, 1 are unknown, first" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_blocks_and_parts_have_their_own_weights(models):
    first, second = models("sd1", 0), models("sd1", 1)
    base = load_base(first.file, precision=CPU)
    a, b = parameters(first.file), parameters(second.file)
    compose(base, Adapter(second.file, Blocks((1.0, 0.5), {"mid": 0.0})))
    found = state(base)
    for (part, name), value in found.items():
        share = 0.5 if part == "text_encoder" else 0.0 if name.startswith("mid_block") else 1.0
        assert_close(value, torch.lerp(a[part, name], b[part, name], share), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "form"), CASES)
def test_a_base_gets_what_a_mix_has(family, form, models, tmp_path):
    first, second, third = (models(family, seed) for seed in range(3))
    out = tmp_path / ("out.safetensors" if form == "file" else "out")
    models_given = (f"{second.folder}:0.5", f"{third.file}:-0.25")
    assert run(merge, *models_given, "--into", getattr(first, form), "-o", out) == 0
    a, b, c = (parameters(model.file) for model in (first, second, third))
    assert_same(parameters(out), {p: a[p] + 0.5 * (b[p] - a[p]) - 0.25 * (c[p] - a[p]) for p in a})


@pytest.mark.parametrize("family", ["sd1", pytest.param("sd2", marks=pytest.mark.slow)])
def test_a_model_gains_what_another_learned(family, models, tmp_path):
    """A1111's "add difference": A + w (B - C)."""
    first, second, third = (models(family, seed) for seed in range(3))
    learned, out = tmp_path / "learned.safetensors", tmp_path / "out"
    assert run(extract, second.file, "--base", third.folder, "--exact", "-o", learned) == 0
    assert run(merge, f"{learned}:0.5", "--into", first.folder, "-o", out) == 0
    a, b, c = (parameters(model.file) for model in (first, second, third))
    assert_same(parameters(out), {p: a[p] + 0.5 * (b[p] - c[p]) for p in a})


@pytest.fixture
def inpainting(models, tmp_path):
    """The first model with five channels more, all of ones, in its first layer; and these."""
    tensors = load_file(models("sd1", 0).file)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    more = torch.ones(len(tensors[name]), 5, 3, 3)
    save_file(tensors | {name: torch.cat([tensors[name], more], 1)}, tmp_path / "inpainting.safetensors")
    return tmp_path / "inpainting.safetensors", more


def test_an_inpainting_model_keeps_the_channels_that_others_lack(models, inpainting, tmp_path):
    first, second, third = (models("sd1", seed) for seed in range(3))
    (inpainting, more), out = inpainting, tmp_path / "out.safetensors"
    learned = tmp_path / "learned.safetensors"
    assert run(extract, second.file, "--base", third.folder, "--exact", "-o", learned) == 0
    assert run(merge, f"{learned}:0.5", f"{second.file}:0.25", "--into", inpainting, "-o", out) == 0
    a, b, c = (parameters(model.file) for model in (first, second, third))
    wanted = {p: a[p] + 0.5 * (b[p] - c[p]) + 0.25 * (b[p] - a[p]) for p in a}
    wanted["unet", "conv_in.weight"] = torch.cat([wanted["unet", "conv_in.weight"], more], 1)
    assert_same(parameters(out), wanted)


def test_an_inpainting_model_takes_a_lora_of_the_first_layer(models, inpainting, tmp_path):
    (inpainting, more), out = inpainting, tmp_path / "out.safetensors"
    module = LoraModule(torch.ones(1, 4, 3, 3), torch.ones(len(more), 1, 1, 1), 1.0)
    lora = write_lora(tmp_path / "lora.safetensors", {("unet", "conv_in"): module}, family="sd1")
    assert run(merge, f"{lora}:0.5", "--into", inpainting, "-o", out) == 0
    at = "unet", "conv_in.weight"
    assert_close(parameters(out)[at], torch.cat([parameters(models("sd1", 0).file)[at] + 0.5, more], 1))


def test_a_model_that_does_not_fit_is_named_with_its_layer(models, inpainting, tmp_path, capsys):
    words = ("--into", models("sd1", 0).file, "-o", tmp_path / "out.safetensors")
    assert run(merge, f"{inpainting[0]}:0.5", *words) == 2
    assert "inpainting, unet.conv_in.weight: this whole model does not fit" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_an_exact_difference_holds_the_parts_that_differ_and_no_others(models, tmp_path, capsys):
    first, second = models("sd1", 0), models("sd1", 1)
    out, words = tmp_path / "out.safetensors", ("--base", first.file, "--exact")
    assert run(extract, second.file, *words, "--parts", "text_encoder", "-o", out) == 0
    assert {part for part, _ in read_adapter(out).changes} == {"text_encoder"}
    assert run(extract, second.file, *words, "--parts", "text_encoder_2", "-o", tmp_path / "none.safetensors") == 2
    assert "--parts text_encoder_2: SD 1.x has text_encoder, unet alone" in capsys.readouterr().err
    assert run(extract, first.folder, *words, "-o", tmp_path / "none.safetensors") == 2
    assert "no weight differs" in capsys.readouterr().err
    assert run(extract, second.file, *words, "--rank", 4, "-o", tmp_path / "r.safetensors") == 2
    assert "--exact keeps all: leave out --rank" in capsys.readouterr().err
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", list(DENSE))
def test_other_methods_merge_every_parameter_by_itself(method, models, tmp_path):
    first, second, third = (models("sd1", seed) for seed in range(3))
    seed = ("--seed", 3) if "dare" in method else ()  # the others draw nothing, and refuse it
    words = ("--method", method, "--density", 0.4, *seed, "--into", first.file)
    given = (f"{second.file}:0.7", f"{third.file}:0.6")
    assert run(merge, *given, *words, "-o", tmp_path / "out.safetensors") == 0
    a, b, c = (parameters(model.file) for model in (first, second, third))
    found = parameters(tmp_path / "out.safetensors")
    for at in [("unet", "conv_in.weight"), ("unet", "conv_in.bias"), ("text_encoder", "final_layer_norm.weight")]:
        draws = randomness.generator(3, f"merge/{'/'.join(at)}")
        flat = [(model[at] - a[at]).reshape(len(a[at]), -1) for model in (b, c)]
        merged = DENSE[method](MethodSettings(0.4), draws)(flat, [0.7, 0.6])
        assert_close(found[at], a[at] + merged.float().reshape(a[at].shape), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[at], a[at] + 0.7 * (b[at] - a[at]) + 0.6 * (c[at] - a[at]))


def test_methods_on_factors_are_refused_for_a_base(models, tmp_path, capsys):
    words = ("--method", "knots", "--into", models("sd1", 0).file, "-o", tmp_path / "out.safetensors")
    assert run(merge, models("sd1", 1).file, *words) == 2
    assert "--method knots works on factors" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_wants_a_lora_says_how_to_take_one_out(models, tmp_path, capsys):
    first, second = models("sd1", 0), models("sd1", 1)
    command = "sfumato extract MODEL --base BASE --rank 32"
    assert run(merge, second.file, "-o", tmp_path / "out.safetensors") == 2
    said = capsys.readouterr().err
    assert "is a whole model, which no LoRA holds" in said
    assert command in said
    assert run(clash, second.file, second.folder) == 2
    assert command in capsys.readouterr().err
    base = load_base(first.file, precision=CPU)
    with pytest.raises(AdapterError, match=command), per_picture(base, [[Adapter(second.file, (1, 0))]]):
        pass
    region = Region((0, 0, 0.5, 1), Adapter(second.file, (1, 0)))
    with pytest.raises(AdapterError, match=command), regions(base, region):
        pass
    assert run(convert, second.file, "-o", tmp_path / "out.safetensors") == 2
    assert "m1.safetensors: this is a full checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_model_of_another_family_is_refused(form, models):
    base = load_base(models("sd1", 0).file, precision=CPU)
    before = state(base)
    with pytest.raises(AdapterError, match="trained for SDXL"):
        compose(base, Adapter(getattr(models("sdxl", 1), form)))
    assert_same(state(base), before, rtol=0, atol=0)


def test_whole_models_are_told_from_adapters(models, tiny_base, adapter_file, tmp_path):
    assert is_whole_model(models("sd1", 1).folder)
    assert is_whole_model(models("sdxl", 1).file)
    assert not is_whole_model(adapter_file("a"))
    assert not is_whole_model(tmp_path)
    assert not is_whole_model(tmp_path / "nothing.safetensors")
    file = model_as_adapter(models("sdxl", 1).file)
    assert (file.family, file.text_width, file.kinds.keys()) == ("sdxl", 192, {"whole model"})


def test_a_file_is_looked_into_once_and_again_when_it_is_another(models, adapter_file, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    shutil.copy(adapter_file("a"), path)
    assert not is_whole_model(path)
    shutil.copy(models("sdxl", 1).file, path)
    assert is_whole_model(path)
    monkeypatch.setattr(whole_model, "read_header", None)
    assert is_whole_model(path)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_folder_is_named_by_its_weights_without_the_vae(family, models, tmp_path):
    folder = models(family, 1).folder
    files = {place.file for place in stored_base(folder).places.values()}
    assert files_of_parts(folder) == sorted(files)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "vae")
    assert adapter_hash(copy) == adapter_hash(folder) != adapter_hash(models(family, 2).folder)
    model = stored_base(copy)
    parameter, place = next(iter(model.places.items()))
    save_file(load_file(place.file), place.file, {"saved": "anew"})
    with pytest.raises(FileError, match="the file changed"):
        model.read(parameter)


def test_a_picture_tells_the_share_of_a_model_to_us_and_gives_others_no_tag(pocket_folder, tmp_path, quick, capsys):
    out = tmp_path / "a.png"
    words = ("--lora", f"half={pocket_folder}:0.5", "--base", pocket_folder, "-o", out)
    assert run(generate, "a cat", *words) == 0
    told = read_picture_info(out)
    (adapter,) = told.own["adapters"]
    assert (adapter["label"], adapter["file"], adapter["weight"]) == ("half", pocket_folder.name, 0.5)
    assert told.parameters.prompt == "a cat"
    assert "Lora hashes" not in told.parameters.settings


def test_a_grid_of_methods_refuses_a_model_before_its_first_picture(pocket_folder, tmp_path, quick, capsys):
    axes = ("--x", "method=linear,ties", "--y", "half=0,0.5", "--prompt", "a cat", "--base", pocket_folder)
    assert run(grid, "--lora", f"half={pocket_folder}", *axes, "-o", tmp_path / "grid") == 2
    assert "half is a whole model, which no LoRA holds" in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_a_model_that_follows_the_steps_is_in_the_weights(pocket_folder, tmp_path, quick, capsys):
    lora = ("--lora", f"half={pocket_folder}:0.5", "--over-steps", "half=0:0,1:0.5")
    assert run(generate, "a cat", *lora, "--base", pocket_folder, "-o", tmp_path / "a.png") == 0
    said = capsys.readouterr().err
    assert "weights baked in place" in said
    assert "live" not in said
