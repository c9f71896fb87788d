"""diffusers' and peft's spellings, read back by ourselves, by diffusers and by peft."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close

from sfumato.errors import AdapterError, FileError
from sfumato.files.adapter_file import read_adapter
from sfumato.files.header import read_header
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_difference
from sfumato.files.writing.peft import write_diffusers, write_peft
from tests.files.said import said


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "pocket"])
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_every_module_comes_back_with_its_delta(family, to, tiny, lora, tmp_path):
    modules = lora(tiny(family).layers())
    if to == "peft":
        path = write_peft(tmp_path / "a", modules, family=family)
    else:
        path = write_diffusers(tmp_path / "a.safetensors", modules, family=family)
    found = read_adapter(path).changes
    assert found.keys() == modules.keys()
    for target, module in modules.items():
        assert_close(found[target].low_rank().delta(), module.delta(), rtol=1e-5, atol=1e-6)


def test_text_encoders_have_the_level_that_older_tools_ask_for(tiny, lora, tmp_path):
    write_diffusers(tmp_path / "a.safetensors", lora(tiny("sdxl").layers()), family="sdxl")
    names = [name for name in load_file(tmp_path / "a.safetensors") if name.startswith("text_encoder")]
    assert {name.split(".")[1] for name in names} == {"text_model"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", pytest.param("sdxl", marks=pytest.mark.slow), "pocket"])
def test_peft_reads_its_folder(family, tiny, lora, tmp_path):
    import copy

    parts = tiny(family)
    modules = {t: m for t, m in lora(parts.layers()).items() if t[0] == "unet"}
    wrapped = PeftModel.from_pretrained(
        copy.deepcopy(parts.parts["unet"]), str(write_peft(tmp_path / "a", modules, family=family))
    )
    layers = dict(wrapped.base_model.model.named_modules())
    for (_, path), module in modules.items():
        assert_close(layers[path].get_delta_weight("default"), module.delta(), rtol=1e-5, atol=1e-6)
    assert sum(hasattr(layer, "lora_A") for layer in layers.values()) == len(modules)


def test_a_bias_is_kept(two_modules, tmp_path):
    biased = {t: replace(m, bias_delta=torch.arange(4.0)) for t, m in list(two_modules.items())[:1]}
    write_diffusers(tmp_path / "a.safetensors", two_modules | biased, family="sd1")
    found = read_adapter(tmp_path / "a.safetensors").changes
    biases = [found[target].bias_delta for target in two_modules]
    assert torch.equal(biases[0], torch.arange(4.0))
    assert biases[1] is None or not biases[1].any()


def test_an_adapter_of_several_parts_is_a_folder_a_part(tiny, lora, tmp_path):
    folder = write_peft(tmp_path / "a", lora(tiny("sdxl").layers()), family="sdxl")
    assert {path.name for path in folder.iterdir()} == {"unet", "text_encoder", "text_encoder_2"}


def test_a_folder_is_not_written_over_and_a_failure_leaves_none(two_modules, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileError, match="exists already"):
        write_peft(tmp_path / "a", two_modules, family="sd1")
    next(iter(two_modules.values())).down[0, 0] = float("nan")
    with pytest.raises(FileError, match="holds NaN or Inf"):
        write_peft(tmp_path / "b", two_modules, family="sd1")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_peft_s_folder_to_the_letter(two_modules, tmp_path, monkeypatch):
    (first, module), (second, other) = two_modules.items()
    wider = replace(other, down=torch.ones(3, 768), up=torch.ones(4, 3), alpha=3.0, bias_delta=torch.ones(4))
    third = ("unet", "down_blocks.0.resnets.0.conv1")
    more = LoraModule(torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1), 2.0)
    # Hashes of another file's bytes, and kohya's words on its network, are not this one's.
    given = {"k": "v", "sshs_model_hash": "0" * 64, "ss_network_dim": "8"}
    place = write_peft(tmp_path / "a", {first: module, second: wider, third: more}, family="sd1", metadata=given)
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


@pytest.mark.parametrize("write", [write_diffusers, write_peft])
def test_parts_that_the_family_lacks_are_not_written(write, two_modules, tmp_path):
    module = next(iter(two_modules.values()))
    with pytest.raises(AdapterError, match=r"text_encoder_2 is no part of SD 1\.x"):
        write(tmp_path / "a", {("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"): module}, family="sd1")


def test_full_differences_come_back_whole(two_modules, tmp_path):
    deltas = {target: (module.delta(), torch.ones(4)) for target, module in two_modules.items()}
    deltas["unet", "conv_norm_out"] = (torch.ones(3), torch.zeros(3))
    found = read_adapter(write_difference(tmp_path / "a.safetensors", deltas, family="sd1")).changes
    assert found.keys() == deltas.keys()
    for target, (weight, bias) in deltas.items():
        assert torch.equal(found[target].delta(torch.zeros_like(weight)), weight)
        assert torch.equal(found[target].bias_delta, bias)
