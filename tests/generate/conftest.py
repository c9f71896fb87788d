"""`sfumato generate` on a tiny base, in an empty folder that has two adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato import cli
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from sfumato.models import load_base
from sfumato.precision import decide
from tests.tiny import tiny_pocket_folder

FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    return tiny_pocket_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base(base_folder) -> Any:
    return load_base(base_folder, precision=decide("auto", device="cpu"))


@pytest.fixture(scope="session")
def loras(tmp_path_factory, base) -> Path:
    """A folder with line.safetensors and otter.safetensors, strong enough to be seen."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("line", "otter")):
        generator = torch.Generator().manual_seed(seed)
        modules = {}
        for path, layer in base.unet.named_modules():
            if path.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
                out, inner = layer.weight.shape
                down, up = torch.randn(2, inner, generator=generator), torch.randn(out, 2, generator=generator)
                modules["unet", path] = LoraModule(down, up, 2.0)
        write_lora(folder / f"{name}.safetensors", modules, family="pocket")
    return folder


@pytest.fixture
def generate(base_folder, loras, tmp_path, monkeypatch, capsys):
    """generate(*words): (exit code, stdout, stderr), in an empty folder that has the two adapters."""
    monkeypatch.setenv("SFUMATO_POCKET", str(base_folder))
    monkeypatch.chdir(tmp_path)
    for file in loras.iterdir():
        (tmp_path / file.name).hardlink_to(file)

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["generate", *words, *FAST])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run
