"""The scripts in examples/ draw."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.compose import Adapter, compose
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from sfumato.generation.draw import draw
from tests.tiny import tiny_pipeline, write_folder


def hurried(name: str, folder: Path) -> Path:
    """An example as it is, but for its 25 steps."""
    text = (Path(__file__).parents[2] / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("num_inference_steps=25") == 1
    (folder / f"{name}.py").write_text(text.replace("num_inference_steps=25", "num_inference_steps=4"))
    return folder / f"{name}.py"


@pytest.mark.parametrize("name", ["img2img_script", "sdxl_script"])
def test_the_other_example_scripts_run(name, base_folder, loras, tmp_path, monkeypatch):
    script = hurried(name, tmp_path)
    files = [str(loras / f"{file}.safetensors") for file in ("line", "otter")]
    Image.new("RGB", (80, 60), "red").save(tmp_path / "photo.png")
    words = [str(base_folder), *files, str(tmp_path / "photo.png")]
    if name == "sdxl_script":
        pipe = tiny_pipeline("sdxl", shallow=True)
        words = [str(write_folder(pipe, tmp_path / "sdxl")), *(_lora_for(pipe, tmp_path, file) for file in ("a", "b"))]
    monkeypatch.setattr(sys, "argv", [name, *words, str(tmp_path / "out.png")])
    runpy.run_path(str(script), run_name="__main__")
    assert Image.open(tmp_path / "out.png").size[0] >= 32


def _lora_for(pipe: Any, folder: Path, name: str) -> str:
    path = next(path for path, _ in pipe.unet.named_modules() if path.endswith("attn2.to_k"))
    out, inner = pipe.unet.get_submodule(path).weight.shape
    module = LoraModule(torch.ones(1, inner), torch.ones(out, 1), 0.1)
    write_lora(folder / f"{name}.safetensors", {("unet", path): module}, family="sdxl")
    return str(folder / f"{name}.safetensors")


def test_the_example_script_runs(base_folder, loras, tmp_path, monkeypatch, base):
    script = hurried("plain_script", tmp_path)
    files = [str(loras / f"{name}.safetensors") for name in ("line", "otter")]
    monkeypatch.setattr(sys, "argv", ["plain_script.py", str(base_folder), *files, str(tmp_path / "crab.png")])
    runpy.run_path(str(script), run_name="__main__")
    with compose(base, Adapter(files[0], 0.7), Adapter(files[1], 1.0)):
        expected = draw(base, "a crab", 7, steps=4, guidance=7.5, sampler="ddim")[0]
    drawn = np.asarray(Image.open(tmp_path / "crab.png"), dtype=int)
    assert np.abs(drawn - np.asarray(expected, dtype=int)).max() <= 1
