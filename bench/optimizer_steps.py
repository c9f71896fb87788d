"""What an optimizer's own part of a step costs: time and state, beside the U-Net's part. Prints JSON.

    python -m bench.optimizer_steps [--threads 1] [--base pocket]

For a LoRA of rank 32 on all of the U-Net's blocks, the optimizers by turns. Times are CPU milliseconds, medians; those
of the U-Net are a forward and a backward pass of eight images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.real import print_report
from sfumato import cli, load_base
from sfumato.adapters import Attached, attach, target_layers
from sfumato.models import Base
from sfumato.precision import decide
from sfumato.training.optim import optimizers
from sfumato.training.optim.settings import OptimizerName


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time the steps of optimizers on the CPU."""

    base: str = "pocket"
    """The base whose U-Net is adapted."""
    names: tuple[OptimizerName, ...] = ("adamw", "muon", "adafactor")
    """The optimizers."""
    steps: int = 20
    """Steps of each."""
    threads: int = 1
    """Of torch."""


def cpu_ms(work: Callable[[], object]) -> float:
    """CPU milliseconds that it takes."""
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


def passes(base: Base, lora: Attached) -> None:
    """A forward and a backward pass of eight images, which leaves gradients."""
    side = base.defaults.resolution // base.vae_factor
    noisy = torch.randn(8, base.unet.config["in_channels"], side, side)
    with torch.no_grad():
        text = base.encode_text(["a crab"] * 8)
    base.predict(noisy, torch.full((8,), 500), text).square().mean().backward()


def measure(config: Config) -> dict[str, Any]:
    """The report: milliseconds and state bytes of each, and the step's share that it is."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    base = load_base(config.base, precision=decide("fp32", device="cpu"))
    lora = attach(target_layers(base.parts(text=False), "everything"), rank=32, alpha=64.0, seed=0)
    trained = list(lora.parameters())
    made = {
        name: optimizers.build_optimizer(name, [{"params": trained, "lr": 1e-6}], weight_decay=0.01)
        for name in config.names
    }
    taken: dict[str, list[float]] = {name: [] for name in ("unet", *made)}
    for _ in range(config.steps):
        for weight in trained:
            weight.grad = None
        taken["unet"].append(cpu_ms(lambda: passes(base, lora)))
        for name, optimizer in made.items():
            taken[name].append(cpu_ms(optimizer.step))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "trained": sum(weight.numel() for weight in trained),
        "unet_cpu_ms": round(medians["unet"], 1),
        "optimizers": {
            name: {
                "cpu_ms": round(medians[name], 1),
                "share_of_step": round(medians[name] / (medians[name] + medians["unet"]), 4),
                "state_bytes": sum(optimizers.state_bytes(name, weight.shape) for weight in trained),
            }
            for name in made
        },
    }


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.optimizer_steps")


if __name__ == "__main__":
    cli.run(main)
