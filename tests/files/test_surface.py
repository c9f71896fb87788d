"""The names that `sfumato.files` shows."""

import pytest
import torch

import sfumato.files
from sfumato.errors import AdapterError, FileError
from sfumato.files import (
    inspect_file,
    read_adapter,
    read_embedding,
    read_header,
    read_tensors,
    short_hash,
    write_diffusers,
    write_lora,
    write_peft,
    write_tensors,
)
from sfumato.files.writing.embedding import write_embedding
from sfumato.files.writing.kohya import write_difference
from tests.bundles import add_words


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


def test_what_names_no_file_or_family_is_one_line(tmp_path, two_modules):
    for use in (read_header, read_adapter, read_embedding, read_tensors, short_hash, inspect_file):
        with pytest.raises(FileError, match="a file is named by its path, a text, got a NoneType"):
            use(None)
    with pytest.raises(FileError, match="named by its path"):
        write_lora(None, two_modules, family="sd1")
    with pytest.raises(AdapterError, match="there is no family 'sd15'; wanted "):
        write_lora(tmp_path / "lora.safetensors", two_modules, family="sd15")
    assert not list(tmp_path.iterdir())
