"""Adapter files that are not whole, not ours or not adapters: told apart, with counts and first names."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.errors import AdapterError
from sfumato.files.adapter_file import read_lora
from sfumato.files.inspect import inspect_file
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from tests.files.said import said

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
VALUE = KEY.replace("to_k", "to_v")


def refusal(tensors, tmp_path, **options):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(AdapterError) as error:
        read_lora(path, **options)
    message = str(error.value)
    assert message.startswith("a.safetensors: ")
    assert "\n" not in message
    return message.removeprefix("a.safetensors: ")


@pytest.fixture
def tensors(two_modules, tmp_path):
    return load_file(write_lora(tmp_path / "whole.safetensors", two_modules, family="sd1"))


def test_a_missing_half_is_counted_and_named(tensors, tmp_path):
    for half, other in (("up", "down"), ("down", "up")):
        rest = {name: value for name, value in tensors.items() if name != f"{VALUE}.lora_{half}.weight"}
        assert refusal(rest, tmp_path).startswith(
            f"lora_{half} is missing for 1 of 2 modules, first beside {VALUE}.lora_{other}.weight."
        )


def test_an_alpha_alone_is_not_understood(tensors, tmp_path):
    rest = {name: value for name, value in tensors.items() if not name.startswith(f"{VALUE}.lora")}
    assert refusal(rest, tmp_path).startswith(f"1 of 4 keys are not understood, first {VALUE}.alpha.")


def test_unknown_keys_are_counted_and_named(tensors, tmp_path):
    extra = {f"lora_unet_nowhere_{i}.lora_down.weight": torch.ones(1) for i in range(5)}
    assert refusal(tensors | extra, tmp_path).startswith(
        "5 of 11 keys are not understood, first lora_unet_nowhere_0.lora_down.weight, "
        "lora_unet_nowhere_1.lora_down.weight, lora_unet_nowhere_2.lora_down.weight. Accept the rest with partial=True"
    )


def test_a_part_is_accepted_on_request_and_says_what_was_left_out(tensors, tmp_path):
    del tensors[f"{VALUE}.lora_up.weight"]
    save_file(tensors | {"odd": torch.ones(1)}, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors", partial=True)
    assert [path.rsplit(".", 1)[1] for _, path in found.modules] == ["to_k"]
    assert set(found.skipped) == {"odd", f"{VALUE}.lora_down.weight", f"{VALUE}.alpha"}


def test_a_part_of_nothing_is_refused_even_on_request(tmp_path):
    half = {f"{KEY}.lora_down.weight": torch.ones(2, 768)}
    message = refusal(half, tmp_path, partial=True)
    assert message.startswith(f"lora_up is missing for 1 of 1 modules, first beside {KEY}.lora_down.weight, so nothing")


FOREIGN = {
    "model.diffusion_model.input_blocks.0.0.weight": "this is a full checkpoint (1 tensor), not an adapter.",
    "decoder.conv_in.weight": "this is a VAE (1 tensor), not an adapter.",
    "text_model.embeddings.token_embedding.weight": "this is a whole text encoder (1 tensor), not an adapter.",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": "this is an adapter for a transformer model",
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "this is an adapter for a transformer model",
    "emb_params": "this is a textual inversion (1 tensor), not an adapter.",
    "<my-cat>": "this is a textual inversion (1 tensor), not an adapter.",
    "layers.0.weight": "0 of 1 keys are an adapter's for SD or SDXL, first layers.0.weight.",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_lora_is_named(name, tmp_path):
    assert refusal({name: torch.ones(2, 2)}, tmp_path).startswith(FOREIGN[name])


@pytest.mark.parametrize(
    "name", ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "transformer.x.attn.to_q.lora_A.weight"]
)
def test_a_transformers_adapter_is_none_of_ours_because_it_changes_clip(name, tmp_path):
    text = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    both = {
        name: torch.ones(2, 2),
        f"{text}.lora_down.weight": torch.ones(2, 8),
        f"{text}.lora_up.weight": torch.ones(8, 2),
    }
    wanted = (
        "this is an adapter for a transformer model (Flux, SD 3 and the like). Take one for SD 1.x, SD 2.x or SDXL."
    )
    assert [refusal(both, tmp_path, partial=partial) for partial in (False, True)] == [wanted, wanted]
    assert inspect_file(tmp_path / "a.safetensors").kind in wanted


KINDS = {
    "DoRA": dict(zip(("lora_down.weight", "lora_up.weight", "dora_scale"), ((2, 768), (4, 2), (4, 1)), strict=True)),
    "LoHa": {f"hada_w{n}_{x}": (4, 2) if x == "a" else (2, 768) for n in (1, 2) for x in "ab"},
    "LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 384)},
    "OFT": {"oft_blocks": (2, 2, 2)},
    "difference": {"diff": (4, 768), "diff_b": (4,)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_no_lora_is_named_and_counted(kind, tmp_path):
    parts = {f"{module}.{part}": torch.ones(shape) for module in (KEY, VALUE) for part, shape in KINDS[kind].items()}
    assert refusal(parts, tmp_path).startswith(f"the file holds {kind} in 2 modules of 2; wanted a LoRA.")


def test_a_lora_that_changes_a_bias_is_no_lora_alone(tensors, tmp_path):
    assert refusal(tensors | {f"{KEY}.diff_b": torch.ones(4)}, tmp_path).startswith("the file holds 1 change of a bias")


def test_one_module_in_two_spellings_is_refused(tensors, tmp_path):
    twice = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_up.weight"
    assert refusal(tensors | {twice: torch.ones(4, 2)}, tmp_path).startswith(
        "1 of 7 keys name a module that another spelling names too, first "
    )


@pytest.mark.parametrize(
    ("down", "up"), [((2, 768), (4, 3)), ((2, 768), (4,)), ((2, 768), (4, 2, 3, 3)), ((2, 4, 3), (4, 2))]
)
def test_halves_that_do_not_fit_are_refused_with_their_shapes(down, up, tmp_path):
    message = refusal({f"{KEY}.lora_down.weight": torch.ones(down), f"{KEY}.lora_up.weight": torch.ones(up)}, tmp_path)
    assert f"lora_down {list(down)}, lora_up {list(up)}; wanted (rank, in) and (out, rank)." in message


def test_an_alpha_that_is_no_number_is_refused(tensors, tmp_path):
    assert "wanted one number" in refusal(tensors | {f"{KEY}.alpha": torch.ones(2)}, tmp_path)


@pytest.mark.parametrize(
    ("text", "what"), [("{", "not a JSON object"), ('{"unet.lora_alpha": "9"}', "wanted a number")]
)
def test_alphas_in_the_metadata_that_make_no_sense_are_refused(text, what, tmp_path):
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 768), f"{path}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(AdapterError, match=what):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("width", "version", "family"),
    [
        (768, "", "sd1"),
        (1024, "", "sd2"),
        (2048, "", "sdxl"),
        (2048, "sd_v1", "sdxl"),  # the shapes cannot be wrong
        (12, "sfumato_pocket", "pocket"),
        (12, "sdxl_something_new", "sdxl"),
        (12, "", None),
    ],
)
def test_the_family_is_told_by_the_text_width_else_by_the_metadata(width, version, family, tmp_path):
    tensors = {f"{KEY}.lora_down.weight": torch.ones(2, width), f"{KEY}.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": version} if version else None)
    found = read_lora(tmp_path / "a.safetensors")
    assert (found.family, found.text_width) == (family, width)


def test_the_update_is_alpha_over_rank_times_up_down():
    module = LoraModule(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), alpha=0.5)
    assert module.delta().tolist() == [[1.5, 3.0], [2.0, 4.0]]


def test_from_scale_is_the_update_at_that_scale():
    module = LoraModule.from_scale(torch.ones(4, 2), torch.ones(3, 4), 0.25)
    assert module.alpha == 1.0
    assert module.delta().tolist() == [[1.0, 1.0]] * 3


def test_what_is_no_lora_alone(tmp_path):
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"
    pair = {f"{flat}k.lora_down.weight": torch.ones(2, 8), f"{flat}k.lora_up.weight": torch.ones(6, 2)}
    path = tmp_path / "a.safetensors"
    save_file(pair | {f"{flat}v.diff": torch.ones(6, 8)}, path)
    assert said(read_lora, path) == (
        "a.safetensors: the file holds difference in 1 module of 2; wanted a LoRA. Convert it to a LoRA."
    )
    save_file(pair | {f"{flat}k.diff_b": torch.ones(6)}, path)
    assert said(read_lora, path) == (
        "a.safetensors: the file holds 1 change of a bias as well; wanted a LoRA alone. Take another file."
    )
    save_file(pair | {"bundle_emb.<x>.clip_l": torch.ones(1, 768)}, path)
    assert said(read_lora, path) == (
        "a.safetensors: the file holds the vectors of 1 token as well; wanted a LoRA alone. Take another file."
    )
