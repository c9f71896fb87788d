"""`sfumato extract` and `sfumato resize`: an adapter out of two models, a smaller one out of a larger."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sfumato.pipelines import convert, extract, merge, resize
from torch.testing import assert_close

from sfumato.cli import guarded
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import read_adapter, read_lora
from sfumato.files.header import read_header
from sfumato.files.writing.kohya import write_lora
from sfumato.merging.extract import extract as extract_pairs
from sfumato.merging.factors import Budget
from sfumato.merging.whole_model import read_adapter_or_model
from tests.bundles import add_words
from tests.merging.conftest import attention, random_modules


def run(program, *words):
    return guarded(program.main, [str(word) for word in words])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(out, inner, rank, seed=0):
    return random(out, rank, seed=seed) @ random(rank, inner, seed=seed + 1)


def extracted(before, after, **budget):
    pairs = ((("unet", name), before[name], after[name]) for name in before)
    return extract_pairs(pairs, Budget(**budget))


def test_a_change_of_low_rank_is_found_whole_and_what_did_not_change_is_left_out():
    before = {"a.weight": random(8, 6), "b.weight": random(4, 4), "c.weight": random(6, 5, 3, 3)}
    after = before | {
        "a.weight": before["a.weight"] + low_rank(8, 6, 2),
        "c.weight": before["c.weight"] + low_rank(6, 45, 3).view(6, 5, 3, 3),
    }
    modules, kept = extracted(before, after, keep_energy=1 - 1e-9)
    assert {path: module.rank for (_, path), module in modules.items()} == {"a": 2, "c": 3}
    assert kept.share == pytest.approx(1)
    for (_, path), module in modules.items():
        assert_close(module.delta(), after[f"{path}.weight"] - before[f"{path}.weight"], rtol=1e-4, atol=1e-5)


def test_the_kept_share_is_that_of_all_that_changed():
    before = {"a.weight": torch.zeros(3, 3), "norm.weight": torch.zeros(2), "a.bias": torch.zeros(1)}
    after = {
        "a.weight": torch.diag(torch.tensor([3.0, 2.0, 1.0])),
        "norm.weight": torch.tensor([1.0, 0.0]),
        "a.bias": torch.tensor([1.0]),
    }
    modules, kept = extracted(before, after, rank=1)
    assert modules["unet", "a"].rank == 1
    assert kept.share == pytest.approx(9 / 16)
    assert kept.modules == {("unet", "a"): pytest.approx(9 / 14)}
    assert kept.left_out == dict.fromkeys([("unet", "norm.weight"), ("unet", "a.bias")], pytest.approx(1 / 16))
    assert "12.50% are in 2 tensors that no LoRA can hold" in str(kept)


def test_a_table_of_words_is_left_out_whatever_learned_beside_it():
    """No LoRA file names one; layers that embed the time and the size of a picture are as others."""
    names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    layers = ["time_embedding.linear_1", "add_embedding.linear_2"]
    before = {name: torch.zeros(2, 2) for name in [*names, *(f"{layer}.weight" for layer in layers)]}
    modules, kept = extracted(before, {name: torch.eye(2) for name in before}, rank=2)
    assert modules.keys() == {("unet", layer) for layer in layers}
    assert kept.left_out == {("unet", name): pytest.approx(1 / 4) for name in names}
    assert kept.share == pytest.approx(1 / 2)


def test_equal_and_different_models_are_refused():
    before = {"a.weight": random(3, 3)}
    with pytest.raises(AdapterError, match="there is no adapter to extract"):
        extracted(before, dict(before), rank=1)
    with pytest.raises(AdapterError, match=r"unet/a.weight is \[3, 3\] before and \[4, 3\] after"):
        extracted(before, {"a.weight": random(4, 3)}, rank=1)


def everything(weights):
    return weights


@pytest.mark.parametrize(
    "family", ["sd2", "pocket", *(pytest.param(family, marks=pytest.mark.slow) for family in ("sd1", "sdxl"))]
)
def test_what_was_baked_in_is_extracted_whichever_form_either_model_has(family, tiny_base, adapter_file, tmp_path):
    base, a = tiny_base(family), adapter_file("a", family, choose=everything)
    source, other = (base.folder, base.folder) if family == "pocket" else (base.file, base.folder)
    tuned = tmp_path / ("tuned.safetensors" if source == base.file else "tuned")
    assert run(merge, a, "--into", source, "-o", tuned) == 0
    out = tmp_path / "out.safetensors"
    assert run(extract, tuned, "--base", other, "--rank", 2, "-o", out, "--dtype", "fp32", "--trigger", "sks a") == 0
    wanted, found = read_lora(a).modules, read_lora(out).modules
    assert found.keys() == wanted.keys()
    for target, module in wanted.items():
        assert_close(found[target].delta(), module.delta(), rtol=1e-3, atol=1e-5)
    assert float(read_header(out).metadata["sfumato.kept_energy"]) > 0.99999
    assert read_header(out).metadata["modelspec.trigger_phrase"] == "sks a"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_saving_in_half_precision_rounds_was_not_learned(dtype):
    base = random(24, 16)
    tuned = base.clone()
    tuned[0] += 1
    pairs = [(("unet", "a.weight"), base, base.to(dtype)), (("unet", "b.weight"), base, tuned.to(dtype))]
    modules, kept = extract_pairs(pairs, Budget(rank=1))
    assert modules.keys() == {("unet", "b")}
    assert kept.share > 0.999
    with pytest.raises(AdapterError, match="no weight of a linear layer or a convolution differs"):
        extract_pairs(pairs[:1], Budget(rank=1))
    places = (("text_encoder", "embeddings.position_ids"), torch.arange(77)[None], torch.arange(77)[None].to(dtype))
    assert extract_pairs([*pairs, places], Budget(rank=1))[0].keys() == {("unet", "b")}
    more = [(("unet", "a.weight"), base.to(dtype), base)]  # which a training of more bits may well have learned
    assert extract_pairs(more, Budget(rank=16))[0].keys() == {("unet", "a")}


def test_of_a_model_in_half_precision_what_was_learned_alone_is_extracted(tiny_base, adapter_file, tmp_path):
    base = tiny_base("sd1")
    a = adapter_file("a", "sd1", choose=lambda weights: dict([next(iter(attention(weights).items()))]))
    assert run(merge, a, "--into", base.file, "-o", tmp_path / "tuned.safetensors") == 0
    half = {name: value.half() if value.is_floating_point() else value
            for name, value in load_file(tmp_path / "tuned.safetensors").items()}  # fmt: skip
    save_file(half, tmp_path / "half.safetensors", dict(read_header(base.file).metadata))
    for how in (("--rank", 2), ("--exact",)):
        out = tmp_path / f"{how[0]}.safetensors"
        assert run(extract, tmp_path / "half.safetensors", "--base", base.file, *how, "-o", out) == 0
        assert read_adapter(out).changes.keys() == read_adapter(a).changes.keys()


@pytest.mark.parametrize("kind", [None, "v", "epsilon"])
def test_what_a_base_predicts_is_said_where_the_files_say_it_and_not_made_up(kind, adapter_file, tmp_path):
    """`generate` names the option to draw with by it."""
    file = tmp_path / "a2.safetensors"
    metadata = {"modelspec.prediction_type": kind} if kind else None
    save_file(load_file(adapter_file("a")), file, metadata)
    for program, words in ((merge, []), (resize, ["--rank", 1]), (convert, [])):
        out = tmp_path / f"{program.__name__}.safetensors"
        assert run(program, file, *words, "--family", "pocket", "-o", out) == 0
        assert read_header(out).metadata.get("modelspec.prediction_type") == kind


@pytest.mark.parametrize(
    ("told", "said"), [("v_prediction", "v"), pytest.param(None, "epsilon", marks=pytest.mark.slow)]
)
def test_an_extracted_adapter_says_what_the_bases_scheduler_predicts(told, said, tiny_base, adapter_file, tmp_path):
    """diffusers takes epsilon where a scheduler's config does not say it."""
    base = shutil.copytree(tiny_base("pocket").folder, tmp_path / "base")
    config = json.loads((base / "scheduler/scheduler_config.json").read_text())
    config.pop("prediction_type", None)
    config |= {"prediction_type": told} if told else {}
    (base / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    assert run(merge, adapter_file("a"), "--into", base, "-o", tmp_path / "tuned") == 0
    assert run(extract, tmp_path / "tuned", "--base", base, "--rank", 2, "-o", tmp_path / "e.safetensors") == 0
    assert read_header(tmp_path / "e.safetensors").metadata["modelspec.prediction_type"] == said


def test_a_checkpoint_that_marks_v_prediction_by_an_empty_tensor_is_taken_at_its_word(
    tiny_base, adapter_file, tmp_path
):
    """ComfyUI's CheckpointSave writes it so, and no `prediction_type` of ModelSpec."""
    base, tuned, out = (tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "out"))
    save_file(load_file(tiny_base("sd1").file) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, base)
    assert read_adapter_or_model(base).metadata == {"modelspec.prediction_type": "v_prediction"}
    assert run(merge, adapter_file("a", "sd1"), "--into", base, "-o", tuned) == 0
    assert {"v_pred", "ztsnr"} <= load_file(tuned).keys()
    assert run(extract, tuned, "--base", base, "--rank", 2, "-o", out) == 0
    assert read_header(out).metadata["modelspec.prediction_type"] == "v"


