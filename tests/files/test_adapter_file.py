"""Adapter files of several kinds, of a part, of nothing: what is counted, refused, left out on request."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sfumato.errors import AdapterError, FileError
from sfumato.files import read_adapter
from tests.files.said import TO_K, said

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
LORA = {"lora_down.weight": (2, 8), "lora_up.weight": (6, 2), "alpha": ()}
LOHA = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}


def write(path, modules, **extra):
    tensors = {f"{STEM}{name}.{key}": torch.ones(s) for name, parts in modules.items() for key, s in parts.items()}
    save_file(tensors | extra, path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def test_kinds_of_one_file_are_counted(path):
    modules = {"attn1_to_q": LORA, "attn1_to_k": LORA, "attn1_to_v": LOHA, "norm1": {"w_norm": (6,), "b_norm": (6,)}}
    found = read_adapter(write(path, modules))
    assert found.kinds == {"LoRA": 2, "LoHa": 1, "difference": 1}
    assert next(iter(found.kinds)) == "LoRA"
    assert found.skipped == ()


def test_a_factor_that_is_missing_is_counted_and_named(path):
    half = {key: shape for key, shape in LOHA.items() if key != "hada_w2_b"}
    write(path, {"attn1_to_q": LORA, "attn1_to_v": half})
    message = f"1 of 2 modules are not whole, first {STEM}attn1_to_v.hada_w1_a, of whose LoHa 3 tensors are there"
    with pytest.raises(AdapterError, match=message):
        read_adapter(path)
    found = read_adapter(path, partial=True)
    assert found.kinds == {"LoRA": 1}
    assert found.skipped == tuple(f"{STEM}attn1_to_v.{key}" for key in sorted(half))


def test_a_magnitude_alone_is_no_dora(path):
    write(path, {"attn1_to_q": LORA, "attn1_to_k": {"dora_scale": (6, 1)}})
    with pytest.raises(
        AdapterError, match=r"1 of 2 modules are not whole, first .*dora_scale, of whose DoRA 1 tensor is there"
    ):
        read_adapter(path)


def test_a_part_is_never_taken_silently(path):
    write(path, {"attn1_to_q": LOHA}, odd=torch.ones(1))
    with pytest.raises(AdapterError, match=r"1 of 5 keys are not understood, first odd\. Accept the rest with partial"):
        read_adapter(path)
    assert read_adapter(path, partial=True).skipped == ("odd",)


def test_quantised_factors_are_refused_by_name(path):
    write(path, {"attn1_to_q": LORA})
    tensors = {f"{STEM}attn1_to_q.lora_down.weight": torch.ones(2, 8, dtype=torch.int8)}
    save_file(tensors | {f"{STEM}attn1_to_q.lora_up.weight": torch.ones(6, 2)}, path)
    with pytest.raises(AdapterError, match=r"attn1_to_q\.lora_down\.weight is I8; wanted floating point"):
        read_adapter(path)


def test_half_floats_and_eight_bit_floats_are_applied_in_fp32(path):
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        parts = {f"{STEM}attn1_to_q.{key}": torch.ones(s).to(dtype) for key, s in LOHA.items()}
        save_file(parts, path)
        (change,) = read_adapter(path).changes.values()
        delta = change.delta(torch.zeros(6, 8, dtype=torch.bfloat16))
        assert (delta.dtype, delta[0, 0].item()) == (torch.float32, 4.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_with_its_name(value, path):
    write(path, {"attn1_to_q": LOHA}, **{f"{STEM}attn1_to_k.diff": torch.full((6, 8), value)})
    with pytest.raises(FileError, match=r"1 of 5 tensors hold NaN or Inf, first .*attn1_to_k\.diff"):
        read_adapter(path)


def test_a_dora_of_diffusers_has_pefts_arithmetic_and_the_alpha_of_its_metadata(path):
    g = torch.Generator().manual_seed(0)
    down, up, magnitude, weight = (torch.randn(*s, generator=g) for s in ((2, 8), (6, 2), (6,), (6, 8)))
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_magnitude_vector": magnitude}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})})
    (change,) = read_adapter(path).changes.values()
    changed = weight.double() + 3.0 * up.double() @ down.double()
    wanted = magnitude.double()[:, None] * changed / changed.norm(dim=1, keepdim=True) - weight.double()
    assert change.kind == "DoRA"
    torch.testing.assert_close(change.delta(weight).double(), wanted, rtol=1e-5, atol=1e-5)


def test_reading_twice_gives_the_same_and_changes_nothing(path):
    write(path, {"attn1_to_q": LOHA})
    before = path.read_bytes()
    first, second = (read_adapter(path) for _ in range(2))
    weight = torch.ones(6, 8)
    for target, change in first.changes.items():
        assert torch.equal(change.delta(weight), second.changes[target].delta(weight))
        assert torch.equal(change.delta(weight), change.delta(weight))
    assert weight.unique().tolist() == [1.0]
    assert path.read_bytes() == before


def test_what_is_no_adapter_of_ours(tmp_path):
    def of(names, **kwargs):
        save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "a.safetensors")
        return said(read_adapter, tmp_path / "a.safetensors", **kwargs)

    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    dotted = f"unet.{TO_K[1]}"
    assert of(["emb_params"]) == (
        "a.safetensors: this is a textual inversion (1 tensor), not an adapter. It is a new word, which generate "
        "and grid take with --embedding, Python with sfumato.embedding.load(pipe, file)."
    )
    assert of(["first_stage_model.a", "b.c"]) == (
        "a.safetensors: this is a full checkpoint (2 tensors), not an adapter. Name an adapter's file."
    )
    assert of([f"a{n}.b.c" for n in range(5)]) == (
        "a.safetensors: 0 of 5 keys are an adapter's for SD or SDXL, first a0.b.c, a1.b.c, a2.b.c. Name an adapter's "
        "file."
    )
    pair = [f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"]
    assert of([*pair, f"{dotted}.lora_A.weight"]) == (
        f"a.safetensors: 1 of 3 keys name a module that another spelling names too, first {dotted}.lora_A.weight. "
        "Which is meant is not said; take the file from its source again."
    )
    assert of([f"{flat}.lora_up.weight"], partial=True) == (
        f"a.safetensors: lora_down is missing for 1 of 1 modules, first beside {flat}.lora_up.weight, so nothing can "
        "be applied. Take the file from its source again."
    )
    assert of([*pair, "odd.a.b"]) == (
        "a.safetensors: 1 of 3 keys are not understood, first odd.a.b. Accept the rest with partial=True (--partial), "
        "or take another file."
    )
    half = flat.replace("to_k", "to_v")
    assert of([*pair, f"{half}.lora_down.weight"]) == (
        f"a.safetensors: lora_up is missing for 1 of 2 modules, first beside {half}.lora_down.weight. Take the file "
        "from its source again, or accept the rest with partial=True (--partial)."
    )
    assert of([*pair, f"{half}.hada_w1_a"]) == (
        f"a.safetensors: 1 of 2 modules are not whole, first {half}.hada_w1_a, of whose LoHa 1 tensor is there. Take "
        "the file from its source again, or accept the rest with partial=True (--partial)."
    )
    save_file({name: torch.ones(2, 2, dtype=torch.int8) for name in pair}, tmp_path / "a.safetensors")
    assert said(read_adapter, tmp_path / "a.safetensors") == (
        f"a.safetensors: {pair[0]} is I8; wanted floating point. Quantised adapters are not read; take the file in "
        "half or single precision."
    )
