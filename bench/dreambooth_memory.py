"""Peak memory of DreamBooth on a full-size SD 1.5 with random weights, each combination in its own process.

    python -m bench.dreambooth_memory --work /somewhere/with/5/GB [--only full --only "full, fused"] [--resolution 256]

In fp32; gradients are clipped, but in rows that are called unclipped (`--clip 0`). Prints JSON: the most that was
resident from the program's first line to the end of the last step (the imports are in it and beside it), and CPU
seconds of a step. The rows of the 8-bit optimizer want `pip install 'sfumato[8bit]'`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.full_size import build, options, photographs, run
from bench.real import print_report
from sfumato import cli
from sfumato.errors import ConfigError

FUSED: dict[str, Any] = {"fused": True}
UNCLIPPED: dict[str, Any] = FUSED | {"clip": 0}
CHECKPOINTED: dict[str, Any] = {"gradient-checkpointing": True}
EMA: dict[str, Any] = {"ema": 0.99, "ema-on-cpu": True}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": CHECKPOINTED,
    "full, fused": FUSED,
    "full, fused, checkpointing": FUSED | CHECKPOINTED,
    "full, fused, checkpointing, prior of the base": FUSED | CHECKPOINTED | {"prior": "base"},
    "full, fused, checkpointing, 8-bit": FUSED | CHECKPOINTED | {"optimizer": "adamw8bit"},
    "full, fused, unclipped": UNCLIPPED,
    "full, fused, unclipped, checkpointing": UNCLIPPED | CHECKPOINTED,
    "full, fused, unclipped, checkpointing, prior of the base": UNCLIPPED | CHECKPOINTED | {"prior": "base"},
    "full, fused, unclipped, checkpointing, EMA on the CPU": UNCLIPPED | CHECKPOINTED | EMA,
    "full, fused, unclipped, checkpointing, 8-bit": UNCLIPPED | CHECKPOINTED | {"optimizer": "adamw8bit"},
    "full, 8-bit": {"optimizer": "adamw8bit"},
    "full, fused, checkpointing, Adafactor": FUSED | CHECKPOINTED | {"optimizer": "adafactor"},
    "lora": {"method": "lora"},
    "lora, checkpointing": {"method": "lora"} | CHECKPOINTED,
    "lora, prior of the base": {"method": "lora", "prior": "base"},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the memory of each way to train."""

    work: Path
    """Folder for the base (4.3 GB, made once) and the runs."""
    only: tuple[str, ...] = ()
    """A combination to measure, such as "full, fused". Repeat it for several. Unset: all."""
    resolution: int = 256
    """Side of the pictures in pixels."""
    steps: int = 2
    """Optimizer steps."""
    limit_s: int = 3600
    """Seconds after which a combination is given up."""


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    if unknown := [name for name in config.only if name not in COMBINATIONS]:
        raise ConfigError(f"--only {unknown[0]!r}: wanted one of {'; '.join(COMBINATIONS)}.")
    base = build(config.work / "sd15-random")
    pictures = photographs(config.work / "photographs", 4, 2 * config.resolution)
    shared = {
        "images": pictures,
        "base": base,
        "class-name": "thing",
        "prior": "none",
        "prior-prompts": "",
        "method": "full",
        "resolution": config.resolution,
    }
    shared |= {"steps": config.steps, "batch": 1, "sample-every": 0, "measure-every": 0, "checkpoint-every": 0}
    shared |= {"precision": "fp32"}
    rows = []
    for name in config.only or COMBINATIONS:
        chosen = COMBINATIONS[name]
        output = config.work / "runs" / name.replace(", ", "-").replace(" ", "-")
        words = options({**shared, "output": output, "overwrite": True, **chosen})
        rows.append(run(name, "dreambooth", words, config.limit_s))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"resolution_px": config.resolution, "batch": 1, "steps": config.steps, "rows": rows}


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.dreambooth_memory")


if __name__ == "__main__":
    cli.run(main)