@pytest.mark.slow
def test_a_smaller_or_merged_adapter_names_its_authors_and_licences(adapter_file, tmp_path):
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file, author in zip(files, ("Ann", "Ben"), strict=True):
        save_file(load_file(adapter_file("a")), file, {"modelspec.author": author, "modelspec.license": "cc-by-4.0"})
    for program, words, author in ((resize, [files[0], "--rank", 1], "Ann"), (merge, files, "Ann, Ben")):
        out = tmp_path / f"{program.__name__}.safetensors"
        assert run(program, *words, "--family", "pocket", "-o", out) == 0
        metadata = read_header(out).metadata
        assert (metadata["modelspec.author"], metadata["modelspec.license"]) == (author, "cc-by-4.0")


def test_parts_are_chosen(tiny_base, adapter_file, tmp_path):
    base, a = tiny_base("pocket"), adapter_file("a")
    run(merge, a, "--into", base.folder, "-o", tmp_path / "tuned")
    out = tmp_path / "out.safetensors"
    assert run(extract, tmp_path / "tuned", "--base", base.folder, "--rank", 2, "-o", out, "--parts", "unet") == 0
    assert {part for part, _ in read_lora(out).modules} == {"unet"}


@pytest.mark.parametrize(("which", "key"), [("bias", "diff_b"), ("weight", "diff")])
def test_what_was_learned_in_a_bias_or_a_weight_alone_is_extracted(which, key, tiny_base, tmp_path):
    base, tuned, out = tiny_base("sd1").file, tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    tensors = load_file(base)
    tensors[f"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.{which}"] += 1
    save_file(tensors, tuned, dict(read_header(base).metadata))
    assert run(extract, tuned, "--base", base, "--exact", "-o", out) == 0
    found = load_file(out)
    ((name, delta),) = ((name, tensor) for name, tensor in found.items() if tensor.any())
    assert name.endswith(f"attn2_to_out_0.{key}")
    assert_close(delta, torch.ones_like(delta))
    assert which == "bias" or list(found) == [name]


