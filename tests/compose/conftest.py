"""Tiny pipelines, fresh for every test, and adapters with random factors for them."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from tests.copies import copies
from tests.tiny import tiny_pipeline

PARTS = ("unet", "text_encoder", "text_encoder_2")
EVERYTHING = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in"),
    *("conv1", "conv_shortcut", "downsamplers.0.conv"),
    *("q_proj", "k_proj", "v_proj", "out_proj", "fc1"),  # diffusers 0.42 drops a text encoder's q_proj without out_proj
)
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def originals() -> dict[str, Any]:
    pipes = {family: tiny_pipeline(family, shallow=True) for family in ("sd1", "sdxl")}
    for pipe in pipes.values():
        _copies(pipe)  # now: transformers hooks functions that cannot be pickled into an encoder that has run
    return pipes


@pytest.fixture
def sd1(originals: dict[str, Any]) -> SimpleNamespace:
    return fresh(originals["sd1"])


@pytest.fixture
def sdxl(originals: dict[str, Any]) -> SimpleNamespace:
    return fresh(originals["sdxl"])


def fresh(pipe: Any) -> SimpleNamespace:
    """The parts that compose touches, copied as they were at first."""
    return _copies(pipe)()


@cache
def _copies(pipe: Any) -> Callable[[], SimpleNamespace]:
    return copies(SimpleNamespace(**{name: getattr(pipe, name, None) for name in PARTS}))


def layers(pipe: Any, *endings: str) -> dict[tuple[str, str], nn.Module]:
    """The layers whose path ends so, by (part, path)."""
    return {
        (part, path): module
        for part in PARTS
        if getattr(pipe, part, None) is not None
        for path, module in getattr(pipe, part).named_modules()
        if path.endswith(endings)
    }


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(name, pipe, *endings, seed=, ...): an adapter file with random factors for the layers that end so."""

    def write_random(
        name: str, pipe: Any, *endings: str, seed: int = 1, rank: int = 3, alpha: float = 2.0, family: str = "sd1"
    ) -> Path:
        generator = torch.Generator().manual_seed(seed)
        modules: dict[tuple[str, str], LoraModule] = {}
        for target, layer in layers(pipe, *(endings or EVERYTHING)).items():
            out, *inner = layer.weight.shape
            up_shape = (out, rank, 1, 1) if len(inner) == 3 else (out, rank)
            down = torch.randn(rank, *inner, generator=generator) / inner[0] ** 0.5
            up = torch.randn(up_shape, generator=generator) * 0.1
            modules[target] = LoraModule(down, up, alpha)
        return write_lora(tmp_path / f"{name}.safetensors", modules, family=family)

    return write_random


def weights_sha(pipe: Any) -> str:
    """sha256 over every byte of every weight."""
    digest = hashlib.sha256()
    for part in PARTS:
        if (module := getattr(pipe, part, None)) is not None:
            for name, tensor in module.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
