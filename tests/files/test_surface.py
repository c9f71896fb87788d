"""The names that `sfumato.files` shows."""

import torch

import sfumato.files
from sfumato.files import read_header, write_diffusers, write_lora, write_peft, write_tensors
from sfumato.files.write_difference import write_difference
from sfumato.files.write_embedding import add_words, write_embedding


def test_every_public_name_is_there_and_sorted():
    assert sfumato.files.__all__ == sorted(sfumato.files.__all__) == sorted(sfumato.files._HOME)
    assert all(callable(getattr(sfumato.files, name)) for name in sfumato.files.__all__)


def test_a_path_may_be_a_text(tmp_path, two_modules):
    vectors = {"text_encoder": torch.ones(1, 768)}
    differences = {target: (module.delta(), None) for target, module in two_modules.items()}
    lora = str(tmp_path / "lora.safetensors")
    assert (
        write_lora(lora, two_modules, family="sd1")
        == add_words(lora, {"<x>": vectors})
        == tmp_path / "lora.safetensors"
    )
    write_diffusers(str(tmp_path / "dotted.safetensors"), two_modules, family="sd1")
    write_difference(str(tmp_path / "difference.safetensors"), differences, family="sd1")
    write_embedding(str(tmp_path / "word.safetensors"), "<x>", vectors)
    write_tensors(str(tmp_path / "plain.safetensors"), {"a": torch.ones(1)})
    assert write_peft(str(tmp_path / "peft"), two_modules, family="sd1") == tmp_path / "peft"
    assert all(read_header(file).tensors for file in tmp_path.glob("*.safetensors"))
