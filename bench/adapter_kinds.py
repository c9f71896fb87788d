"""The kinds of adapter beside a LoRA at the same rank and alpha: time of a step, what it keeps, and how fast it begins.

    python -m bench.adapter_kinds [--rank 32 --alpha 64 --targets cross-attention]

Forward and backward pass on the pocket base and real pictures, the kinds in turns in one process; prints JSON: numbers
that are trained, CPU seconds (the median of the rounds), `step_ratio`, the median over the rounds of a step over the
LoRA's of the same round, and GiB that autograd saves beside the weights. `fall` is how much the loss falls in Adam's
first step per unit of rate, the sum of all gradients' sizes, where a LoRA's is 1: a kind with a fall of 10 begins as
fast at a tenth of a LoRA's learning rate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.kept import kept_bytes
from bench.real import check_least, print_report
from sfumato import cli, data, load_base
from sfumato.adapters import Kind, attach, target_layers
from sfumato.data import Dataset
from sfumato.models import Base
from sfumato.precision import decide
from sfumato.precision.cpu_matmul import use_fast_matmul
from sfumato.precision.layers import save_activation_memory
from sfumato.runs.processes import MicroBatch
from sfumato.training.loss.objective import LossSettings, NoiseSettings, draw_noised, per_sample_losses

KINDS = {
    "lora": Kind(),
    "dora": Kind(dora=True),
    "loha": Kind("loha"),
    "lokr": Kind("lokr"),
    "lokr, factor 4": Kind("lokr", factor=4),
    "dora of lokr": Kind("lokr", dora=True),
    "oft": Kind("oft"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the kinds of adapter beside each other."""

    images: Path = Path("datasets/line-style")
    """Pictures to learn."""
    base: str = "pocket"
    """Whose U-Net learns."""
    batch: int = 8
    """Pictures in a step."""
    targets: str = "everything"
    """What is adapted."""
    rank: int = 16
    """Of the adapters."""
    alpha: float = 16.0
    """Of the adapters."""
    rounds: int = 5
    """Measured steps of each."""
    threads: int = 1
    """Threads of torch."""


def step(base: Base, dataset: Dataset, number: int, batch: int) -> int:
    """A forward and a backward pass of the loss of a training; returns the bytes that autograd kept."""
    noising = NoiseSettings(range(len(base.alpha_bar)))
    noised = draw_noised(base, dataset, 0, MicroBatch(number, batch, 0, batch), noising=noising)
    with kept_bytes(base.unet) as seen:
        errors = per_sample_losses(base, [noised], encode=False, settings=LossSettings(0.0))
    errors.mean().backward()
    return sum(seen.values())


def one(base: Base, dataset: Dataset, number: int, kind: Kind, config: Config) -> dict[str, float]:
    """A kind's figures in one round, after a step that is not measured: adapters come off between rounds."""
    layers = target_layers(base.parts(text=False), config.targets)
    adapter = attach(layers, rank=config.rank, alpha=config.alpha, kind=kind)
    step(base, dataset, number, config.batch)
    adapter.zero_grad()
    began = time.process_time()
    kept = step(base, dataset, number, config.batch)
    seconds = time.process_time() - began
    fall = sum(float(p.grad.abs().sum()) for p in adapter.parameters() if p.grad is not None)
    adapter.detach()
    return {"numbers": adapter.count(), "step_s": seconds, "kept_gib": kept / 2**30, "fall": fall}


def together(rounds: Sequence[dict[str, float]], of_lora: Sequence[dict[str, float]]) -> dict[str, float]:
    """A kind's figures over all rounds, beside a LoRA's in the same."""
    mean_fall, lora_fall = (statistics.mean(row["fall"] for row in rows) for rows in (rounds, of_lora))
    ratios = [row["step_s"] / lora["step_s"] for row, lora in zip(rounds, of_lora, strict=True)]
    return {
        "numbers": rounds[0]["numbers"],
        "step_s": round(statistics.median(row["step_s"] for row in rounds), 3),
        "step_ratio": round(statistics.median(ratios), 3),
        "kept_gib": round(rounds[-1]["kept_gib"], 3),
        "fall": round(mean_fall / lora_fall, 2),
    }


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    check_least(config, "rounds", "threads")
    torch.set_num_threads(config.threads)
    base = load_base(config.base, precision=decide("fp32", device="cpu"))
    use_fast_matmul(base.unet.requires_grad_(False))
    save_activation_memory(base.unet)
    dataset = data.prepare(data.read_folder(config.images, caption_template="{caption}"), base, resolution=64)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in KINDS}
    for number in range(config.rounds):
        for name, kind in KINDS.items():
            found[name].append(one(base, dataset, number, kind, config))
    return {
        "base": base.name, "batch": config.batch, "targets": config.targets, "rank": config.rank, "alpha": config.alpha,
        "threads": config.threads, **{name: together(rows, found["lora"]) for name, rows in found.items()},
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.adapter_kinds")


if __name__ == "__main__":
    cli.run(main)
