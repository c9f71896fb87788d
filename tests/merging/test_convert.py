"""`sfumato convert` and `sfumato verify`: other grammars, and whether it is still the same adapter."""

import itertools
import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from sfumato.pipelines import convert, verify
from torch.testing import assert_close

from sfumato.cli import guarded
from sfumato.files.adapter_file import read_adapter
from sfumato.files.fingerprint import FINGERPRINT_KEY
from sfumato.files.header import read_header
from sfumato.files.kinds import LoraModule
from sfumato.files.save import write_tensors
from sfumato.files.writing.peft import write_peft
from tests.bundles import add_words

FORMS = {"kohya": "k.safetensors", "diffusers": "d.safetensors", "peft": "p"}


def run(program, *words):
    return guarded(program.main, [str(word) for word in words])


@pytest.mark.parametrize("family", ["pocket", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_any_form_into_any_other_is_the_same_adapter(family, adapter_file, tmp_path, capsys):
    paths = {"kohya": adapter_file("a", family)}
    for to in ("diffusers", "peft"):
        paths[to] = tmp_path / FORMS[to]
        assert run(convert, paths["kohya"], "--to", to, "-o", paths[to]) == 0
    for (origin, path), to in itertools.product(paths.items(), FORMS):
        out = tmp_path / f"{origin}-{FORMS[to]}"
        assert run(convert, path, "--to", to, "-o", out, "--family", family) == 0
        assert run(verify, out, "--against", paths["kohya"]) == 0
        assert run(verify, out) == 0
    assert capsys.readouterr().err.count("; exact") == 11


@pytest.mark.parametrize(
    ("layers", "to", "told", "read"),
    [
        (("q_proj", "v_proj"), "kohya", "refuses a file that changes no out_proj of text_encoder", 0),
        (("q_proj", "v_proj"), "diffusers", None, 6),
        (("q_proj", "fc1"), "kohya", "leaves out 3 of 6 modules of text_encoder, which changes no out_proj", 3),
        (("q_proj", "fc1"), "diffusers", None, 6),
        (("q_proj", "out_proj"), "kohya", None, 6),
        (("fc1",), "kohya", None, 3),
        (("fc1",), "diffusers", "refuses a file in its own grammar that changes no attention of text_encoder", 0),
    ],
)
def test_what_diffusers_does_not_read_of_a_text_encoder_is_told(
    layers, to, told, read, pocket_folder, tmp_path, capsys
):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pocket_folder)
    modules = {
        ("text_encoder", path): LoraModule(torch.ones(1, layer.in_features), torch.ones(layer.out_features, 1), 1.0)
        for path, layer in pipe.text_encoder.named_modules()
        if path.endswith(layers)
    }
    write_peft(tmp_path / "p", modules, family="pocket")
    assert run(convert, tmp_path / "p", "--to", to, "-o", tmp_path / "c.safetensors", "--family", "pocket") == 0
    line = (
        f"c.safetensors: diffusers {told}; for diffusers, give --to {'kohya' if to == 'diffusers' else 'diffusers'}\n"
    )
    said = capsys.readouterr().err
    assert line in said if told else "diffusers " not in said.replace("for diffusers;", "")
    with nullcontext() if read else pytest.raises(ValueError, match="state dict type"):
        pipe.load_lora_weights(str(tmp_path / "c.safetensors"))
        assert sum(hasattr(layer, "lora_A") for layer in pipe.text_encoder.modules()) == read


def test_a_converted_file_keeps_what_the_file_said(adapter_file, tmp_path):
    a = adapter_file("a")
    run(convert, a, "--to", "diffusers", "-o", tmp_path / "d.safetensors")
    run(convert, tmp_path / "d.safetensors", "-o", tmp_path / "k.safetensors")
    before, after = (read_header(path).metadata for path in (a, tmp_path / "k.safetensors"))
    for key in ("modelspec.title", "modelspec.trigger_phrase", "ss_base_model_version", "sfumato.trigger"):
        assert after[key] == before[key]
    assert after["sfumato.fingerprint"] == before["sfumato.fingerprint"]


@pytest.mark.parametrize(
    "told",
    [{"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, {"ss_base_model_version": "sdxl_base_v1-0"}],
    ids=["modelspec", "kohya"],
)
def test_a_file_that_tells_its_family_otherwise_tells_a1111_as_well(told, adapter_file, tmp_path):
    """OneTrainer's have ModelSpec's keys alone; without kohya's, A1111 takes an adapter for one of SD 1."""
    a, other = adapter_file("a", "sdxl"), tmp_path / "other.safetensors"
    save_file(load_file(a), other, told)
    assert run(convert, other, "-o", tmp_path / "k.safetensors") == 0
    found = read_header(tmp_path / "k.safetensors").metadata
    assert found["ss_base_model_version"].startswith("sdxl_")
    assert "modelspec.title" not in found


def test_a_half_is_the_same_adapter_and_half_of_one_is_not(adapter_file, tmp_path, capsys):
    a = adapter_file("a")
    assert run(convert, a, "-o", tmp_path / "half.safetensors", "--dtype", "bf16") == 0
    assert run(verify, tmp_path / "half.safetensors", "--against", a) == 0
    assert run(verify, tmp_path / "half.safetensors", "--against", a, "--tolerance", 1e-5) == 1
    error = capsys.readouterr().err
    assert "half.safetensors: differs against a.safetensors: relative error 0.00" in error


def rewrite(path, out, change):
    """The file with its tensors changed by somebody who leaves the metadata."""
    tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, out, dict(read_header(path).metadata))
    return out


def test_changed_bytes_do_not_pass(adapter_file, tmp_path, capsys):
    a = adapter_file("a")
    out = rewrite(a, tmp_path / "b.safetensors", lambda name, t: t * 1.5 if name.endswith("lora_up.weight") else t)
    assert run(verify, out) == 1
    assert "they were changed after it was written" in capsys.readouterr().err
    tensors = load_file(out)
    metadata = {key: text for key, text in read_header(out).metadata.items() if "hash" not in key}
    write_tensors(tmp_path / "c.safetensors", tensors, metadata)
    assert run(verify, tmp_path / "c.safetensors") == 1
    assert "differs against its own fingerprint: relative error 0." in capsys.readouterr().err


def test_a_file_without_a_fingerprint_is_checked_for_what_it_has(adapter_file, tmp_path, capsys):
    a = adapter_file("a")
    save_file(load_file(a), tmp_path / "b.safetensors")
    assert run(verify, tmp_path / "b.safetensors") == 0
    assert "whole and finite; it states no fingerprint" in capsys.readouterr().out


def test_what_is_not_finite_or_no_adapter_is_an_error(adapter_file, tmp_path, capsys):
    a = adapter_file("a")
    rewrite(a, tmp_path / "b.safetensors", lambda _, t: t * float("nan"))
    assert run(verify, tmp_path / "b.safetensors") == 2
    assert "hold NaN or Inf" in capsys.readouterr().err


def test_a_fingerprint_that_cannot_be_read_is_a_difference(adapter_file, tmp_path, capsys):
    a = adapter_file("a")
    save_file(load_file(a), tmp_path / "b.safetensors", {FINGERPRINT_KEY: "[]"})
    assert run(verify, tmp_path / "b.safetensors") == 1
    assert "b.safetensors: " in capsys.readouterr().err


@pytest.mark.parametrize("tolerance", ["0", "nan", "1", "inf"])
def test_a_tolerance_that_nothing_or_everything_meets_is_refused(tolerance, adapter_file, capsys):
    assert run(verify, adapter_file("a"), "--tolerance", tolerance) == 2
    assert f"--tolerance {tolerance}: wanted above 0 and below 1" in capsys.readouterr().err


def test_json_tells_the_figures(adapter_file, capsys):
    a = adapter_file("a")
    assert run(verify, a, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kinds"] == {"LoRA": found["modules"]}
    assert found["rms"] < 1e-6


@pytest.fixture
def loha(tiny_base, tmp_path):
    """A LoHa of pocket's cross-attention keys, as LyCORIS names it."""
    draws = torch.Generator().manual_seed(0)
    tensors = {}
    for (part, path), weight in tiny_base("pocket").weights().items():
        if part == "unet" and path.endswith("attn2.to_k"):
            name = f"lora_unet_{path.replace('.', '_')}"
            for half in ("w1", "w2"):
                tensors[f"{name}.hada_{half}_a"] = torch.randn(weight.shape[0], 2, generator=draws)
                tensors[f"{name}.hada_{half}_b"] = torch.randn(2, weight.shape[1], generator=draws)
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return write_tensors(tmp_path / "loha.safetensors", tensors, {"ss_base_model_version": "sfumato_pocket"})


READERS = {"kohya": "the readers of kohya's names", "diffusers": "diffusers", "peft": "peft"}
HALVES = {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2)}
OTHER_KINDS = {
    "DoRA": HALVES | {"dora_scale": (8, 1)},
    "LoHa": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
    "LoKr": {"lokr_w1": (2, 2), "lokr_w2": (4, 4)},
    "IA3": {"weight": (8,), "on_input": ()},
    "OFT": {"oft_blocks": (2, 4, 4), "alpha": ()},
    "BOFT": {"oft_blocks": (1, 2, 4, 4), "alpha": ()},
    "GLoRA": {"a1.weight": (8, 2), "a2.weight": (2, 8), "b1.weight": (8, 2), "b2.weight": (2, 8), "alpha": ()},
    "difference": {"diff": (8, 8)},
}
QUERY_PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_another_kind_is_refused_until_baking_is_asked_for(kind, to, tmp_path, capsys):
    tensors = {f"{QUERY}.{name}": torch.ones(shape) for name, shape in OTHER_KINDS[kind].items()}
    file = write_tensors(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    assert run(convert, file, "--to", to, "-o", tmp_path / FORMS[to]) == 2
    assert f"holds {kind}, which {READERS[to]} cannot all read. Bake it" in capsys.readouterr().err
    assert not (tmp_path / FORMS[to]).exists()


def test_a_bias_goes_to_diffusers_and_peft_and_is_refused_to_the_others(tmp_path, capsys):
    tensors = {f"{QUERY}.{name}": torch.ones(shape) for name, shape in (HALVES | {"diff_b": (8,)}).items()}
    file = write_tensors(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    for to in ("diffusers", "peft"):
        assert run(convert, file, "--to", to, "-o", tmp_path / FORMS[to]) == 0
        (change,) = read_adapter(tmp_path / FORMS[to]).changes.values()
        assert torch.equal(change.bias_delta, torch.ones(8))
    assert run(convert, file, "-o", tmp_path / "k.safetensors") == 2
    assert "bias" in capsys.readouterr().err
    assert not (tmp_path / "k.safetensors").exists()


def test_the_zero_biases_of_diffusers_form_are_none(tmp_path):
    """Where one module has a bias all have one there; kohya's grammar holds those that are of zeros."""
    tensors = {f"{QUERY}.{name}": torch.ones(shape) for name, shape in (HALVES | {"diff_b": (8,)}).items()}
    tensors["lora_unet_mid_block_attentions_0_proj_in.diff_b"] = torch.zeros(8)
    for name, shape in HALVES.items():
        tensors[f"lora_unet_mid_block_attentions_0_proj_in.{name}"] = torch.ones(shape)
    file = write_tensors(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    changes = read_adapter(file).changes
    assert sorted(change.bias_delta is not None for change in changes.values()) == [False, True]


def test_peft_s_folder_does_not_state_the_hashes_of_the_file_it_was_made_of(adapter_file, tmp_path):
    a = adapter_file("a")
    assert "sshs_model_hash" in read_header(a).metadata
    assert run(convert, a, "--to", "peft", "-o", tmp_path / "peft") == 0
    for file in (tmp_path / "peft").rglob("*.safetensors"):
        assert not [key for key in read_header(file).metadata if "hash" in key]


@pytest.mark.parametrize("to", FORMS)
def test_a_difference_of_a_norm_is_refused_as_a_lora_and_exact_as_a_difference(to, tiny_base, tmp_path, capsys):
    base, name = tiny_base("sd1"), "lora_unet_mid_block_resnets_0_norm1"
    norm = base.parts()["unet"].get_submodule("mid_block.resnets.0.norm1")
    value = torch.arange(float(len(norm.weight)))
    tensors = {f"{name}.w_norm": value, f"{name}.b_norm": -value}
    file = write_tensors(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    words = ("--bake", "lora", "--rank", 4, "--base", base.folder)
    assert run(convert, file, "--to", to, "-o", tmp_path / FORMS[to], *words) == 2
    assert "which a LoRA cannot" in capsys.readouterr().err
    if to == "kohya":
        out = tmp_path / "diff.safetensors"
        assert run(convert, file, "-o", out, "--bake", "diff", "--base", base.folder) == 0
        (change,) = read_adapter(out).changes.values()
        assert torch.equal(change.value, value)
        assert torch.equal(change.bias_delta, -value)


@pytest.mark.parametrize(("name", "told"), [("lora_te_text_model_encoder_layers_0_layer_norm1", True), (QUERY, False)])
def test_norms_that_some_clients_leave_out_are_told(name, told, tiny_base, tmp_path, capsys):
    base = tiny_base("sd1")
    part, path = ("text_encoder", "encoder.layers.0.layer_norm1") if told else ("unet", QUERY_PATH)
    shape = base.parts()[part].get_submodule(path).weight.shape
    tensors = {f"{name}.diff": torch.ones(shape)}
    file = write_tensors(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sd_v1"})
    words = ("-o", tmp_path / "k.safetensors", "--bake", "diff", "--base", base.folder)
    assert run(convert, file, *words) == 0
    assert ("1 of them are norms of text encoders" in capsys.readouterr().err) == told


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_another_kind_is_baked_into_a_lora_with_the_error_told(to, loha, tiny_base, tmp_path, capsys):
    base, out = tiny_base("pocket"), tmp_path / FORMS[to]
    words = ("--to", to, "-o", out, "--bake", "lora", "--base", base.folder)
    assert run(convert, loha, *words, "--rank", 2) == 0
    told = float(capsys.readouterr().err.split("relative error ")[1])
    weights, made = base.weights(), read_adapter(out).changes
    lost = total = 0.0
    for target, change in read_adapter(loha).changes.items():
        wanted = change.delta(weights[target])
        lost += float((made[target].low_rank().delta() - wanted).square().sum())
        total += float(wanted.square().sum())
    assert told == pytest.approx((lost / total) ** 0.5, rel=0.01)


def test_a_rank_that_suffices_bakes_exactly(loha, tiny_base, tmp_path, capsys):
    base, out = tiny_base("pocket"), tmp_path / "k.safetensors"
    assert run(convert, loha, "-o", out, "--bake", "lora", "--keep-energy", 1, "--base", base.folder) == 0
    assert "; exact" in capsys.readouterr().err
    assert run(verify, out, "--against", loha, "--base", base.folder) == 0
    assert max(change.rank for change in read_adapter(out).changes.values()) == 4  # the product of the two ranks


def test_a_kind_that_tells_its_shape_needs_no_base(loha, tmp_path, capsys):
    out = tmp_path / "k.safetensors"
    assert run(convert, loha, "-o", out, "--bake", "lora", "--keep-energy", 1) == 0
    assert "; exact" in capsys.readouterr().err
    assert run(verify, out, "--against", loha) == 0


def test_full_differences_are_exact(loha, tiny_base, tmp_path):
    base, out = tiny_base("pocket"), tmp_path / "diff.safetensors"
    assert run(convert, loha, "-o", out, "--bake", "diff", "--base", base.folder) == 0
    weights, wanted = base.weights(), read_adapter(loha).changes
    for target, change in read_adapter(out).changes.items():
        assert_close(change.delta(weights[target]), wanted[target].delta(weights[target]))


def test_full_differences_are_written_in_the_format_that_was_asked_for(adapter_file, tiny_base, tmp_path, capsys):
    words = ("-o", tmp_path / "diff.safetensors", "--bake", "diff", "--base", tiny_base("pocket").folder)
    assert run(convert, adapter_file("a"), *words, "--dtype", "bf16") == 0
    assert "rounded to bf16; read by" in capsys.readouterr().err
    assert {tensor.dtype for tensor in load_file(tmp_path / "diff.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_full_differences_are_for_kohyas_readers_alone(to, adapter_file, tiny_base, tmp_path, capsys):
    words = ("--to", to, "-o", tmp_path / FORMS[to], "--bake", "diff", "--base", tiny_base("pocket").folder)
    assert run(convert, adapter_file("a"), *words) == 2
    assert "and --to kohya: nobody else reads it" in capsys.readouterr().err


def test_new_words_go_to_kohya_and_are_refused_to_the_others(adapter_file, tmp_path, capsys):
    a = add_words(adapter_file("a"), {"<cat>": {"text_encoder": torch.ones(2, 8)}})
    assert run(convert, a, "-o", tmp_path / FORMS["kohya"]) == 0
    assert torch.equal(read_adapter(tmp_path / FORMS["kohya"]).embeddings["<cat>"]["text_encoder"], torch.ones(2, 8))
    for to in ("diffusers", "peft"):
        assert run(convert, a, "--to", to, "-o", tmp_path / FORMS[to]) == 2
        assert "'<cat>'), which would be lost" in capsys.readouterr().err
        assert run(convert, a, "--to", to, "-o", tmp_path / FORMS[to], "--partial") == 0


@pytest.mark.parametrize("to", FORMS)
def test_more_metadata_than_are_written_are_left_out_and_told(to, adapter_file, tmp_path, capsys):
    a, out = adapter_file("a"), tmp_path / FORMS[to]
    told = {**read_header(a).metadata, "ss_tag_frequency": "x" * 200_000, "modelspec.thumbnail": "y" * 40_000}
    file = write_tensors(tmp_path / "big.safetensors", load_file(a), told)
    assert run(convert, file, "--to", to, "-o", out) == 0
    assert f"{out.name}: ss_tag_frequency left out of its metadata" in capsys.readouterr().err
    assert run(verify, out, "--against", a) == 0
    written = next(out.rglob("*.safetensors")) if to == "peft" else out
    assert read_header(written).metadata.keys() >= {"modelspec.thumbnail", "sfumato.trigger"}


def test_a_family_that_the_file_denies_is_refused(adapter_file, tmp_path, capsys):
    a = adapter_file("a", "sd1")
    assert run(convert, a, "-o", tmp_path / "k.safetensors", "--family", "sdxl") == 2
    assert "a.safetensors: is for SD 1.x, --family says SDXL. Leave --family out." in capsys.readouterr().err
    assert run(convert, a, "-o", tmp_path / "k.safetensors", "--family", "sd1") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "x.safetensors", "--base", "pocket"], "nothing is taken on it without --bake"),
        (["-o", "x.safetensors", "--bake", "diff", "--base", "pocket", "--rank", "2"], "belong to --bake lora"),
        (["-o", "x"], "wanted a .safetensors file"),
        (["-o", "x.safetensors", "--to", "peft"], "wanted a folder"),
        (["-o", "x.safetensors", "--rank", "2"], "belong to --bake lora"),
        (["-o", "x.safetensors", "--bake", "diff"], "--bake diff wants --base"),
    ],
)
def test_what_cannot_be_converted_is_one_line(words, message, loha, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(convert, loha, *words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["loha.safetensors"]