def test_another_base_is_refused(tiny_base, tmp_path, capsys):
    words = (tiny_base("sd1").folder, "--base", tiny_base("sd2").folder, "--rank", 2, "-o", tmp_path / "o.safetensors")
    assert run(extract, *words) == 2
    assert "is SD 1.x, base is SD 2.x" in capsys.readouterr().err


def test_resize_keeps_the_leading_part_and_says_how_much(adapter_file, tmp_path, capsys):
    a, out = adapter_file("a", rank=4), tmp_path / "small.safetensors"
    assert run(resize, a, "--rank", 2, "-o", out) == 0
    share = float(capsys.readouterr().err.split("keeps ")[1].split("%")[0]) / 100
    small, large = read_lora(out).modules, read_lora(a).modules
    assert {module.rank for module in small.values()} == {2}
    lost = sum(float((small[t].delta() - large[t].delta()).square().sum()) for t in large)
    assert share == pytest.approx(1 - lost / sum(float(m.delta().square().sum()) for m in large.values()), abs=1e-4)


def test_resize_keeps_what_the_file_says_of_its_training(adapter_file, tmp_path):
    """Of sd-scripts' files the tags are the one record of the words."""
    told = {"ss_tag_frequency": '{"10_dog":{"sks dog":9}}', "ss_seed": "42", "ss_num_train_images": "9"}
    told |= {"ss_base_model_version": "sd_v2_v", "ss_network_dim": "2"}
    old = tmp_path / "old.safetensors"
    save_file(load_file(adapter_file("a", rank=4)), old, told)
    assert run(resize, old, "--rank", 1, "-o", tmp_path / "small.safetensors", "--family", "sd2") == 0
    metadata = read_header(tmp_path / "small.safetensors").metadata
    kept = ("ss_tag_frequency", "ss_seed", "ss_num_train_images", "ss_base_model_version")
    assert {key: metadata[key] for key in kept} == {key: told[key] for key in kept}
    assert (metadata["ss_network_dim"], metadata["modelspec.architecture"]) == ("1", "stable-diffusion-v2-768-v/lora")


