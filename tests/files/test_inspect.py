"""`sfumato inspect`: what it says of a file, and that it says it without torch."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sfumato.pipelines.inspect_file import main

from sfumato.files.adapter_file import read_adapter
from sfumato.files.inspect import Block, Inspection, inspect_file, render
from sfumato.files.kinds import LoraModule
from sfumato.files.metadata import Description, Sampling, describe, short_hash
from sfumato.files.module_names import block_of
from sfumato.files.writing.kohya import write_lora
from tests.files.said import TO_K


def test_a_lora_is_described_by_its_shapes_ranks_and_words(tiny, lora, tmp_path):
    modules = lora(tiny("sdxl").attention(), ranks=(2,), alphas=(3.0,))
    metadata = describe(Description("line", "sdxl", base="sdxl-base", trigger=["zwx style"]))
    found = inspect_file(write_lora(tmp_path / "a.safetensors", modules, family="sdxl", metadata=metadata))
    assert (found.kind, found.family, found.says, found.spelling) == ("LoRA", "sdxl", None, ["kohya sgm"])
    assert (found.modules, found.ranks, found.alphas) == (560, {"2": 560}, {"3": 560})
    assert found.targets["unet attn2.to_k"] == 70
    assert (found.trigger, found.base, found.hash_holds) == (["zwx style"], "sdxl-base", True)
    assert [block.name for block in found.blocks[:2]] == ["down_blocks.1.attentions.0", "down_blocks.1.attentions.1"]
    assert sum(block.modules for block in found.blocks) == 560
    assert found.to_dict()["metadata"]["modelspec.title"] == "line"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_are_those_of_the_updates(dtype, tiny, lora, tmp_path):
    modules = lora(tiny("pocket").layers())
    modules = {t: replace(m, down=m.down.to(dtype), up=m.up.to(dtype)) for t, m in modules.items()}
    norms = torch.stack([module.delta().double().norm() for module in modules.values()])
    found = inspect_file(write_lora(tmp_path / "a.safetensors", modules, family="pocket", dtype=dtype))
    assert found.norm == pytest.approx(float(norms.norm()), rel=1e-2 if dtype == torch.bfloat16 else 1e-3)
    assert sum(block.norm**2 for block in found.blocks) == pytest.approx(found.norm**2)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_norms_of_fp8_are_those_of_the_updates(dtype, two_modules, tmp_path):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    module = next(iter(two_modules.values()))
    down, up = every[every.float().isfinite()].reshape(2, -1), module.up.to(dtype)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors")
    found = inspect_file(tmp_path / "a.safetensors")
    assert found.norm == pytest.approx(float((up.float() @ down.float()).norm()), rel=1e-6)


def test_a_norm_that_cannot_be_told_is_said(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"
    tensors = {f"{name}k.lora_{half}.weight": torch.ones(2, 2) for half in ("down", "up")}
    odd = {f"{name}q.lora_{half}.weight": torch.ones(2, 2, dtype=torch.bool) for half in ("down", "up")}
    save_file(tensors | odd, tmp_path / "a.safetensors")
    assert "\nnorm       4, of 1 of 2 modules\n" in render(inspect_file(tmp_path / "a.safetensors"))
    save_file(odd, tmp_path / "b.safetensors")
    assert "\nnorm       cannot be told: tensors of" in render(inspect_file(tmp_path / "b.safetensors"))


def test_a_tucker_norm_is_that_of_its_update(tmp_path):
    g = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(*s, generator=g) for s in [(2, 4, 1, 1), (2, 2, 3, 3), (5, 2, 1, 1)])
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up},
        tmp_path / "a.safetensors",
    )
    wanted = float(LoraModule(down, up, 2.0, mid).delta().norm())
    assert inspect_file(tmp_path / "a.safetensors").norm == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_an_alpha_that_is_a_whole_number_counts(dtype, two_modules, tmp_path):
    file = write_lora(tmp_path / "a.safetensors", two_modules, family="sd1")
    tensors = load_file(file)
    save_file({n: t.to(dtype) if n.endswith(".alpha") else t for n, t in tensors.items()}, tmp_path / "b.safetensors")
    known, found = inspect_file(file), inspect_file(tmp_path / "b.safetensors")
    assert found.alphas == known.alphas != {}
    assert found.norm == known.norm


def test_a_family_that_the_metadata_denies_is_shown_with_both(two_modules, tmp_path):
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    found = inspect_file(write_lora(tmp_path / "a.safetensors", two_modules, family="sd1", metadata=metadata))
    assert (found.family, found.says) == ("sd1", "sdxl")
    assert "family     SD 1.x, but its metadata says SDXL" in render(found)


def test_changed_bytes_are_seen(two_modules, tmp_path):
    path = write_lora(tmp_path / "a.safetensors", two_modules, family="sd1")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert inspect_file(path).hash_holds is False


def test_what_cannot_be_applied_is_reported_and_not_refused(two_modules, tmp_path):
    tensors = load_file(write_lora(tmp_path / "a.safetensors", two_modules, family="sd1"))
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    del tensors[f"{key}.lora_up.weight"]
    tensors[f"{key}.lora_down.weight"][0, 0] = float("nan")
    save_file(tensors | {"odd": torch.ones(1)}, tmp_path / "b.safetensors")
    found = inspect_file(tmp_path / "b.safetensors")
    assert found.nonfinite == [f"{key}.lora_down.weight"]
    assert found.unknown == ["odd"]
    assert found.incomplete == ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert "NaN or Inf 1, first" in render(found)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("first_stage_model.x", "a full checkpoint"),
        ("emb_params", "a textual inversion"),
        ("a.b", "no adapter that is known"),
        ("lora_unet_conv_in.hada_w1_a", "LoHa"),
    ],
)
def test_other_kinds_are_named(name, kind, tmp_path):
    save_file({name: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    found = inspect_file(tmp_path / "a.safetensors")
    assert (found.kind, found.norm) == (kind, None)
    assert f"kind       {kind}" in render(found)


def test_control_characters_of_a_file_do_not_reach_the_terminal(two_modules, tmp_path):
    metadata = {"ss_sd_model_name": "\x1b[2Jbase", "modelspec.trigger_phrase": "a\x07b"}
    text = render(inspect_file(write_lora(tmp_path / "a.safetensors", two_modules, family="sd1", metadata=metadata)))
    assert text.replace("\n", "").isprintable()


def run(arguments, code):
    program = f"import sys\nfrom sfumato.cli import main\ncode = main({arguments!r})\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)


def test_inspecting_loads_no_torch_and_prints_json_alone(two_modules, tmp_path):
    path = write_lora(tmp_path / "a.safetensors", two_modules, family="sd1")
    done = run(["inspect", str(path), "--json"], "assert 'torch' not in sys.modules; sys.exit(code)")
    assert json.loads(done.stdout)["ranks"] == {"2": 2}
    assert done.stderr == ""


def test_json_has_null_for_a_norm_that_is_no_number(two_modules, tmp_path, capsys):
    tensors = dict(load_file(write_lora(tmp_path / "a.safetensors", two_modules, family="sd1")))
    tensors[max(tensors)].fill_(float("nan"))
    save_file(tensors, tmp_path / "b.safetensors")
    assert main([str(tmp_path / "b.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (found["norm"], found["blocks"][0]["norm"]) == (None, None)


def test_a_wrong_file_is_one_line_on_stderr_and_code_2(tmp_path):
    (tmp_path / "page.safetensors").write_text("<html>")
    done = run(["inspect", str(tmp_path / "page.safetensors")], "assert code == 2")
    assert done.stdout == ""
    assert done.stderr.startswith("sfumato: page.safetensors: this is a web page saved under a weight file's name")
    assert done.stderr.count("\n") == 1


def one_of_each_kind():
    g = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=g)

    pair = {"lora_down.weight": noise(2, 8), "lora_up.weight": noise(6, 2)}
    return {
        "LoRA": pair | {"alpha": torch.tensor(3.0)},
        "LoHa": {"hada_w1_a": noise(6, 2), "hada_w1_b": noise(2, 8), "hada_w2_a": noise(6, 2), "hada_w2_b": noise(2, 8)}
        | {"alpha": torch.tensor(3.0)},
        "LoKr": {
            "lokr_w1": noise(2, 2),
            "lokr_w2_a": noise(3, 1),
            "lokr_w2_b": noise(1, 4),
            "alpha": torch.tensor(3.0),
        },
        "difference": {"diff": noise(6, 8), "diff_b": noise(6)},
        "DoRA": pair | {"dora_scale": noise(6, 1)},
        "OFT": {"oft_blocks": noise(2, 3, 3), "alpha": torch.tensor(0.1)},
        "BOFT": {"oft_blocks": noise(1, 3, 2, 2), "alpha": torch.tensor(0.1)},
        "IA3": {"weight": noise(6), "on_input": torch.tensor(0)},
        "GLoRA": {
            "a1.weight": noise(8, 2),
            "a2.weight": noise(2, 8),
            "b1.weight": noise(6, 2),
            "b2.weight": noise(2, 8),
        },
    }


@pytest.mark.parametrize("kind", one_of_each_kind())
def test_every_kind_is_named_and_measured(kind, tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.{key}": value.contiguous() for key, value in one_of_each_kind()[kind].items()}
    save_file(tensors, tmp_path / "a.safetensors")
    found = inspect_file(tmp_path / "a.safetensors")
    assert (found.kind, found.modules, found.incomplete) == (kind, 1, [])
    if kind in ("LoRA", "LoHa", "LoKr", "difference"):
        (change,) = read_adapter(tmp_path / "a.safetensors").changes.values()
        assert found.norm == pytest.approx(float(change.delta(torch.zeros(6, 8)).norm()), rel=1e-5)
        assert found.stored == []
    else:
        assert found.norm > 0
        assert found.stored == [kind]
        assert f"({kind}: of what is stored, the update depends on the base)" in render(found)


def test_tucker_norms_of_loha_and_lokr_are_those_of_their_updates(tmp_path):
    g = torch.Generator().manual_seed(0)
    shapes = {f"hada_w{n}_{x}": (2, 6 if x == "a" else 8) for n in (1, 2) for x in "ab"}
    shapes |= {"hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)}
    lokr = {"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 4), "lokr_t2": (2, 2, 3, 3)}
    for parts in (shapes, lokr):
        name = "lora_unet_down_blocks_0_resnets_0_conv1"
        save_file({f"{name}.{k}": torch.randn(*s, generator=g) for k, s in parts.items()}, tmp_path / "a.safetensors")
        (change,) = read_adapter(tmp_path / "a.safetensors").changes.values()
        wanted = float(change.delta(torch.zeros(6, 8, 3, 3)).norm())
        assert inspect_file(tmp_path / "a.safetensors").norm == pytest.approx(wanted, rel=1e-5)


def test_a_textual_inversion_shows_its_tokens(tmp_path):
    save_file({"<cat>": torch.ones(3, 768)}, tmp_path / "a.safetensors")
    found = inspect_file(tmp_path / "a.safetensors")
    assert (found.kind, found.embeddings) == ("a textual inversion", {"<cat>": 3})
    assert "tokens     <cat> (3 vectors)" in render(found)


def test_lines_stay_narrow_however_many_targets_there_are(tiny, lora, tmp_path):
    path = write_lora(tmp_path / "a.safetensors", lora(tiny("sdxl").layers(), ranks=(1,)), family="sdxl")
    assert max(len(line) for line in render(inspect_file(path)).splitlines()) <= 100


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_pefts_is_described_with_its_config(tiny, tmp_path):
    import copy

    import peft

    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["attn1.to_q"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(tiny("pocket").parts["unet"]), config).save_pretrained(tmp_path / "a")
    found = inspect_file(tmp_path / "a")
    assert (found.kind, found.ranks, list(found.alphas)) == ("LoRA", {"2": found.modules}, ["8"])


def test_inspecting_any_kind_or_folder_loads_no_torch(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for kind, parts in one_of_each_kind().items():
        save_file({f"{name}.{k}": v.contiguous() for k, v in parts.items()}, tmp_path / f"{kind}.safetensors")
    save_file({"model.diffusion_model.out.2.weight": torch.ones(1)}, tmp_path / "checkpoint.safetensors")
    code = f"""for path in pathlib.Path({str(tmp_path)!r}).glob("*.safetensors"):
    assert main(["inspect", str(path)]) == 0
    assert main(["inspect", str(path), "--json"]) == 0
