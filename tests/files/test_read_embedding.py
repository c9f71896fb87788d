"""Textual inversions, alone in every safetensors form and bundled in an adapter's file."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sfumato.errors import AdapterError, FileError
from sfumato.files import inspect_file, read_adapter, read_embedding
from sfumato.files.writing.embedding import write_embedding
from tests.files.said import said

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
LORA = {f"{KEY}.lora_down.weight": torch.ones(2, 8), f"{KEY}.lora_up.weight": torch.ones(6, 2)}
ONE, TWO = "text_encoder", "text_encoder_2"
ALONE = {
    "diffusers": ({"<cat>": (768,)}, {"<cat>": {ONE: (1, 768)}}, "sd1"),
    "diffusers, several vectors": ({"my-cat": (4, 1024)}, {"my-cat": {ONE: (4, 1024)}}, "sd2"),
    "diffusers, several tokens": (
        {"<a>": (768,), "<b>": (2, 768)},
        {"<a>": {ONE: (1, 768)}, "<b>": {ONE: (2, 768)}},
        "sd1",
    ),
    "sd-scripts and A1111": ({"emb_params": (3, 768)}, {"file": {ONE: (3, 768)}}, "sd1"),
    "OneTrainer": ({"emp_params": (3, 768)}, {"file": {ONE: (3, 768)}}, "sd1"),
    "SDXL": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, {"file": {ONE: (2, 768), TWO: (2, 1280)}}, "sdxl"),
    "diffusers' advanced scripts": (
        {"text_encoders_0": (2, 768), "text_encoders_1": (2, 1280)},
        {"file": {ONE: (2, 768), TWO: (2, 1280)}},
        "sdxl",
    ),
    "SDXL, second encoder alone": ({"<cat>": (2, 1280)}, {"<cat>": {TWO: (2, 1280)}}, "sdxl"),
    "A1111's, packed": (
        {"string_to_param.*": (2, 768), "string_to_token.*": ()},
        {"file": {ONE: (2, 768)}},
        "sd1",
    ),
    "a width of nobody's": ({"<cat>": (2, 32)}, {"<cat>": {ONE: (2, 32)}}, None),
}


def shapes(embeddings):
    return {token: {part: tuple(v.shape) for part, v in parts.items()} for token, parts in embeddings.items()}


def write(path, tensors, metadata=None):
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize("form", ALONE)
def test_every_form_is_read_by_token_and_encoder(form, tmp_path):
    tensors, wanted, family = ALONE[form]
    found = read_embedding(write(tmp_path / "file.safetensors", tensors))
    assert (shapes(found.embeddings), found.family) == (wanted, family)


BUNDLED = {
    "OneTrainer": ({"bundle_emb.<cat>.clip_l": (2, 768), "bundle_emb.<cat>.clip_g": (2, 1280)}, "<cat>", [ONE, TWO]),
    "LyCORIS, from emb_params": ({"bundle_emb.cat.emb_params": (2, 768)}, "cat", [ONE]),
    "LyCORIS, from A1111": (
        {"bundle_emb.my.cat.string_to_param.*": (2, 768), "bundle_emb.my.cat.string_to_token.*": ()},
        "my.cat",
        [ONE],
    ),
    "a bare name": ({"bundle_emb.cat": (2, 768)}, "cat", [ONE]),
    "ai-toolkit": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "file", [ONE, TWO]),
}


@pytest.mark.parametrize("form", BUNDLED)
def test_every_bundled_form_comes_with_the_adapter(form, tmp_path):
    tensors, token, encoders = BUNDLED[form]
    path = tmp_path / "file.safetensors"
    save_file(LORA | {name: torch.ones(shape) for name, shape in tensors.items()}, path)
    found = read_adapter(path)
    assert {name: list(parts) for name, parts in found.embeddings.items()} == {token: encoders}
    assert len(found.changes) == 1
    assert inspect_file(path).embeddings == {token: 2}


def test_what_a_prompt_cannot_hold_is_not_understood(tmp_path):
    """OneTrainer's output vectors are added behind the encoder, where a token cannot reach."""
    path = tmp_path / "file.safetensors"
    save_file(LORA | {"bundle_emb.<cat>.clip_l_out": torch.ones(2, 768)}, path)
    with pytest.raises(AdapterError, match=r"1 of 3 keys are not understood, first bundle_emb\.<cat>\.clip_l_out"):
        read_adapter(path)
    assert read_adapter(path, partial=True).skipped == ("bundle_emb.<cat>.clip_l_out",)


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"<cat>": (76, 768)}, "wanted the vectors of a token, at most 75"),
        ({"<cat>": (2, 3, 768)}, "wanted the vectors of a token"),
        ({"<cat>": (2, 9999)}, "wanted the vectors of a token"),
        ({"clip_l": (2, 768), "clip_g": (3, 1280)}, "2 and 3 vectors"),
        ({"clip_l": (2, 768), "emb_params": (2, 768)}, "two tensors are vectors of file"),
        ({"decoder.conv_in.weight": (2, 2)}, "this is a VAE"),
        ({"model.diffusion_model.x.weight": (2, 2)}, "this is a full checkpoint"),
        ({"layers.0.weight": (2, 2)}, r"1 of 1 keys are not understood, first layers\.0\.weight"),
        ({f"{KEY}.alpha": ()}, "1 of 1 keys are not understood"),
        ({"emp_params": (2, 768), "emp_params_out": (2, 768)}, "1 of 2 keys are not understood, first emp_params_out"),
    ],
)
def test_what_is_no_textual_inversion_is_refused_in_one_line(tensors, what, tmp_path):
    with pytest.raises(AdapterError, match=what) as error:
        read_embedding(write(tmp_path / "file.safetensors", tensors))
    assert str(error.value).startswith("file.safetensors: ")
    assert "\n" not in str(error.value)