def test_resize_refuses_what_is_no_lora(tiny_base, adapter_file, tmp_path, capsys):
    words = ("--bake", "diff", "--base", tiny_base("pocket").folder, "-o", tmp_path / "diff.safetensors")
    a = adapter_file("a")
    assert run(convert, a, *words) == 0
    name = next(name for name in load_file(a) if name.endswith(".alpha")).removesuffix(".alpha")
    mixed = {key: tensor for key, tensor in load_file(a).items() if not key.startswith(f"{name}.")}
    mixed[f"{name}.diff"] = load_file(tmp_path / "diff.safetensors")[f"{name}.diff"]
    save_file(mixed, tmp_path / "mixed.safetensors", dict(read_header(a).metadata))
    assert run(resize, tmp_path / "mixed.safetensors", "--rank", 1, "-o", tmp_path / "small.safetensors") == 2
    assert "modules are no LoRA. Make it one first: sfumato convert --bake lora." in capsys.readouterr().err


@pytest.mark.parametrize(("program", "words"), [(resize, ("--rank", 1)), (convert, ())])
def test_what_diffusers_says_of_scales_that_are_folded_in_is_left_out(program, words, adapter_file, tmp_path):
    old, out = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file(load_file(adapter_file("a", rank=2)), old, {"lora_adapter_metadata": "{}", "ss_seed": "42"})
    assert run(program, old, *words, "-o", out, "--family", "pocket") == 0
    metadata = read_header(out).metadata
    assert ("lora_adapter_metadata" in metadata, metadata["ss_seed"]) == (False, "42")


def test_resize_tells_what_its_file_has_no_room_for(adapter_file, tmp_path, capsys):
    old = tmp_path / "old.safetensors"
    save_file(load_file(adapter_file("a", rank=4)), old, {"ss_tag_frequency": "x" * 2_000_000})
    assert run(resize, old, "--rank", 1, "-o", tmp_path / "small.safetensors", "--family", "pocket") == 0
    assert "small.safetensors: ss_tag_frequency left out of its metadata" in capsys.readouterr().err


def test_resize_by_energy_and_to_a_larger_rank_changes_nothing_that_matters(adapter_file, tmp_path):
    a, out = adapter_file("a", rank=3), tmp_path / "small.safetensors"
    assert run(resize, a, "--rank", 64, "-o", out) == 0
    small, large = read_lora(out).modules, read_lora(a).modules
    assert {module.rank for module in small.values()} == {3}
    for target, module in large.items():
        assert_close(small[target].delta(), module.delta(), rtol=1e-4, atol=1e-6)
    assert run(resize, a, "--keep-energy", 0.5, "-o", tmp_path / "smaller.safetensors") == 0
    for target, module in read_lora(tmp_path / "smaller.safetensors").modules.items():
        energy = torch.linalg.svdvals(large[target].delta().flatten(1)).square().cumsum(0)
        assert module.rank == 1 + int((energy < 0.5 * energy[-1]).sum()) < 3


@pytest.mark.parametrize(("program", "words"), [(merge, ()), (resize, ("--rank", 1)), (convert, ())])
def test_an_adapter_of_zeros_is_told(program, words, adapter_file, tmp_path, capsys):
    a, zero = adapter_file("a"), tmp_path / "zero.safetensors"
    save_file({name: t * ("lora_up" not in name) for name, t in load_file(a).items()}, zero)
    said = "all of its changes are zero, so it draws as the base does"
    assert run(program, a, *words, "-o", tmp_path / "of-a.safetensors", "--family", "pocket") == 0
    assert said not in capsys.readouterr().err
    assert run(program, zero, *words, "-o", tmp_path / "of-zero.safetensors", "--family", "pocket") == 0
    assert f"zero: {said}" in capsys.readouterr().err


