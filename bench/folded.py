"""A LoRA's training step, each layer and its update as two products and as one (`sfumato.adapters.layers`).

    python -m bench.folded [--family sd1 --resolution 256 --targets cross-attention]

Forward and backward pass of one U-Net in turns in one process; prints JSON: CPU seconds, the median of the rounds, the
median of their ratios, and GiB that autograd saves beside the weights. That values and gradients are the same to
rounding is in tests/test_folded.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch

from bench.full_size import added_conditions
from bench.kept import kept_bytes
from bench.real import print_report
from sfumato import cli
from sfumato.adapters import attach, target_layers
from sfumato.errors import ConfigError
from sfumato.models.single_file import packaged_config
from sfumato.models.weights import unet_skeleton
from sfumato.precision.cpu_matmul import use_fast_matmul
from sfumato.precision.layers import save_activation_memory


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure layers and their updates as one product."""

    family: Literal["pocket", "sd1", "sd2", "sdxl"] = "pocket"
    """Whose U-Net; of all but pocket the weights are random."""
    resolution: int = 64
    """Side of the pictures in pixels."""
    batch: int = 8
    """Pictures in a step."""
    targets: str = "everything"
    """What is adapted."""
    ranks: tuple[int, ...] = (16, 32)
    """Of the adapters, one after the other."""
    rounds: int = 10
    """Steps of each."""
    threads: int = 1
    """Threads of torch."""


@contextmanager
def two_products() -> Iterator[None]:
    """Within the block a layer and its update are computed apart."""
    with mock.patch("sfumato.adapters.tuners.lora.fused_output", return_value=None):
        yield


def step(unet: Any, config: Config, cells: int) -> int:
    """A forward and a backward pass; returns the bytes that autograd kept beside the weights."""
    latents = torch.randn(config.batch, 4, cells, cells, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(config.batch, 77, unet.config.cross_attention_dim)
    added = added_conditions(unet.config)
    with kept_bytes(unet) as seen:
        output = unet(latents, torch.full((config.batch,), 500), text, added_cond_kwargs=added, return_dict=False)[0]
    output.square().mean().backward()
    return sum(seen.values())


def compare(unet: Any, config: Config, rank: int) -> dict[str, Any]:
    """Both ways in turns, after one unmeasured step of each."""
    cells = config.resolution // (4 if config.family == "pocket" else 8)
    lora = attach(target_layers({"unet": unet}, config.targets), rank=rank, alpha=float(rank))
    seconds: dict[str, list[float]] = {"two": [], "one": []}
    kept = {}
    for number in range(config.rounds + 1):
        for way, times in seconds.items():
            began = time.process_time()
            if way == "two":
                with two_products():
                    kept[way] = step(unet, config, cells)
            else:
                kept[way] = step(unet, config, cells)
            if number:
                times.append(time.process_time() - began)
    lora.detach()
    ratios = [one / two for two, one in zip(*seconds.values(), strict=True)]
    return {
        **{f"{way}_s": round(statistics.median(times), 3) for way, times in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        **{f"{way}_kept_gib": round(size / 2**30, 3) for way, size in kept.items()},
    }


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    if config.resolution < 64 or config.resolution % 64:
        raise ConfigError(f"--resolution {config.resolution}: wanted a multiple of 64 px.")
    torch.set_num_threads(config.threads)
    if config.family == "pocket":
        from sfumato import load_base

        unet: Any = load_base("pocket").unet
    else:
        unet = unet_skeleton(packaged_config(config.family, "unet/config.json")).to_empty(device="cpu")
        for parameter in unet.parameters():
            parameter.data = torch.randn(parameter.shape) * max(parameter[0].numel(), 1) ** -0.5
    use_fast_matmul(unet.requires_grad_(False))
    save_activation_memory(unet)
    about = {"family": config.family, "resolution_px": config.resolution, "batch": config.batch}
    return {**about, "targets": config.targets} | {f"rank {rank}": compare(unet, config, rank) for rank in config.ranks}


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.folded")


if __name__ == "__main__":
    cli.run(main)
