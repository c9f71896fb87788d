"""Tiny bases in both forms, and random adapters for them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.files.kinds import LoraModule
from sfumato.files.metadata import Description, describe
from sfumato.files.module_names import Target
from sfumato.files.writing.kohya import write_lora
from sfumato.utils import randomness
from tests.tiny import tiny_pipeline, tiny_pocket_folder, write_folder, write_single_file


@dataclass(frozen=True)
class TinyBase:
    """One tiny model. file: None for pocket, which has no such form."""

    family: str
    pipe: Any
    folder: Path
    file: Path | None

    def parts(self) -> dict[str, torch.nn.Module]:
        names = ("unet", "text_encoder", "text_encoder_2")
        return {name: part for name in names if (part := getattr(self.pipe, name, None)) is not None}

    def weights(self) -> dict[Target, torch.Tensor]:
        """The weight of every linear layer and convolution that a LoRA file can name."""
        return {
            (part, path): layer.weight.detach()
            for part, module in self.parts().items()
            for path, layer in module.named_modules()
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and path != "text_projection"
        }


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """tiny_base("sdxl") is a tiny base of the family, as pipeline, folder and file."""

    @cache
    def make(family: str) -> TinyBase:
        root = tmp_path_factory.mktemp(family)
        if family == "pocket":
            import diffusers

            folder = tiny_pocket_folder(root / "pocket")
            return TinyBase(family, diffusers.StableDiffusionPipeline.from_pretrained(str(folder)), folder, None)
        pipe = tiny_pipeline(family, shallow=True)
        metadata = {"modelspec.prediction_type": "epsilon"}
        file = write_single_file(pipe, root / "base.safetensors", metadata=metadata)
        return TinyBase(family, pipe, write_folder(pipe, root / "base"), file)

    return make


def random_modules(weights: dict[Target, torch.Tensor], seed: int, rank: int = 2) -> dict[Target, LoraModule]:
    """A LoRA of the weights, alpha 1, its deltas about a tenth of ordinary weights."""
    modules = {}
    for (part, path), weight in weights.items():
        draws = randomness.generator(seed, f"{part}/{path}")
        inner = weight.shape[1:]
        down = torch.randn(rank, *inner, generator=draws) / inner.numel() ** 0.5
        up = 0.1 * torch.randn(weight.shape[0], rank, *(1 for _ in inner[1:]), generator=draws)
        modules[part, path] = LoraModule(down, up, alpha=1.0)
    return modules


def attention(weights: dict[Target, torch.Tensor]) -> dict[Target, torch.Tensor]:
    return {target: weight for target, weight in weights.items() if ".attn" in target[1] or "self_attn" in target[1]}


@pytest.fixture
def adapter_file(tiny_base, tmp_path, monkeypatch):
    """adapter_file("a", "pocket", seed=1) is a LoRA of all attention of that tiny base, with a trigger word."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")

    def make(name: str, family: str = "pocket", seed: int = 1, rank: int = 2, choose=attention) -> Path:
        modules = random_modules(choose(tiny_base(family).weights()), seed, rank)
        metadata = describe(Description(title=name, family=family, base="tiny", trigger=[f"sks {name}"]))
        return write_lora(tmp_path / f"{name}.safetensors", modules, family=family, metadata=metadata)

    return make