def test_resize_does_not_lose_a_bias_in_silence(adapter_file, tmp_path, capsys):
    a = adapter_file("a", rank=2)
    tensors = load_file(a)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    tensors[name.replace("lora_up.weight", "diff_b")] = torch.ones(len(tensors[name]))
    save_file(tensors, tmp_path / "biased.safetensors", dict(read_header(a).metadata))
    assert run(resize, tmp_path / "biased.safetensors", "--rank", 1, "-o", tmp_path / "small.safetensors") == 2
    assert "change a bias" in capsys.readouterr().err
    assert not (tmp_path / "small.safetensors").exists()


def test_resize_keeps_new_words(adapter_file, tmp_path):
    a = add_words(adapter_file("a"), {"<cat>": {"text_encoder": torch.ones(2, 8)}})
    assert run(resize, a, "--rank", 1, "-o", tmp_path / "small.safetensors") == 0
    assert list(read_adapter(tmp_path / "small.safetensors").embeddings) == ["<cat>"]


@pytest.mark.parametrize("program", [extract, resize])
def test_how_much_to_keep_has_to_be_said(program, adapter_file, tmp_path, capsys):
    words = ["--base", "pocket"] if program is extract else []
    assert run(program, adapter_file("a"), *words, "-o", tmp_path / "o.safetensors") == 2
    assert "say how much to keep" in capsys.readouterr().err


@pytest.mark.parametrize("layer", ["q_proj", "out_proj"])
def test_what_diffusers_does_not_read_is_told_of_every_file(layer, tiny_base, tmp_path, monkeypatch, capsys):
    """Of a text encoder without out_proj, see tests/merging/test_convert.py."""
    monkeypatch.chdir(tmp_path)
    base = tiny_base("pocket")
    weights = {target: weight for target, weight in base.weights().items() if target[1].endswith(layer)}
    write_lora("a.safetensors", random_modules(weights, 1), family="pocket")
    assert run(merge, "a.safetensors", "--into", base.folder, "-o", "tuned") == 0
    for program, *words in (
        (merge, "a.safetensors:0.5", "--family", "pocket"),
        (resize, "a.safetensors", "--rank", 1, "--family", "pocket"),
        (extract, "tuned", "--base", base.folder, "--rank", 2, "--parts", "text_encoder"),
    ):
        capsys.readouterr()
        assert run(program, *words, "-o", "b.safetensors") == 0
        line = (
            "b.safetensors: diffusers refuses a file that changes no out_proj of text_encoder; for diffusers, "
            "sfumato convert b.safetensors --to diffusers -o OTHER.safetensors"
        )
        assert (line in capsys.readouterr().err.splitlines()) == (layer == "q_proj")
        os.remove("b.safetensors")


def test_a_model_that_is_read_is_not_written_over_whatever_is_said(tiny_base, adapter_file, tmp_path, capsys):
    base, tuned = (shutil.copy(tiny_base("sd1").file, tmp_path / f"{name}.safetensors") for name in ("base", "tuned"))
    (tmp_path / "link.safetensors").hardlink_to(base)
    a = adapter_file("a", "sd1")
    before = [file.read_bytes() for file in (base, tuned)]
    commands = [
        (extract, tuned, "--base", base, "--rank", 2, "-o", tuned),
        (extract, tuned, "--base", base, "--rank", 2, "-o", tmp_path / "link.safetensors"),
        (convert, a, "--bake", "diff", "--base", base, "-o", base),
        (merge, a, "--base", base, "-o", base),
        (merge, f"{tuned}:0.4", "--into", base, "-o", tuned),
        (merge, a, "--into", base, "-o", base),
    ]
    for program, *words in commands:
        assert run(program, *words, "--overwrite") == 2
        assert "is what it would be made of" in capsys.readouterr().err
    assert [file.read_bytes() for file in (base, tuned)] == before
    assert run(merge, a, "-o", a, "--overwrite") == 0  # an adapter of one's own may make room for the next
