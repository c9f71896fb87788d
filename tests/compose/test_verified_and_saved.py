"""Fingerprints checked when files are mixed, and what a saved mix keeps of the files it is made of."""

import copy
import inspect
import json

import pytest
import torch
from torch.testing import assert_close

from sfumato.adapters.blocks import Blocks
from sfumato.compose import Adapter, compose
from sfumato.errors import AdapterError, FileError
from sfumato.files import read_adapter, read_header, read_tensors, write_tensors
from sfumato.files.fingerprint import FINGERPRINT_KEY
from tests.bundles import add_words
from tests.compose.conftest import fresh, weights_sha

CAT = {"<cat>": {"text_encoder": torch.arange(64.0).view(2, 32) / 100}}


def changed(path, factor):
    """The file with its first update multiplied, and all it says of itself as it was."""
    header, tensors = read_header(path), read_tensors(path)
    name = next(name for name in tensors if "lora_up" in name)
    tensors = {key: value * factor if key == name else value.clone() for key, value in tensors.items()}
    return write_tensors(path.with_name(f"{path.stem}-changed.safetensors"), tensors, header.metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_that_was_written_is_verified(dtype, sd1, write):
    mix = compose(sd1, Adapter(write("a", sd1)), verify=True)
    saved = mix.save(write("b", sd1).with_name("saved.safetensors"), dtype=dtype)
    mix.undo()
    with compose(sd1, Adapter(saved), verify=True) as again:
        assert again.weights == {"saved": 1.0}
        with pytest.raises(AdapterError, match=r"saved in torch\.float32, float16 or bfloat16, not in torch\.int8"):
            again.save(saved, dtype=torch.int8)  # whose numbers would be 0


def test_another_adapter_under_the_same_metadata_is_refused_before_anything_is_touched(sd1, write):
    before, file = weights_sha(sd1), changed(write("a", sd1, "to_q"), 3)
    with pytest.raises(FileError, match=r"a-changed\.safetensors: it is not the adapter that was written: relative"):
        compose(sd1, Adapter(file), verify=True)
    assert weights_sha(sd1) == before
    assert compose(sd1, Adapter(file)).weights == {"a-changed": 1.0}


def test_a_file_without_a_fingerprint_cannot_be_verified(sd1, write):
    file = write("a", sd1, "to_q")
    metadata = {key: value for key, value in read_header(file).metadata.items() if key != FINGERPRINT_KEY}
    bare = write_tensors(file.with_name("bare.safetensors"), dict(read_tensors(file)), metadata)
    mix = compose(sd1, Adapter(file), verify=True)
    with pytest.raises(FileError, match=r"bare\.safetensors: it states no fingerprint"):
        mix.add(Adapter(bare), verify=True)
    assert list(mix.weights) == ["a"]


def test_a_saved_mix_keeps_the_words_that_come_with_its_adapters(sd1, write, tmp_path):
    a, b = add_words(write("a", sd1, "to_q"), CAT), write("b", sd1, "to_k")
    mix = compose(sd1, Adapter(a, 0.5), Adapter(b))
    file = read_adapter(mix.save(tmp_path / "mix.safetensors", dtype=torch.float16))
    assert_close(file.embeddings["<cat>"]["text_encoder"], CAT["<cat>"]["text_encoder"], rtol=0, atol=0)
    mix.mute("a")
    assert not read_adapter(mix.save(tmp_path / "without.safetensors")).embeddings


def test_a_part_with_live_adapters_is_not_saved_as_the_base(sd1, write, tmp_path):
    mix = compose(sd1, Adapter(write("a", sd1, "to_q")), way="live")
    assert "variant" in inspect.signature(sd1.unet.save_pretrained).parameters  # which a pipeline asks it for
    for unet in (sd1.unet, copy.deepcopy(sd1.unet)):
        with pytest.raises(AdapterError, match=r"live beside the unet's layers.*mix\.save"):
            unet.save_pretrained(tmp_path)
    sd1.text_encoder.save_pretrained(tmp_path / "text")  # which has none
    mix.mute()
    sd1.unet.save_pretrained(tmp_path)
    saved = read_tensors(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in sd1.unet.state_dict().items())
    mix.undo()
    assert "save_pretrained" not in vars(sd1.unet)


def test_a_saved_mix_with_words_states_the_hash_of_all_its_bytes(sd1, write, tmp_path):
    from sfumato.files.metadata import data_sha256

    file = compose(sd1, Adapter(add_words(write("a", sd1, "to_q"), CAT))).save(tmp_path / "mix.safetensors")
    assert read_header(file).metadata["sshs_model_hash"] == data_sha256(read_header(file))


def test_one_word_with_two_meanings_is_not_saved(sd1, write, tmp_path):
    a = add_words(write("a", sd1, "to_q"), CAT)
    b = add_words(write("b", sd1, "to_q"), {"<cat>": {"text_encoder": torch.zeros(2, 32)}})
    mix = compose(sd1, Adapter(a), Adapter(b))
    with pytest.raises(AdapterError, match="a and b bring different vectors for '<cat>'"):
        mix.save(tmp_path / "mix.safetensors")
    assert not (tmp_path / "mix.safetensors").exists()


def test_a_saved_mix_inherits_trigger_words_and_names_its_parents(sd1, write, tmp_path, originals):
    a, b = write("a", sd1, "to_q"), write("b", sd1, "to_k")
    named = write_tensors(
        tmp_path / "named.safetensors",
        dict(read_tensors(a)),
        {**read_header(a).metadata, "modelspec.trigger_phrase": "a line drawing"},
    )
    weights = {"named": 0.5, "b": Blocks(0.8, {"down": 0.5}), "pair": (0.3, 0.2)}
    files = {"named": named, "b": b, "pair": b}
    mix = compose(fresh(originals["sd1"]), *(Adapter(files[name], weights[name], name=name) for name in files))
    found = read_header(mix.save(tmp_path / "mix.safetensors")).metadata
    assert found["modelspec.trigger_phrase"] == "a line drawing"
    assert [parent["weight"] for parent in json.loads(found["sfumato.parents"])] == [0.5, "0.8 on down:0.5", [0.3, 0.2]]


@pytest.mark.parametrize("way", ["baked", "live"])
def test_a_file_that_is_written_over_in_place_ends_neither_the_process_nor_the_mix(way, sd1, write):
    before, file, other = weights_sha(sd1), write("a", sd1, "to_q"), write("b", sd1, "to_k")
    renamed = write("c", sd1, "to_v")
    mix = compose(sd1, Adapter(file, 0.5), Adapter(other, 0.5), Adapter(renamed, 0.5), way=way)
    write_tensors(renamed, dict(read_tensors(other)), read_header(other).metadata)  # by a rename, as tools save
    file.write_bytes(file.read_bytes()[:100])
    for change in (lambda: mix.set(a=0.7), lambda: mix.set(b=0.7), lambda: mix.mute("a")):
        with pytest.raises(AdapterError, match=r"a\.safetensors: the file was written over while it is mixed in"):
            change()
    assert dict(mix.weights) == {"a": 0.5, "b": 0.5, "c": 0.5}
    mix.remove("a").set(b=0.7, c=0.2)
    mix.undo()
    assert weights_sha(sd1) == before
