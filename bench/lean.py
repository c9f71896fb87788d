"""Bytes that a U-Net of full size keeps between forward and backward pass, with torch's own layers and with ours.

    python -m bench.lean [--family sdxl --resolution 1024]

Counted in one forward pass of a U-Net whose weights are all 0: what autograd saves beside the weights, in GiB, batch 1.
Prints JSON. That values and gradients stay the same is in tests/precision/test_lean.py, time and memory in
bench/vs_diffusers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bench.full_size import added_conditions
from bench.kept import kept_bytes
from bench.real import print_report
from sfumato import cli
from sfumato.adapters import attach, select
from sfumato.errors import ConfigError
from sfumato.models.single_file import packaged_config
from sfumato.models.weights import unet_skeleton
from sfumato.precision.cpu_matmul import use_fast_matmul
from sfumato.precision.layers import save_activation_memory

TRAINED = ("cross-attention", "attention", "attention+mlp", "everything", "whole")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Count what is kept."""

    family: Literal["sd1", "sd2", "sdxl"] = "sd1"
    """Whose U-Net."""
    resolution: int = 256
    """Side of the picture in pixels."""
    trained: tuple[str, ...] = TRAINED
    """What is trained: the targets of a LoRA, or whole for the U-Net's own weights."""


def kept(config: Config, trained: str, *, lean: bool) -> float:
    """GiB that autograd saves beside the weights."""
    unet = unet_skeleton(packaged_config(config.family, "unet/config.json")).to_empty(device="cpu")
    for parameter in unet.parameters():
        parameter.data = torch.zeros(parameter.shape)  # pages that are never written take no memory
    unet.requires_grad_(trained == "whole")
    if lean:
        use_fast_matmul(unet)
        save_activation_memory(unet)
    if trained != "whole":
        attach({"unet": select(unet, trained)}, rank=16, alpha=16.0)
    side = config.resolution // 8
    text = torch.zeros(1, 77, unet.config.cross_attention_dim)
    added = added_conditions(unet.config)
    with kept_bytes(unet) as seen:
        output = unet(torch.zeros(1, 4, side, side), torch.zeros(1), text, added_cond_kwargs=added)
    del output  # alive until here, so that no two tensors had one address
    return sum(seen.values()) / 2**30


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    if config.resolution < 64 or config.resolution % 64:
        raise ConfigError(f"--resolution {config.resolution}: wanted a multiple of 64 px.")
    rows = {}
    for trained in config.trained:
        plain, lean = (kept(config, trained, lean=lean) for lean in (False, True))
        rows[trained] = {"torch_gib": round(plain, 3), "ours_gib": round(lean, 3), "ratio": round(lean / plain, 3)}
    return {"family": config.family, "resolution_px": config.resolution, **rows}


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.lean")


if __name__ == "__main__":
    cli.run(main)
