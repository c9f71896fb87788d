"""How long `sfumato memory` computes a step that it imagines, beside torch's own FakeTensorMode. Prints JSON.

    python -m bench.forecast_time [--base sd1]

The step of each way to train is imagined by both, by turns, in one process; CPU seconds, and their ratio. What both
tell must be equal, but for the mask of a text encoder, which transformers makes only where tensors are torch's fakes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from torch._subclasses.fake_tensor import FakeTensorMode

from bench.real import print_report
from sfumato import cli
from sfumato.precision import forecast_precision
from sfumato.precision.fake_tensors import FakeMode
from sfumato.training import memory
from sfumato.training.memory import MemorySetting, StepMemory, TrainingTask


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time what is imagined."""

    base: str = "sd1"
    """Base, or the name of a family for its published shapes."""
    rank: int = 16
    """Of the adapters."""


def measure(config: Config) -> dict[str, Any]:
    """The report: for each way the seconds of both and the bytes that they tell."""
    base = memory.fake_base(config.base, "gpu")
    precision = forecast_precision("auto", "gpu", adapting=True)
    setting = MemorySetting("gpu", precision, base.resolution, 1, config.rank)
    fake = FakeTensorMode()  # one for all blocks: tensors of two do not mix

    def timed(way: TrainingTask, imagining: Callable[[], AbstractContextManager[Any]]) -> tuple[float, StepMemory]:
        with mock.patch.object(memory, "FakeMode", imagining):
            start = time.process_time()
            told = memory.step_memory(base, way, setting)
            return time.process_time() - start, told

    rows, totals = {}, [0.0, 0.0]
    ways = {replace(way, options="", fused=False, optimizer="adamw"): way.options for way in memory.TRAININGS[::-1]}
    for way, name in ways.items():
        (ours, told), (torchs, theirs) = timed(way, FakeMode), timed(way, lambda: fake)
        totals = [totals[0] + ours, totals[1] + torchs]
        rows[name] = {
            "cpu_s": round(ours, 2),
            "fake_cpu_s": round(torchs, 2),
            "ratio": round(ours / torchs, 3),
            "bytes": told.weights + told.alive,
            "fake_bytes": theirs.weights + theirs.alive,
        }
    return {"base": base.name, "ways": rows, "ratio": round(totals[0] / totals[1], 3)}


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.forecast_time")


if __name__ == "__main__":
    cli.run(main)