def test_what_is_no_textual_inversion(tmp_path):
    def of(**tensors):
        save_file(tensors, tmp_path / "a.safetensors")
        return said(read_embedding, tmp_path / "a.safetensors")

    name = " Name the .safetensors file of a textual inversion."
    assert of(**{"first_stage_model.a.b": torch.ones(1)}) == f"a.safetensors: this is a full checkpoint.{name}"
    assert of(**{"a.b.c": torch.ones(1), "x": torch.ones(1)}) == (
        f"a.safetensors: this is not a textual inversion: 1 of 2 keys are not understood, first a.b.c.{name}"
    )
    limits = "wanted the vectors of a token, at most 75 of at most 4,096 values. Take the file from its source again."
    assert of(x=torch.ones(76, 4)) == f"a.safetensors: x is [76, 4] in torch.float32; {limits}"
    assert of(x=torch.ones(4097)) == f"a.safetensors: x is [4097] in torch.float32; {limits}"
    assert of(x=torch.ones(1, 4, dtype=torch.int32)) == f"a.safetensors: x is [1, 4] in torch.int32; {limits}"
    assert of(emb_params=torch.ones(1, 4), clip_l=torch.ones(1, 4)) == (
        "a.safetensors: two tensors are vectors of a for text_encoder, the second emb_params. Take the file from its "
        "source again."
    )
    assert of(clip_l=torch.ones(1, 768), clip_g=torch.ones(2, 1280)) == (
        "a.safetensors: a token has 1 and 2 vectors; wanted as many for either encoder."
    )
    for shape, width in (((75, 4096), 4096), ((4096,), 4096)):
        save_file({"x": torch.ones(*shape)}, tmp_path / "a.safetensors")
        assert read_embedding(tmp_path / "a.safetensors").embeddings["x"]["text_encoder"].shape[1] == width


def test_a_pickle_and_nan_are_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(FileError, match="this is a pickle file"):
        read_embedding(tmp_path / "a.pt")
    save_file({"<cat>": torch.full((768,), float("nan"))}, tmp_path / "b.safetensors")
    with pytest.raises(FileError, match="NaN or Inf"):
        read_embedding(tmp_path / "b.safetensors")


def test_our_own_metadata_names_the_token(tmp_path):
    path = write(tmp_path / "file.safetensors", {"clip_l": (1, 768), "clip_g": (1, 1280)}, {"sfumato.token": "<cat>"})
    assert list(read_embedding(path).embeddings) == ["<cat>"]


@pytest.mark.parametrize("token", ["fade_out", "dog-v1.2.3", "a.weight", "emb_params", "clip_g"])
def test_a_token_of_ours_is_read_however_it_is_spelt(token, tmp_path):
    path = write_embedding(tmp_path / "a.safetensors", token, {"text_encoder": torch.ones(2, 768)})
    assert {name: list(parts) for name, parts in read_embedding(path).embeddings.items()} == {token: ["text_encoder"]}
    assert (inspect_file(path).kind, inspect_file(path).embeddings) == ("a textual inversion", {token: 2})


def test_diffusers_finds_the_same_vectors(tmp_path):
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
    from safetensors.torch import load_file

    path = write(tmp_path / "file.safetensors", {"<cat>": (3, 768)})
    tokenizer = SimpleNamespace(get_vocab=dict)
    tokens, vectors = TextualInversionLoaderMixin._retrieve_tokens_and_embeddings([None], [load_file(path)], tokenizer)
    ours = read_embedding(path).embeddings
    assert list(ours) == tokens
    assert torch.equal(ours["<cat>"]["text_encoder"], vectors[0])
