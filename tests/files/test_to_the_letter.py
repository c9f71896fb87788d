"""What is written into files and said about them, to the letter; and the tables by which names are told."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import AdapterError, ConfigError, FileError
from sfumato.files import read_header, read_tensors, write_tensors
from sfumato.files.adapter_file import read_adapter
from sfumato.files.atomic import atomic_path, check_free, write_text
from sfumato.files.embedding_file import read_embedding
from sfumato.files.embedding_keys import EmbeddingKey, embedding_key
from sfumato.files.family import family_from_metadata, family_from_widths
from sfumato.files.fingerprint import Comparison, check, compare, fingerprint, verify
from sfumato.files.inspect import Block, Inspection, block_of, inspect_file, render
from sfumato.files.keys import describe_foreign
from sfumato.files.kinds import base_kind, is_whole, kind_of, rank_of, weight_shape
from sfumato.files.kohya import kohya_name, kohya_target
from sfumato.files.lora_file import LoraModule, read_lora
from sfumato.files.metadata import Description, count_tags, describe, moment, short_hash, trigger_words
from sfumato.files.settings import PeftSettings, checked, parse_object
from sfumato.files.sniff import foreign
from sfumato.files.write import write_lora
from sfumato.files.write_difference import write_difference
from sfumato.files.write_dotted import write_diffusers, write_peft
from sfumato.files.write_embedding import add_words, write_embedding

TO_K = ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")
NOTHING = "there are no modules to write; the adapter is attached to nothing."


def said(work, *given, **more):
    """The line that the call ends with."""
    with pytest.raises((AdapterError, FileError, ConfigError)) as ended:
        work(*given, **more)
    return str(ended.value)


# What a file is


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"\x80\x01.", "this is no safetensors file"),
        (b"\x80\x02}", "this is a pickle file (.ckpt/.pt/.bin); a pickle can run programs, so it was not opened. "),
        (b"\x80\x06}", "this is no safetensors file"),
        (b"cos\nmkdir\n", "this is a pickle file"),
        (b"(dp0\n", "this is a pickle file"),
        (b"}q\x00", "this is a pickle file"),
        (b"]q\x00", "this is a pickle file"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "this is a PyTorch .ckpt/.pt file, a zip with a pickle in"),
        (b"PK\x03\x04" + bytes(26) + b"archive/version", "this is a PyTorch .ckpt/.pt file"),
        (bytes(257) + b"ustar\x0000", "this is a tar archive, as early PyTorch wrote with a pickle in it; a"),
        (b"GIF89a\x01\x02\xff", "this is a GIF picture, not a weight file. Name the .safetensors file it belongs to."),
        (b"RIFF\x01\x02\x03\x04WAVE\xff\xfe\xfd", "this is no safetensors file"),
        (b"7z\xbc\xaf\x27\x1c", "this is a 7z archive, not a weight file. Unpack it"),
        (b"Rar!\x1a", "this is a RAR archive"),
        (b"\xfd7zXZ", "this is an xz archive"),
        (b"BZh9", "this is a bzip2 archive"),
        (b"\x28\xb5\x2f\xfd", "this is a zstd archive"),
        (b"\x89HDF\r\n\x1a\n", "this is an HDF5 file; only safetensors files are read. Take the .safetensors version"),
        (bytes(5), "the file begins with 5 zero bytes"),
        (b"\t<?xml version", "this is a web page"),
        (b"<!-- x", "this is a web page"),
        (b"<pre>", "this is a text file"),
        (b"{\xff\xfe\xfd\xfc", "this is no safetensors file"),
        (b"a\tb\r\nc", "this is a text file"),
        (b"a\x01b...", "this is no safetensors file"),
    ],
)  # fmt: skip
def test_the_first_bytes_tell(head, what):
    assert foreign(head).startswith(what)


def test_a_pickle_s_advice_is_whole():
    assert foreign(b"\x80\x04").endswith(
        "a pickle can run programs, so it was not opened. Take the .safetensors version of it, or convert it on a "
        "machine you can throw away."
    )


def test_a_name_that_is_none(tmp_path):
    for name in "abcde":
        (tmp_path / f"{name}.safetensors").touch()
    assert said(read_header, tmp_path) == (
        f"{tmp_path.name}: this is a folder. Name the .safetensors file in it. It holds a.safetensors, b.safetensors, "
        "c.safetensors."
    )
    (tmp_path / "empty").mkdir()
    assert said(read_header, tmp_path / "empty") == "empty: this is a folder. Name the .safetensors file in it."
    assert said(read_header, tmp_path / "empty/a.safetensors") == (
        "a.safetensors: there is no such file. Check the name and the folder."
    )
    (tmp_path / "line.safetensors").touch()
    assert said(read_header, tmp_path / "lime.safetensors") == (
        "lime.safetensors: there is no such file. Did you mean line.safetensors?"
    )
    assert said(read_header, tmp_path / "nowhere/a") == "a: there is no such file. Check the name and the folder."
    os.mkfifo(tmp_path / "pipe")
    assert said(read_header, tmp_path / "pipe") == (
        "pipe: this is a device or a pipe, not a file. Name a .safetensors file."
    )
    assert said(read_header, "a\0b") == (
        "'a\\x00b': the file cannot be read (embedded null byte). Check its name and permissions."
    )
    assert said(read_header, tmp_path / ("x" * 300)) == (
        f"{'x' * 300!r}: the file cannot be read (File name too long). Check its name and permissions."
    )


@pytest.mark.parametrize(
    ("value", "kind"),
    [("[]", "a list"), ("{}", "an object"), ("true", "a truth value"), ("null", "nothing"), ("1.5", "a number")],
)
def test_what_stands_in_place_of_a_text_is_named(value, kind, tmp_path):
    text = f'{{"__metadata__":{{"a":{value}}},"w":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'.encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert said(read_header, tmp_path / "a") == f"a: __metadata__ 'a' is {kind}, wanted a text. Save it again."


def test_what_cannot_be_mapped_or_has_no_numbers(tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    header = read_header(path)
    path.unlink()
    assert said(read_tensors, path, header=header).startswith("a.safetensors: the file could not be mapped (")
    save_file({"v": torch.ones(1), "w": torch.tensor([1.0, float("nan")])}, path)
    assert said(read_tensors, path) == (
        "a.safetensors: 1 of 2 tensors hold NaN or Inf, first w. The training that wrote it diverged; use an earlier "
        "save."
    )
    assert read_tensors(path, ["v"])["v"].tolist() == [1.0]


# Writing


def test_what_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    assert said(write_tensors, path, {"w": torch.tensor(float("inf"))}) == (
        "a.safetensors: w holds NaN or Inf, so the file was not written. Use an earlier save."
    )
    for value in (torch.ones(2, 0), torch.ones(1, dtype=torch.complex64)):
        assert said(write_tensors, path, {"n" * 90: value}) == (
            f"a.safetensors: {'n' * 80!r} ({value.dtype}, {list(value.shape)}) cannot be written; wanted a tensor that "
            "is not empty, of a common dtype."
        )
    assert said(write_tensors, path, {}) == "a.safetensors: there are no tensors to write."

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert said(write_tensors, path, {"w": torch.ones(1)}) == (
        "a.safetensors: the file could not be written (No space left on device). Make room or name another folder; an "
        "earlier file of the name is untouched."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_whole_and_beside_its_place(tmp_path):
    place = tmp_path / "new/folder/picture.png"
    with atomic_path(place) as temporary:
        assert (temporary.parent, temporary.suffix) == (place.parent, ".png")
        assert temporary.name.startswith(".picture.")
        temporary.write_bytes(b"1")
        assert not place.exists()
    assert place.read_bytes() == b"1"
    write_text(place, "ä\n")
    assert place.read_bytes() == b"\xc3\xa4\n"
    assert list(place.parent.iterdir()) == [place]
    assert said(check_free, place, False) == (
        f"--output {place}: exists already; name another place, or say --overwrite."
    )
    check_free(place, True)
    check_free(tmp_path / "free", False)


def test_a_lora_that_is_not_written(two_modules, tmp_path):
    path, module = tmp_path / "a.safetensors", next(iter(two_modules.values()))
    dotted = ".".join(TO_K)
    for write in (write_lora, write_diffusers):
        assert said(write, path, {}, family="sd1") == f"a.safetensors: {NOTHING}"
    assert said(write_peft, tmp_path / "a", {}, family="sd1") == f"a: {NOTHING}"
    assert said(write_difference, path, {}, family="sd1") == f"a.safetensors: {NOTHING}"
    biased = {**two_modules, TO_K: replace(module, bias_delta=torch.ones(4))}
    assert said(write_lora, path, biased, family="sd1") == (
        f"a.safetensors: 1 of 2 modules change a bias, first {dotted}, which this grammar cannot hold. Write them for "
        "diffusers or peft, or bake them into a checkpoint."
    )
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    broken = {TO_K: replace(module, up=module.up * float("nan"))}
    assert said(write_lora, path, broken, family="sd1") == (
        f"a.safetensors: {name}.lora_up holds NaN or Inf, so the file was not written. The training diverged; use an "
        "earlier save."
    )
    large = {TO_K: replace(module, down=torch.full((2, 768), -7e4))}
    assert said(write_lora, path, large, family="sd1", dtype=torch.float16) == (
        f"a.safetensors: {name}.lora_down overflows float16 (largest value 7e+04). Save in fp32 or bf16."
    )
    assert said(write_lora, path, two_modules, family="sd1", metadata={"note": "x" * 100_000}).endswith(
        " bytes, at most 100,000 are written; shorten note."
    )
    twice = {("text_encoder", f"{level}encoder.layers.0.mlp.fc1"): module for level in ("", "text_model.")}
    one = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert said(write_lora, path, twice, family="sd1") == (
        f"a.safetensors: two modules are both called {one} in the file; give each module once."
    )
    whole = write_difference(path, {TO_K: (torch.ones(2, 2), None)}, family="sd1", metadata={"ss_seed": "1"})
    kept = {key: text for key, text in read_header(whole).metadata.items() if "hash" not in key}
    assert kept.pop("sfumato.fingerprint")
    assert kept == {"ss_seed": "1", "ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo":"full"}'}
    whole.unlink()
    deltas = {target: (torch.ones(2, 2), None) for target in twice}
    assert said(write_difference, path, deltas, family="sd1") == (
        f"a.safetensors: two modules are both called {one} in the file; give each module once."
    )
    assert list(tmp_path.iterdir()) == []


def test_names_that_other_tools_lack():
    tail = "has no name in other tools, so a file with it could not be loaded. Choose --targets without it."
    assert said(kohya_name, "sd1", "unet", "encoder_hid_proj") == f"unet module encoder_hid_proj {tail}"
    assert said(kohya_name, "sd1", "text_encoder", "pooler") == f"text_encoder module pooler {tail}"
    assert said(kohya_name, "sd1", "text_encoder_2", "x") == (
        "text_encoder_2 is no part of SD 1.x; its parts are unet, text_encoder."
    )
    assert said(kohya_name, "sdxl", "vae", "x") == (
        "vae is no part of SDXL; its parts are unet, text_encoder, text_encoder_2."
    )


def test_peft_s_folder_to_the_letter(two_modules, tmp_path, monkeypatch):
    (first, module), (second, other) = two_modules.items()
    wider = replace(other, down=torch.ones(3, 768), up=torch.ones(4, 3), alpha=3.0, bias_delta=torch.ones(4))
    third = ("unet", "down_blocks.0.resnets.0.conv1")
    more = LoraModule(torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1), 2.0)
    place = write_peft(tmp_path / "a", {first: module, second: wider, third: more}, family="sd1", metadata={"k": "v"})
    text = (place / "adapter_config.json").read_text()
    assert json.loads(text) == {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {
            "base_model_class": "UNet2DConditionModel",
            "parent_library": "diffusers.models.unets.unet_2d_condition",
        },
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {f"^{second[1]}": 3},
        "alpha_pattern": {f"^{second[1]}": 3},
        "target_modules": sorted([first[1], second[1], third[1]]),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": True,
        "use_rslora": False,
        "use_dora": False,
    }
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    header = read_header(place / "adapter_model.safetensors")
    assert set(header.metadata) == {"k", "sfumato.fingerprint"}
    shapes = {name.removeprefix("base_model.model."): info.shape for name, info in header.tensors.items()}
    assert shapes == {
        f"{first[1]}.lora_A.weight": (2, 768),
        f"{first[1]}.lora_B.weight": (4, 2),
        f"{first[1]}.lora_B.bias": (4,),
        f"{second[1]}.lora_A.weight": (3, 768),
        f"{second[1]}.lora_B.weight": (4, 3),
        f"{second[1]}.lora_B.bias": (4,),
        f"{third[1]}.lora_A.weight": (2, 4, 3, 3),
        f"{third[1]}.lora_B.weight": (8, 2, 1, 1),
        f"{third[1]}.lora_B.bias": (8,),
    }
    assert said(write_peft, place, two_modules, family="sd1") == (
        "a: exists already, and folders are not written over. Name another one."
    )

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert said(write_peft, tmp_path / "b", two_modules, family="sd1") == (
        "adapter_model.safetensors: the file could not be written (No space left on device). Make room or name another "
        "folder; an earlier file of the name is untouched."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


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
        " bytes, at most 100,000 are written."
    )
    assert said(write_embedding, path, "<x>", {"text_encoder": torch.full((1, 4), float("nan"))}) == (
        "a.safetensors: vectors hold NaN or Inf, so the file was not written. Use an earlier save."
    )
    metadata = {"ss_network_dim": "4", "ss_seed": "1", "modelspec.architecture": "stable-diffusion-v1/lora"}
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
    add_words(path, {"<x>": one, "<y>": both})
    names = {name for name in read_header(path).tensors if name.startswith("bundle_emb")}
    assert names == {
        "bundle_emb.<x>.string_to_param.*",
        "bundle_emb.<y>.clip_l",
        "bundle_emb.<y>.clip_g",
    }
    assert read_header(path).metadata["sshs_model_hash"][:12] == short_hash(
        write_tensors(tmp_path / "b", load_file(path))
    )


# What a file says of itself


def test_all_that_can_be_said_is_said(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    description = Description(
        **{"title": "line", "family": "sd2", "base": "base-2", "prediction_type": "v_prediction"},
        **{"resolution": (512, 768), "images": 16, "steps": 400, "epochs": 25, "batch": 4, "seed": 7},
        **{"learning_rate": 1e-4, "optimizer": "adamw", "trigger": ["zwx style", "b"], "started": 5.0},
        **{"captions": ["a crab, ink", "ink, a crab ,"], "text": "of lines", "author": "somebody", "license": "cc0"},
        **{"tags": ["line", "ink"], "usage_hint": "0.8", "config": {"rank": 4, "ä": None}, "dataset_sha256": "ab"},
        parents=[{"name": "one", "weight": 0.5}, {"name": "two", "weight": 1}],
        extra={"more": "x", "ss_seed": "8"},
    )
    assert describe(description) == {
        "ss_v2": "True",
        "ss_base_model_version": "sd_v2_v",
        "ss_network_module": "networks.lora",
        "ss_network_args": "{}",
        "ss_output_name": "line",
        "ss_sd_model_name": "base-2",
        "ss_resolution": "(512, 768)",
        "ss_num_train_images": "16",
        "ss_steps": "400",
        "ss_max_train_steps": "400",
        "ss_num_epochs": "25",
        "ss_total_batch_size": "4",
        "ss_seed": "8",
        "ss_learning_rate": "0.0001",
        "ss_optimizer": "adamw",
        "ss_training_started_at": "1700000000.0",
        "ss_tag_frequency": '{"line":{"a crab":2,"ink":2}}',
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "line",
        "modelspec.resolution": "512x768",
        "modelspec.description": "of lines",
        "modelspec.author": "somebody",
        "modelspec.date": "2023-11-14T22:13:20Z",
        "modelspec.license": "cc0",
        "modelspec.usage_hint": "0.8",
        "modelspec.tags": "line, ink",
        "modelspec.trigger_phrase": "zwx style, b",
        "modelspec.prediction_type": "v",
        "modelspec.merged_from": "one, two",
        "sfumato.version": sfumato.__version__,
        "sfumato.config": '{"rank":4,"ä":null}',
        "sfumato.dataset_sha256": "ab",
        "sfumato.trigger": '["zwx style","b"]',
        "sfumato.parents": '[{"name":"one","weight":0.5},{"name":"two","weight":1}]',
        "more": "x",
    }
    assert said(describe, replace(description, family="flux")) == (
        "unknown family 'flux'; known are pocket, sd1, sd2, sdxl."
    )
    assert said(describe, replace(description, prediction_type="sample")) == (
        "unknown prediction type 'sample'; known are epsilon, v_prediction."
    )


def test_little_that_can_be_said_is_said(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert describe(Description("n", "sd1", started=86_400.5)) == {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_args": "{}",
        "ss_output_name": "n",
        "ss_training_started_at": "86400.5",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "n",
        "modelspec.date": "1970-01-02T00:00:00Z",
        "modelspec.prediction_type": "epsilon",
        "sfumato.version": sfumato.__version__,
    }
    assert moment(5.0) == 5.0
    monkeypatch.setattr("time.time", lambda: 7.0)
    assert moment() == 7.0
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "x")
    assert said(moment) == "SOURCE_DATE_EPOCH is 'x'; wanted whole seconds since 1970."


def test_the_most_frequent_tags_first():
    assert list(count_tags(["b, a", "b,,c ", "a,b"]).items()) == [("b", 3), ("a", 2), ("c", 1)]
    assert len(count_tags([f"tag {n}" for n in range(300)])) == 200


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, []),
        ({"sfumato.trigger": '["a, b"]', "modelspec.trigger_phrase": "c"}, ["a, b"]),
        ({"sfumato.trigger": "[1]", "modelspec.trigger_phrase": "c , ,d"}, ["c", "d"]),
        ({"sfumato.trigger": "{}", "modelspec.trigger_phrase": "c"}, ["c"]),
        ({"sfumato.trigger": "[" * 100_000, "modelspec.trigger_phrase": "c"}, ["c"]),
    ],
)
def test_words_that_call_it_up(metadata, words):
    assert trigger_words(metadata) == words


def test_a_stated_hash_is_taken_if_it_is_one(tmp_path):
    stated = "0123456789abcdef" * 4
    for text, taken in ((stated, True), (stated[:-1], False), (stated.upper(), False), (stated + "0", False)):
        path = write_tensors(tmp_path / "a", {"w": torch.ones(1)}, {"sshs_model_hash": text})
        assert (short_hash(path) == stated[:12]) is taken
        assert (short_hash(str(path)) == short_hash(read_header(path))) is True


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({}, None),
        ({"ss_base_model_version": "sd_v1"}, "sd1"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ({"ss_base_model_version": "sdxl_base_v0-9"}, "sdxl"),
        ({"ss_base_model_version": "sd_v2_other"}, "sd2"),
        ({"ss_base_model_version": "sd_v1_other"}, "sd1"),
        ({"ss_base_model_version": "sfumato_pocket"}, "pocket"),
        ({"ss_base_model_version": "flux"}, None),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/textual-inversion"}, "sdxl"),
        ({"modelspec.architecture": "flux"}, None),
        ({"ss_v2": "True"}, "sd2"),
        ({"ss_v2": "False"}, None),
    ],
)
def test_the_family_that_the_metadata_say(metadata, family):
    assert family_from_metadata(metadata) == family


def test_the_family_that_the_widths_tell():
    assert [family_from_widths([width, width]) for width in (768, 1024, 2048, 96)] == ["sd1", "sd2", "sdxl", None]
    assert family_from_widths([768, 2048]) is None
    assert family_from_widths([]) is None
    assert family_from_widths([], second_encoder=True) == "sdxl"
    assert family_from_widths([96], second_encoder=True) is None


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["model.diffusion_model.x"], "a full checkpoint"),
        (["cond_stage_model.x", "a.b"], "a full checkpoint"),
        (["conditioner.embedders.0"], "a full checkpoint"),
        (["transformer.x.y"], "an adapter for a transformer model (Flux, SD 3 and the like)"),
        (["lora_unet_joint_blocks_0"], "an adapter for a transformer model (Flux, SD 3 and the like)"),
        (["lora_te3_x"], "an adapter for a transformer model (Flux, SD 3 and the like)"),
        (["diffusion_model.layers.0.x"], "an adapter for a transformer model (Flux, SD 3 and the like)"),
        (["conv_in.weight", "time_embedding.linear_1.weight"], "a whole U-Net"),
        (["conv_in.weight", "a.b"], None),
        (["decoder.conv_in.weight", "a.b"], "a VAE"),
        (["text_model.embeddings.token_embedding.weight"], "a whole text encoder"),
        (["clip_l", "clip_g"], "a textual inversion"),
        (["emb_params"], "a textual inversion"),
        (["a", "b", "c", "<d.e>"], "a textual inversion"),
        (["a", "b", "c", "d", "e"], None),
        (["a.b.c"], None),
    ],
)
def test_what_is_no_adapter_is_named(names, what):
    assert describe_foreign(names) == what


@pytest.mark.parametrize(
    ("name", "bundled", "key"),
    [
        ("clip_g", False, ("", "text_encoder_2")),
        ("clip_l", True, ("", "text_encoder")),
        ("string_to_token.*", False, ("", None)),
        ("string_to_token.*", True, None),
        ("<cat>", False, ("<cat>", "")),
        ("<cat>", True, None),
        ("easynegative-v1.1", False, ("easynegative-v1.1", "")),
        ("a.b.c", False, None),
        ("<a.b.c>", False, ("<a.b.c>", "")),
        ("a.weight", False, None),
        ("clip_l_out", False, None),
        ("bundle_emb.cat", True, ("cat", "")),
        ("bundle_emb.cat.clip_g", True, ("cat", "text_encoder_2")),
        ("bundle_emb.cat.string_to_param.*", True, ("cat", "text_encoder")),
        ("bundle_emb.cat.string_to_token.*", True, ("cat", None)),
        ("bundle_emb.", True, None),
        ("bundle_emb..clip_g", True, None),
        ("bundle_emb.cat.other", True, None),
    ],
)
def test_whose_vectors_a_name_says_they_are(name, bundled, key):
    assert embedding_key(name, bundled=bundled) == (None if key is None else EmbeddingKey(*key))


# Kinds


@pytest.mark.parametrize(
    ("roles", "kind", "whole"),
    [
        ("down up alpha", "LoRA", True),
        ("down", "LoRA", False),
        ("down up magnitude", "DoRA", True),
        ("magnitude", "DoRA", False),
        ("hada_w1_a peft_magnitude", "DoRA of LoHa", False),
        ("oft_blocks", "OFT", True),
        ("oft_r down", "LoRA + OFT", True),
        ("bias", "difference", True),
        ("alpha", "", True),
    ],
)
def test_roles_make_a_kind(roles, kind, whole):
    assert kind_of(roles.split()) == kind
    assert is_whole(kind, roles.split()) is whole


def test_four_dimensions_make_oft_boft():
    assert [kind_of(["oft_blocks"], dimensions) for dimensions in (None, 3, 4)] == ["OFT", "OFT", "BOFT"]
    assert is_whole("BOFT", ["oft_blocks"])
    assert not is_whole("BOFT", ["boft_r"])
    assert [base_kind(kind) for kind in ("DoRA", "DoRA of LoKr", "OFT")] == ["LoRA", "LoKr", "OFT"]


@pytest.mark.parametrize(
    ("shapes", "weight", "rank"),
    [
        ({"down": (2, 8), "up": (6, 2)}, (6, 8), 2),
        ({"up": (6, 2)}, (6, None), None),
        ({"down": (2, 8)}, (None, 8), 2),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 8)}, (6, 8), 2),
        ({"hada_w1_a": (2, 6), "hada_w1_b": (2, 8), "hada_t1": (2, 2, 3, 3)}, (6, 8), 2),
        ({"lokr_w1": (2, 4), "lokr_w2": (3, 5)}, (6, 20), None),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (3, 7), "lokr_w2_b": (7, 5)}, (6, 20), 7),
        ({"lokr_w1": (2, 4), "lokr_w2_a": (7, 3), "lokr_w2_b": (7, 5), "lokr_t2": (7, 7, 3, 3)}, (6, 20), 7),
        ({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 4), "lokr_w2": (3, 5)}, (6, 20), 1),
        ({"lokr_w1": (2, 4)}, (None, None), None),
        ({"diff": (6, 8)}, (6, 8), None),
        ({"set_weight": (6, 8, 3, 3)}, (6, 8), None),
        ({"diff": (6,)}, (6, None), None),
        ({"a1": (8, 2), "a2": (2, 8), "b1": (6, 2), "b2": (2, 8)}, (6, 8), 2),
        ({"a1": (2, 8), "a2": (8, 2), "b1": (2, 8), "b2": (6, 2)}, (6, 8), 2),
        ({"oft_blocks": (2, 3, 3)}, (6, None), 3),
        ({"oft_blocks": (5, 2, 3, 3)}, (6, None), 3),
        ({"oft_r": (2, 6)}, (None, None), 4),
        ({"boft_r": (1, 2, 5, 5), "boft_s": (6,)}, (None, None), 5),
        ({"down": (), "up": ()}, (None, None), None),
    ],
)
def test_what_the_shapes_tell(shapes, weight, rank):
    assert weight_shape(shapes) == weight
    assert rank_of(shapes) == rank


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("conv_in", "input_blocks_0_0"),
        ("conv_norm_out", "out_0"),
        ("add_embedding.linear_2", "label_emb_0_2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks_5_2_conv"),
        ("mid_block.attentions.0.proj_in", "middle_block_1_proj_in"),
        ("mid_block.resnets.0.conv1", "middle_block_0_in_layers_2"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block_2_emb_layers_1"),
        ("down_blocks.1.resnets.1.conv_shortcut", "input_blocks_5_0_skip_connection"),
        ("up_blocks.2.resnets.0.norm2", "output_blocks_6_0_out_layers_0"),
        ("down_blocks.2.attentions.0.transformer_blocks.3.attn2.to_out.0",
         "input_blocks_7_1_transformer_blocks_3_attn2_to_out_0"),
        ("up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
         "output_blocks_1_1_transformer_blocks_0_ff_net_0_proj"),
    ],
)  # fmt: skip
def test_sdxl_goes_by_sgm_s_blocks(path, name):
    assert kohya_name("sdxl", "unet", path) == f"lora_unet_{name}"
    assert kohya_target(f"lora_unet_{name}") == ("unet", path)
    flat = path.replace(".", "_")
    assert kohya_name("sd1", "unet", path) == f"lora_unet_{flat}"
    assert kohya_target(f"lora_unet_{flat}") == ("unet", path)


@pytest.mark.parametrize(
    "name",
    [
        *("lora_unet_input_blocks_3_0_in", "lora_unet_input_blocks_3_1_op", "lora_unet_middle_block_3_proj_in"),
        *("lora_unet_middle_block_0_proj_in", "lora_unet_output_blocks_1_2_conv", "lora_unet_output_blocks_2_0_conv"),
        *("lora_te_text_projection", "lora_te1_text_projection", "unet_conv_in", "lora_te2_text_model_encoder"),
    ],
)
def test_names_of_no_module(name):
    assert kohya_target(name) is None


def test_text_encoders_by_number():
    layer = "encoder.layers.3.self_attn.out_proj"
    flat = "text_model_encoder_layers_3_self_attn_out_proj"
    assert kohya_target(f"lora_te_{flat}") == kohya_target(f"lora_te1_{flat}") == ("text_encoder", layer)
    assert kohya_target(f"lora_te2_{flat}") == ("text_encoder_2", f"text_model.{layer}")
    assert kohya_target("lora_te2_text_projection") == ("text_encoder_2", "text_projection")
    assert kohya_name("sdxl", "text_encoder_2", "text_projection") == "lora_te2_text_projection"
    assert kohya_name("sdxl", "text_encoder", layer) == f"lora_te1_{flat}"


# Looking into a file

LOOKED_AT = Inspection(
    file="a\x07.safetensors", bytes=1_250_000, tensors=1234, dtypes={"F16": 1200, "F32": 34}, kind="LoRA + DoRA",
    family="sd1", says="sdxl", spelling=["kohya", "diffusers"], modules=3, targets={"unet attn1.to_k": 2, "unet ff": 1},
    ranks={"4": 2, "8": 1}, alphas={}, norm=12.3456, stored=["DoRA"],
    blocks=[Block("down_blocks.0", 2, 6.0), Block("mid_block", 1, 3.0), Block("up", 10, float("inf"))],
    trigger=["zwx", "b" * 300], base=None, hash="0123456789ab", hash_holds=False, nonfinite=["x", "y", "z", "w"],
    embeddings={"<a>": 2}, unknown=["odd"], incomplete=["half"], metadata={},
)  # fmt: skip


def test_the_whole_of_what_is_shown():
    assert render(LOOKED_AT) == (
        "file       a .safetensors, 1.25 MB\n"
        "tensors    1,234: F16 (1200), F32 (34)\n"
        "kind       LoRA + DoRA\n"
        "family     SD 1.x, but its metadata says SDXL\n"
        "base       -\n"
        f"trigger    zwx, {'b' * 197}...\n"
        "spelling   kohya, diffusers\n"
        "modules    3\n"
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
        f"down_blocks.0        2         6  {'█' * 24}\n"
        f"mid_block            1         3  {'█' * 12}\n"
        "up                  10       inf"
    )
    plain = replace(LOOKED_AT, family=None, says=None, hash_holds=None, norm=None, blocks=[], embeddings={})
    lines = render(replace(plain, nonfinite=[], unknown=[], incomplete=[], trigger=[], spelling=[])).splitlines()
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


# Reading strictly


def test_what_is_no_adapter_of_ours(tmp_path):
    def of(names, **kwargs):
        save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "a.safetensors")
        return said(read_adapter, tmp_path / "a.safetensors", **kwargs)

    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    dotted = f"unet.{TO_K[1]}"
    assert of(["emb_params"]) == (
        "a.safetensors: this is a textual inversion (1 tensors), not an adapter. Read it with read_embedding."
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
        f"a.safetensors: 1 of 2 modules are not whole, first {half}.hada_w1_a, of whose LoHa there are 1 tensors. Take "
        "the file from its source again, or accept the rest with partial=True (--partial)."
    )
    save_file({name: torch.ones(2, 2, dtype=torch.int8) for name in pair}, tmp_path / "a.safetensors")
    assert said(read_adapter, tmp_path / "a.safetensors") == (
        f"a.safetensors: {pair[0]} is I8; wanted floating point. Quantised adapters are not read; take the file in "
        "half or single precision."
    )


def test_what_is_no_lora_alone(tmp_path):
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"
    pair = {f"{flat}k.lora_down.weight": torch.ones(2, 8), f"{flat}k.lora_up.weight": torch.ones(6, 2)}
    path = tmp_path / "a.safetensors"
    save_file(pair | {f"{flat}v.diff": torch.ones(6, 8)}, path)
    assert said(read_lora, path) == (
        "a.safetensors: the file holds difference in 1 modules of 2; wanted a LoRA. Convert it to a LoRA."
    )
    save_file(pair | {f"{flat}k.diff_b": torch.ones(6)}, path)
    assert said(read_lora, path) == (
        "a.safetensors: the file holds 1 changes of a bias as well; wanted a LoRA alone. Take another file."
    )
    save_file(pair | {"bundle_emb.<x>.clip_l": torch.ones(1, 768)}, path)
    assert said(read_lora, path) == (
        "a.safetensors: the file holds the vectors of 1 tokens as well; wanted a LoRA alone. Take another file."
    )


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


def test_settings_that_make_no_sense():
    target = ("unet", "a.to_q")
    assert said(PeftSettings("s", {"unet.lora_alpha": True}).alpha, target, 4) == (
        "s gives unet.lora_alpha as True, wanted a number. Save it again."
    )
    assert said(PeftSettings("s", {"unet.alpha_pattern": {"a|b": 3}}).alpha, target, 4) == (
        "s: alpha_pattern has the regular expression 'a|b', which is not run; wanted the names of modules. Save it "
        "with them."
    )
    assert said(parse_object, "[]", "s") == "s is not a JSON object. Save the file again."
    assert said(parse_object, "[" * 100_000, "s") == "s is not a JSON object. Save the file again."
    assert said(checked, {"unet.init_lora_weights": "PiSSA_niter_4"}, "s") == (
        "s: init_lora_weights is 'PiSSA_niter_4', so the adapter belongs to a base that peft changed before training. "
        "Save it with path_initial_model_for_weight_conversion."
    )
    assert said(checked, {"unet.use_qalora": True}, "s") == (
        "s: use_qalora is set, which is not read. Merge it with peft itself."
    )
    fine = {"unet.init_lora_weights": "gaussian", "unet.fan_in_fan_out": False, "a": True}
    assert checked(fine, "s") == fine


def test_settings_that_make_sense():
    def alpha(**values):
        return PeftSettings("s", {f"unet.{key}": value for key, value in values.items()}).alpha(("unet", "b.a.to_q"), 4)

    assert alpha() == 4
    assert alpha(lora_alpha=8) == 8
    assert alpha(lora_alpha=999_999_999) == 999_999_999
    assert "wanted a number" in said(alpha, lora_alpha=10**9)
    assert alpha(alpha=2, lora_alpha=8) == 2
    assert alpha(lora_alpha=8, use_rslora=True) == 16
    assert alpha(lora_alpha=8, use_rslora="yes") == 8
    for pattern, taken in {
        "to_q": True, "a.to_q": True, "^to_q": False, "^b.a.to_q": True, "b\\.a\\.to_q$": True, "o_q": False,
    }.items():  # fmt: skip
        assert alpha(lora_alpha=8, alpha_pattern={"other": 1, pattern: 3}) == (3 if taken else 8), pattern
    settings = PeftSettings("s", {"unet.r": 6, "unet.rank_pattern": {"to_k": 5}, "text_encoder.r": 0})
    assert [settings.rank(("unet", f"a.to_{x}"), 4) for x in "qk"] == [6, 5]
    assert settings.rank(("text_encoder", "a"), 4) == 4
    assert settings.rank(("text_encoder_2", "a"), 4) == 4
    assert settings.get(("unet", "x"), "r") == 6
    assert settings.get(("vae", "x"), "r") is None


def test_folders_of_peft_to_the_letter(two_modules, tmp_path):
    place = write_peft(tmp_path / "a", two_modules, family="sd1")
    config, weights = place / "adapter_config.json", place / "adapter_model.safetensors"
    whole = config.read_text()
    config.write_text(whole.replace("LORA", "VERA"))
    assert said(read_adapter, place) == (
        "a/adapter_config.json: peft_type is 'VERA'; read are LORA, LOHA, LOKR, OFT, BOFT, IA3. Merge it with peft "
        "itself."
    )
    config.write_bytes(b"\xff")
    assert said(read_adapter, place) == (
        "a/adapter_config.json: the file cannot be read as text ('utf-8' codec can't decode byte 0xff in position 0: "
        "invalid start byte). Save the adapter again."
    )
    config.write_text(" " * 1_000_001)
    assert said(read_adapter, place) == (
        "a/adapter_config.json: the file has more than 1,000,000 bytes. No config needs that; do not trust it."
    )
    config.write_text(whole + " " * (1_000_000 - len(whole)))
    assert len(read_adapter(place).changes) == 2
    weights.rename(place / "b.safetensors")
    assert said(read_adapter, place) == (
        "a: there is no adapter_model.safetensors beside adapter_config.json. Save with safe_serialization=True."
    )
    (place / "b.safetensors").rename(weights)
    for part in ("unet", "text_encoder"):
        shutil.copytree(place, tmp_path / "two" / part)
    assert said(inspect_file, tmp_path / "two") == (
        "two: the folder holds an adapter of each of unet, text_encoder. Name one of these folders."
    )


# Fingerprints


def test_what_a_fingerprint_says(two_modules):
    metadata = {"sfumato.fingerprint": fingerprint(two_modules)}
    verify(metadata, two_modules, "a")
    assert said(verify, {}, two_modules, "a") == (
        "a: it states no fingerprint, so it cannot be verified. Leave verify out for it."
    )
    half = {TO_K: two_modules[TO_K]}
    assert said(verify, metadata, half, "a") == (
        "a: its fingerprint is of 2 modules, the file has 1, not the same ones. Modules were added or taken out after "
        "it was written."
    )
    for text in ("", "1", "2" + metadata["sfumato.fingerprint"][1:], "1:x:AAAA", "1:x:" + "/" * 64):
        assert said(check, text, two_modules, "a") == (
            "a: its fingerprint is not readable by this version; compare with --against the source."
        )
    twice = {target: replace(module, alpha=2 * module.alpha) for target, module in two_modules.items()}
    assert said(verify, metadata, twice, "a").startswith("a: it is not the adapter that was written: relative error 0.")


def test_how_far_apart_two_are():
    first = {"a": (3.0, 1.0, 0.0, 2.0), "b": (4.0, 0.0, 1.0, 0.0)}
    assert compare(first, first) == Comparison(0.0, 0.0, "a")
    second = {"a": (3.0, 1.0, 0.0, 2.0), "b": (4.0, 0.0, 1.0, 3.0)}
    apart = (9 / 3) / 16
    found = compare(first, second)
    assert (found.rms, found.worst, found.module) == pytest.approx((apart**0.5 / 2**0.5, apart**0.5, found.module))
    assert found.module == "b"
    assert compare({"a": (3.0, 0, 0, 0)}, {"a": (5.0, 0, 0, 0)}).rms == pytest.approx(2 / 5)
    gone = compare({"a": first["a"], "c": first["b"]}, {"a": first["a"], "d": first["b"]})
    assert (gone.missing, gone.extra, gone.rms) == (("c",), ("d",), 0.0)
    assert compare({"a": first["a"]}, {}) == Comparison(float("inf"), float("inf"), "", ("a",), ())
    tiny = compare({"a": (1e-9, 0, 0, 0), "b": (1.0, 0, 0, 0)}, {"a": (2e-9, 0, 0, 0), "b": (1.0, 0, 0, 0)})
    assert tiny.worst == pytest.approx(1e-9 / (1e-3 * 0.5**0.5), rel=1e-6)
    assert compare({"a": (0.0, 0, 0, 0)}, {"a": (0.0, 0, 0, 0)}).same()


def test_what_is_the_same_and_why_it_is_not():
    assert Comparison(0.01, 0.1, "m").same()
    assert not Comparison(0.0101, 0.1, "m").same()
    assert not Comparison(0.01, 0.101, "m").same()
    assert not Comparison(0.0, 0.0, "m", ("x",)).same()
    assert not Comparison(0.0, 0.0, "m", (), ("x",)).same()
    assert Comparison(0.05, 0.1, "m").same(0.05)
    assert Comparison(0.0123, 0.456, "m").reason() == (
        "relative error 0.012 over all modules, 0.46 in m; at most 0.01 and 0.1 are rounding"
    )
    assert Comparison(0.0, 0.0, "m", (), ("x", "y")).reason() == "0 modules are missing and 2 are new, first x"
    assert Comparison(0.0, 0.0, "m", ("z",), ("x",)).reason() == "1 modules are missing and 1 are new, first z"


def test_a_fingerprint_is_of_names_in_order(two_modules):
    text = fingerprint(two_modules)
    version, digest, numbers = text.split(":")
    assert (version, len(digest), len(numbers)) == ("1", 16, 44)  # two modules of four fp32 in base64
    assert fingerprint(dict(reversed(two_modules.items()))) == text
