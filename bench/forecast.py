"""What `sfumato memory` tells, beside what trainings of a full-size SD 1.5 with random weights take of a CPU's memory.

    python -m bench.forecast --work /somewhere/with/20/GB [--only lora --only textual_inversion]

Each way to train runs two steps in a process of its own, one picture a step, fp32, without pictures of a class. Prints
JSON: for each the peak in GiB of its resident memory after the first step, the forecast, and their ratio; of a training
that fails, its line in `error`, or in `stopped` where it failed after a step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.full_size import build, options, photographs, run
from bench.real import print_report
from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.precision import forecast_precision
from sfumato.training import memory

OF_METHOD: dict[str, dict[str, Any]] = {
    "textual_inversion": {"placeholder": "<thing>", "vectors": 1},
    "lora": {"caption": "a thing", "learn": "plain"},
    "lora --targets cross-attention --train-words": {
        "caption": "a <thing>",
        "train-words": "<thing>",
        "learn": "plain",
    },
    "dreambooth": {"class-name": "thing", "prior": "none"},
    "finetune": {"caption": "a thing"},
}
"""What a way's options leave open, by their longest beginning."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what was told."""

    work: Path
    """Folder for the base (4.3 GB, made once) and the runs."""
    only: tuple[str, ...] = ()
    """A way to measure, such as "lora --targets everything". Repeat it for several. Unset: all."""
    resolution: int = 256
    """Side of the pictures in pixels."""
    limit_s: int = 3600
    """Seconds after which a training is given up."""


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    ways = {way.options: replace(way, pictures=1) for way in memory.TRAININGS}
    if unknown := [name for name in config.only if name not in ways]:
        raise ConfigError(f"--only {unknown[0]!r}: wanted {', '.join(ways)}.")
    if config.resolution <= 0 or config.resolution % 64:
        raise ConfigError(f"--resolution {config.resolution}: wanted a multiple of 64.")
    source = build(config.work / "sd15-random")
    pictures = photographs(config.work / "photographs", 4, 2 * config.resolution)
    base = memory.fake_base(source, "cpu")
    setting = memory.MemorySetting("cpu", forecast_precision("fp32", "cpu", adapting=True), config.resolution, 1, 16)
    rows: dict[str, dict[str, float | str]] = {}
    for name in config.only or ways:
        told = memory.step_memory(base, ways[name], setting).total(ways[name], "cpu") / 2**30
        program, *flags = name.split()
        given = {"images": pictures, "base": source, "resolution": config.resolution, "steps": 2, "batch": 1}
        given |= {"sample-every": 0, "measure-every": 0, "checkpoint-every": 0, "precision": "fp32", "overwrite": True}
        given |= {"output": config.work / "runs" / name.replace("--", "").replace(" ", "-")}
        given |= OF_METHOD[max((key for key in OF_METHOD if name.startswith(key)), key=len)]
        flags = [flag for flag in flags if flag.removeprefix("--") not in given]
        row = run(name, program, [*options(given), *flags], config.limit_s)
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows[name] = {"told_gib": round(told, 2)}
        if peak := row.get("peak_of_steps_gib"):
            rows[name] |= {"measured_gib": round(peak, 2), "ratio": round(told / peak, 3)}
        rows[name] |= {key: row[key] for key in ("error", "stopped") if key in row}
    return {"resolution_px": config.resolution, "rows": rows}


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.forecast")


if __name__ == "__main__":
    cli.run(main)
