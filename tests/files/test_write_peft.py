"""diffusers' and peft's spellings, read back by ourselves, by diffusers and by peft."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close

from sfumato.errors import AdapterError, FileError
from sfumato.files.adapter_file import read_adapter
from sfumato.files.write_difference import write_difference
from sfumato.files.write_dotted import write_diffusers, write_peft


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


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "pocket"])
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
