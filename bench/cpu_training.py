"""A training step of pocket's parts on a CPU: torch's fused attention and glibc's defaults, against what we set.

    python -m bench.cpu_training

Each side has a process of its own, in turns: AdamW on all weights of the U-Net, the captions' hidden states given,
and on those of the text encoder.
Prints JSON: CPU milliseconds of a step (the median of a round, of which each side's least), peak resident memory, and
the ratios ours / theirs.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bench.real import check_least, print_report
from sfumato import cli
from sfumato.precision import Precision, decide


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time a training step with and without what `Precision.learn` and `Precision.apply` do on a CPU."""

    batch: int = 24
    """Pictures in a step."""
    steps: int = 8
    """Steps of a round, after two to warm up."""
    rounds: int = 3
    """Rounds of both sides in turns."""
    threads: int = 2
    """Threads of torch."""
    side: Literal["", "theirs", "ours"] = ""
    """Run one side only, in this process. Unset: both, each in its own."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The number format of that one side."""
    part: Literal["unet", "text_encoder"] = "unet"
    """The part that learns on that one side."""


def step_times(config: Config) -> dict[str, float]:
    """One side in this process: CPU milliseconds of a step, and peak resident MB."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from sfumato.models.loading import find_base

    precision: Precision = decide(config.precision, device="cpu")
    torch.set_num_threads(config.threads)
    kind: Any = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}[config.part]
    model = kind.from_pretrained(find_base("pocket")[0], subfolder=config.part).float().train()
    if config.side == "ours":
        precision.apply()
        precision.prepare_for_training(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    given: tuple[torch.Tensor, ...] = (torch.arange(config.batch * 77).view(-1, 77) % 3000,)
    if config.part == "unet":
        latents, text = torch.randn(config.batch, 4, 16, 16), torch.randn(config.batch, 77, 192)
        given = (latents, torch.arange(config.batch) * 10, text)
    times = []
    for _ in range(2 + config.steps):
        begin = time.process_time()
        with precision.autocast():
            answer = model(*given)[0]
        answer.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu_ms": sorted(times[2:])[config.steps // 2] * 1e3, "peak_mb": peak}


def measure(config: Config) -> dict[str, Any]:
    """Both sides in turns, each part in each precision; or the one side that is asked for."""
    check_least(config, "batch", "steps", "rounds", "threads")
    if config.side:
        return step_times(config)
    report: dict[str, Any] = {"unet": {}, "text_encoder": {}}
    for part, precision in itertools.product(report, ("fp32", "bf16")):
        best: dict[str, dict[str, float]] = {}
        for side in ("theirs", "ours") * config.rounds:
            command = [sys.executable, "-m", "bench.cpu_training"]
            command += ["--side", side, "--precision", precision, "--part", part]
            for name in ("batch", "steps", "threads"):
                command += [f"--{name}", str(getattr(config, name))]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            best[side] = {name: min(value, best.get(side, found)[name]) for name, value in found.items()}
        ratios = {name: round(best["ours"][name] / best["theirs"][name], 3) for name in best["ours"]}
        report[part][precision] = {**best, "ours_over_theirs": ratios}
    return report


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.cpu_training")


if __name__ == "__main__":
    cli.run(main)
