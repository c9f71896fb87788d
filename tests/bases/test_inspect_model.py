"""What `sfumato inspect` tells of a whole model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sfumato.pipelines import inspect_file

from sfumato.cli import guarded
from sfumato.errors import BaseModelError
from sfumato.merging.sources import adapter_hash
from sfumato.models.inspect import inspect_model, render
from tests.tiny import write_single_file


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_checkpoint_and_a_folder_of_one_model_are_told_alike(family, request):
    made = request.getfixturevalue(family)
    file, folder = inspect_model(made.file), inspect_model(made.folder)
    assert (file.family, folder.family, file.channels, folder.channels) == (family, family, 4, 4)
    assert folder.prediction_type == made.base.prediction_type
    parts = ["unet", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else []), "vae"]
    assert list(file.parts) == [*parts, "others"]
    assert list(folder.parts) == parts
    assert file.parts["unet"] == folder.parts["unet"] == {"F32": len(made.pipe.unet.state_dict())}
    assert file.hash == adapter_hash(made.file)
    assert folder.hash == adapter_hash(made.folder)


def test_what_a_checkpoint_says_and_lacks_is_shown(sdxl, tmp_path):
    metadata = {"modelspec.title": "ink\x07"}
    file = write_single_file(sdxl.pipe, tmp_path / "a.safetensors", ("v_pred", "ztsnr"), metadata)
    shown = render(inspect_model(file)).splitlines()
    assert shown[2:5] == ["family     SDXL", "predicts   v_prediction, zero terminal SNR", "title      ink "]
    tensors = load_file(file)
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    wide = torch.full((unet[first].shape[0], 9, 3, 3), torch.nan)
    save_file({name: tensor.half() for name, tensor in unet.items()} | {first: wide}, tmp_path / "b.safetensors")
    shown = render(inspect_model(tmp_path / "b.safetensors")).splitlines()
    assert shown[1:4] == [
        "kind       a whole model, a checkpoint, which inpaints (9 channels)",
        "family     unknown",
        "predicts   not said, so epsilon is taken",
    ]
    assert shown[4] == f"parts      unet: F16 ({len(unet) - 1}), F32 (1)"
    assert shown[-1] == f"NaN or Inf 1, first {first}"


def test_sd2_s_checkpoint_that_does_not_say_what_it_predicts_is_told_the_option(sd2):
    assert "predicts   not said; name it with --prediction-type" in render(inspect_model(sd2.file)).splitlines()


def test_what_a_folders_scheduler_says_is_told(sd1, tmp_path):
    scheduler = shutil.copytree(sd1.folder, tmp_path / "sd") / "scheduler/scheduler_config.json"
    for text, told in (
        ('{"rescale_betas_zero_snr": true, "prediction_type": "v_prediction"}', "v_prediction, zero terminal SNR"),
        ("{}", "epsilon"),
    ):
        scheduler.write_text(text)
        assert f"predicts   {told}" in render(inspect_model(tmp_path / "sd")).splitlines()
    scheduler.unlink()
    assert "predicts   not said, so epsilon is taken" in render(inspect_model(tmp_path / "sd")).splitlines()


def test_a_folder_that_is_not_whole_is_one_line(sd1, tmp_path, capsys):
    folder = shutil.copytree(sd1.folder, tmp_path / "sd")
    assert guarded(inspect_file.main, [str(folder)]) == 0
    assert "kind       a whole model, a diffusers folder" in capsys.readouterr().out
    for file in (folder / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert guarded(inspect_file.main, [str(folder)]) == 2
    assert "sd/vae: only pickled weights" in capsys.readouterr().err


@pytest.mark.parametrize("listed", [[], {}, {"a": []}, {"a": 1, "b": "x"}, {"a": "../x.safetensors"}])
def test_shards_of_no_name_are_one_line(sd1, tmp_path, listed):
    folder = Path(shutil.copytree(sd1.folder, tmp_path / "base"))
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(BaseModelError, match="lists no files of this folder"):
        inspect_model(folder)


def test_a_unets_config_of_other_kinds_is_no_traceback(sd1, tmp_path):
    folder = Path(shutil.copytree(sd1.folder, tmp_path / "base"))
    file = folder / "unet/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"in_channels": [4]}))
    assert inspect_model(folder).channels is None
    file.write_text(json.dumps(config | {"down_block_types": 5}))
    with pytest.raises(BaseModelError, match="down_block_types is 5; wanted a list of names"):
        inspect_model(folder)
    file.write_text("[" * 5000)
    with pytest.raises(BaseModelError, match="not readable as JSON"):
        inspect_model(folder)
