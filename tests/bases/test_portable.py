"""Folders that earlier versions of transformers, and the programs that have one, read."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sfumato import load_base
from sfumato.models.base import vocabulary_digest
from sfumato.training.methods.full import write_folder
from tests.tiny import CPU


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def both(request, family_folder, tmp_path_factory):
    """A base, and what `--method full` writes of it."""
    base = load_base(str(family_folder(request.param)), precision=CPU)
    return base, write_folder(base, tmp_path_factory.mktemp("out") / "written", torch.float32)


def test_text_encoders_have_the_names_of_before_transformers_5_6(both):
    base, folder = both
    for encoder, part in zip(base.text_encoders, ("text_encoder", "text_encoder_2"), strict=False):
        written = load_file(folder / part / "model.safetensors")
        weights = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
        projection = {"text_projection.weight"} & weights.keys()
        assert written.keys() == projection | {f"text_model.{name}" for name in weights.keys() - projection}
        for name, tensor in written.items():
            assert torch.equal(tensor, weights[name.removeprefix("text_model.")])


def test_tokenizers_have_the_two_files_of_before_transformers_5(both):
    base, folder = both
    for tokenizer, part in zip(base.tokenizers, ("tokenizer", "tokenizer_2"), strict=False):
        words = json.loads((folder / part / "vocab.json").read_text(encoding="utf-8"))
        assert words == json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
        assert (folder / part / "merges.txt").is_file()


def test_the_base_is_known_again(both):
    base, folder = both
    again = load_base(str(folder), precision=CPU)
    assert [vocabulary_digest(each) for each in again.tokenizers] == [
        vocabulary_digest(each) for each in base.tokenizers
    ]
    for encoder, before in zip(again.text_encoders, base.text_encoders, strict=True):
        weights = encoder.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in before.state_dict().items())