assert "torch" not in sys.modules
assert "safetensors" not in sys.modules"""
    program = f"import sys, pathlib\nfrom sfumato.cli import main\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("kind       ") == len(one_of_each_kind()) + 1


LOOKED_AT = Inspection(
    file="a\x07.safetensors", bytes=1_250_000, tensors=1234, dtypes={"F16": 1200, "F32": 34}, kind="LoRA + DoRA",
    family="sd1", says="sdxl", spelling=["kohya", "diffusers"], modules=13,
    targets={"unet attn1.to_k": 2, "unet ff": 1},
    ranks={"4": 2, "8": 1}, alphas={}, norm=12.3456, stored=["DoRA"],
    blocks=[Block("down_blocks.0", 2, 6.0), Block("mid_block", 1, 3.0), Block("up", 10, float("inf"))],
    trigger=["zwx", "b" * 300], adapter_guidance=0.0, over_steps=None, negatives=[], sampling=None, base=None,
    hash="0123456789ab", hash_holds=False, nonfinite=["x", "y", "z", "w"],
    embeddings={"<a>": 2}, unknown=["odd"], incomplete=["half"], metadata={},
)  # fmt: skip


def test_a_word_that_lies_beside_the_adapter_is_told_with_its_file():
    about = {"sfumato.config": '{"train_words": ["<a>", "<b>", "<c>"]}'}
    about["sfumato.word_files"] = '{"<b>": "l-b.safetensors"}'
    lines = render(replace(LOOKED_AT, metadata=about)).splitlines()
    assert lines[6:8] == ["word       <b>, in l-b.safetensors", "word       <c>, in a file of its own"]
    for broken in ('{"train_words": 3}', "{", "[]"):
        assert "word " not in render(replace(LOOKED_AT, metadata={"sfumato.config": broken}))


def test_the_whole_of_what_is_shown():
    assert render(LOOKED_AT) == (
        "file       a .safetensors, 1.25 MB\n"
        "tensors    1,234: F16 (1200), F32 (34)\n"
        "kind       LoRA + DoRA\n"
        "family     SD 1.x, but its metadata says SDXL\n"
        "base       -\n"
        f"trigger    zwx, {'b' * 197}...\n"
        "spelling   kohya, diffusers\n"
        "modules    13\n"
        "targets    unet attn1.to_k (2), unet ff (1)\n"
        "ranks      4 (2), 8 (1)\n"
        "alphas     -\n"
        "hash       0123456789ab, the bytes differ from the stated one\n"
        "norm       12.35 (DoRA: of what is stored, the update depends on the base)\n"
        "tokens     <a> (2 vectors)\n"
        "NaN or Inf 4, first x, y, z\n"
        "unknown    1, first odd\n"
        "incomplete 1, first half\n"
        "\n"
        "block          modules      norm\n"
        f"down_blocks.0        2         6  {'#' * 24}\n"
        f"mid_block            1         3  {'#' * 12}\n"
        "up                  10       inf"
    )
    plain = replace(LOOKED_AT, family=None, says=None, hash_holds=None, modules=0, norm=None, blocks=[], embeddings={})
    lines = render(replace(plain, nonfinite=[], unknown=[], incomplete=[], trigger=[], spelling=[])).splitlines()
    assert "guidance   2.5, of the adapter" in render(replace(plain, adapter_guidance=2.5)).splitlines()
    assert "sampling   4 steps of lcm at guidance 1" in render(replace(plain, sampling=Sampling("lcm", 4, 1.0)))
    assert "negative   <a>, sks dog" in render(replace(plain, negatives=["<a>", "sks dog"])).splitlines()
    assert "steps      0 to 0.8 of the way from noise to image" in render(replace(plain, over_steps=(0.0, 0.8)))
    assert lines[3:7] == ["family     unknown", "base       -", "trigger    -", "spelling   -"]
    assert lines[-1] == "hash       0123456789ab"
    assert render(replace(plain, hash_holds=True, unknown=[], incomplete=[], nonfinite=[])).endswith("ab, holds")


def test_a_small_file_looked_into(tmp_path):
    def ones(down, up):
        return LoraModule(torch.ones(*down), torch.ones(*up), float(down[0]))

    modules = {
        TO_K: ones((1, 768), (4, 1)),
        ("unet", "conv_in"): ones((2, 4, 3, 3), (4, 2, 1, 1)),
        ("unet", "mid_block.resnets.0.time_emb_proj"): ones((1, 4), (2, 1)),
        ("text_encoder", "text_model.encoder.layers.3.mlp.fc1"): ones((1, 4), (2, 1)),
        ("unet", "up_blocks.10.resnets.0.conv1"): ones((1, 4, 3, 3), (2, 1, 1, 1)),
        ("unet", "up_blocks.2.resnets.0.conv1"): ones((1, 4, 3, 3), (2, 1, 1, 1)),
    }
    words = {"<cat>": {"text_encoder": torch.ones(2, 768)}}
    path = write_lora(tmp_path / "a.safetensors", modules, family="sd1", metadata={"b": "2", "a": "1"}, words=words)
    found = inspect_file(path)
    assert (found.bytes, found.tensors, found.dtypes) == (path.stat().st_size, 19, {"F32": 19})
    assert list(found.targets.items()) == [
        ("unet conv1", 2),
        *((f"{name}", 1) for name in ("text_encoder mlp.fc1", "unet attn2.to_k", "unet conv_in", "unet time_emb_proj")),
    ]
    assert (found.ranks, found.alphas) == ({"1": 5, "2": 1}, {"1": 6})
    assert [(block.name, block.modules, round(block.norm, 4)) for block in found.blocks] == [
        ("text_encoder.3", 1, 2.8284),
        ("conv_in", 1, 24.0),
        ("down_blocks.0.attentions.0", 1, 55.4256),
        ("mid_block.resnets.0", 1, 2.8284),
        ("up_blocks.2.resnets.0", 1, 8.4853),
        ("up_blocks.10.resnets.0", 1, 8.4853),
    ]
    assert found.norm == pytest.approx((2 * 8 + 576 + 3072 + 2 * 72) ** 0.5, rel=1e-5)
    assert (found.embeddings, found.says, found.base, found.stored) == ({"<cat>": 2}, None, None, [])
    assert (found.hash, found.hash_holds) == (short_hash(path), True)
    assert list(found.metadata)[:2] == ["a", "b"]


@pytest.mark.parametrize(
    ("target", "block"),
    [
        (TO_K, "down_blocks.0.attentions.0"),
        (("unet", "up_blocks.1.upsamplers.0.conv"), "up_blocks.1.upsamplers.0"),
        (("unet", "mid_block.attentions.0.proj_in"), "mid_block.attentions.0"),
        (("unet", "conv_in"), "conv_in"),
        (("unet", "time_embedding.linear_1"), "time_embedding"),
        (("text_encoder_2", "text_model.encoder.layers.11.mlp.fc1"), "text_encoder_2.11"),
        (("text_encoder_2", "text_projection"), "text_encoder_2.text_projection"),
    ],
)
def test_the_block_that_a_module_is_in(target, block):
    assert block_of(target) == block


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_value_that_is_not_finite_is_seen_without_torch(dtype, tmp_path):
    largest = torch.finfo(dtype).max
    values = {"a": [1.0, float("nan")], "b": [float("-inf"), 1.0], "c": [1.0, 2.0], "d": [largest, -largest]}
    tensors = {name: torch.tensor(pair, dtype=dtype) for name, pair in values.items()}
    save_file(tensors | {"e": torch.tensor([-1])}, tmp_path / "a")
    assert inspect_file(tmp_path / "a").nonfinite == ["a", "b"]


def test_each_fp8_value_that_is_not_finite_is_seen(tmp_path):
    for dtype, count in ((torch.float8_e4m3fn, 2), (torch.float8_e5m2, 8)):
        each = {f"{byte:03}": torch.tensor([byte], dtype=torch.uint8).view(dtype) for byte in range(256)}
        save_file(each, tmp_path / "a")
        wrong = [name for name, value in each.items() if not value.float().isfinite()]
        assert inspect_file(tmp_path / "a").nonfinite == wrong
        assert len(wrong) == count
