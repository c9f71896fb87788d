"""Textual inversions as they are written, alone and bundled with an adapter, to the letter."""

import pytest
import torch
from safetensors.torch import load_file

from sfumato.errors import AdapterError, FileError
from sfumato.files import read_embedding, read_header, write_tensors
from sfumato.files.metadata import short_hash
from sfumato.files.writing.embedding import write_embedding
from sfumato.files.writing.kohya import write_lora
from tests.bundles import add_words
from tests.files.said import said


def test_words_to_the_letter(two_modules, tmp_path):
    path = tmp_path / "a.safetensors"
    one = {"text_encoder": torch.ones(2, 4)}
    two = one | {"text_encoder_2": torch.ones(1, 6)}
    assert said(write_embedding, path, "<x>", two) == (
        "a.safetensors: <x> has {'text_encoder': [2, 4], 'text_encoder_2': [1, 6]}; wanted (vectors, width), as many "
        "for each encoder."
    )
    assert said(write_embedding, path, "<x>", {"text_encoder_2": torch.ones(1, 6)}) == (
        "a.safetensors: vectors for text_encoder_2; wanted text_encoder, or both of SDXL's."
    )
    assert said(write_embedding, path, "<x>", one, metadata={"note": "x" * 100_000}).endswith(
        " bytes, at most 100,000 are written; shorten note."
    )
    assert said(write_embedding, path, "<x>", {"text_encoder": torch.full((1, 4), float("nan"))}) == (
        "a.safetensors: <x> holds NaN or Inf, so the file was not written. The training diverged; use an earlier save."
    )
    assert said(write_embedding, path, "<x>", one, dtype="fp16") == (
        "a.safetensors: the dtype is 'fp16'; wanted one of torch's, such as torch.float16."
    )
    assert said(write_embedding, path, "<x>", {"text_encoder": torch.full((1, 4), 1e5)}, dtype=torch.float16) == (
        "a.safetensors: <x> overflows float16 (largest value 1e+05). Save in fp32 or bf16 "
        "(--save-precision of trainers, else --dtype)."
    )
    metadata = {"ss_network_dim": "4", "ss_seed": "1", "modelspec.architecture": "stable-diffusion-v1/lora"}
    metadata |= {"sfumato.adapter_guidance": "2", "sfumato.over_steps": "0-0.8"}
    header = read_header(write_embedding(path, "<x>", one, metadata=metadata))
    assert list(header.tensors) == ["<x>"]
    kept = {name: text for name, text in header.metadata.items() if "hash" not in name}
    assert kept == {
        "ss_seed": "1",
        "modelspec.architecture": "stable-diffusion-v1/textual-inversion",
        "sfumato.token": "<x>",
        "sfumato.vectors": "2",
    }
    both = {"text_encoder": torch.ones(1, 4), "text_encoder_2": torch.ones(1, 6)}
    assert set(read_header(write_embedding(path, "<x>", both)).tensors) == {"clip_l", "clip_g"}
    assert said(add_words, write_lora(path, two_modules, family="sd1"), {"v1.5": one}) == (
        "a.safetensors: v1.5 has a dot, with which it cannot be bundled. Write it into its own file."
    )
    second = {"text_encoder_2": torch.ones(1, 6)}  # of one encoder alone, as others bundle it
    add_words(path, {"<x>": one, "<y>": both, "<z>": second})
    names = {name for name in read_header(path).tensors if name.startswith("bundle_emb")}
    assert names == {
        "bundle_emb.<x>.string_to_param.*",
        "bundle_emb.<y>.clip_l",
        "bundle_emb.<y>.clip_g",
        "bundle_emb.<z>.clip_g",
    }
    assert read_header(path).metadata["sshs_model_hash"][:12] == short_hash(
        write_tensors(tmp_path / "b", load_file(path))
    )


def test_the_file_says_what_it_is(tmp_path):
    metadata = {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_network_module": "networks.lora"}
    vectors = {"text_encoder": torch.ones(2, 4)}
    path = write_embedding(tmp_path / "a.safetensors", "<x>", vectors, metadata=metadata)
    written = read_header(path).metadata
    assert written["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert written["sfumato.token"] == "<x>"
    assert "ss_network_module" not in written
    assert read_embedding(path).embeddings["<x>"]["text_encoder"].shape == (2, 4)
    assert (
        path.read_bytes() == write_embedding(tmp_path / "b.safetensors", "<x>", vectors, metadata=metadata).read_bytes()
    )


@pytest.mark.parametrize(
    "vectors",
    [{}, {"text_encoder": torch.ones(4)}, {"unet": torch.ones(1, 4)}, {"text_encoder_2": torch.ones(1, 4)}],
)
def test_what_is_no_embedding_is_not_written(vectors, tmp_path):
    with pytest.raises(AdapterError, match="wanted"):
        write_embedding(tmp_path / "a.safetensors", "<x>", vectors)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_no_numbers_are_not_written(tmp_path):
    with pytest.raises(FileError, match="NaN or Inf"):
        write_embedding(tmp_path / "a.safetensors", "<x>", {"text_encoder": torch.full((1, 4), torch.nan)})
    with pytest.raises(FileError, match="overflows float16"):
        write_embedding(
            tmp_path / "a.safetensors", "<x>", {"text_encoder": torch.full((1, 4), 1e6)}, dtype=torch.float16
        )
    assert list(tmp_path.iterdir()) == []
