"""The diffusers example script of the same method beside ours, each in its own process, in turns, on one base.

    git clone --depth 1 https://github.com/huggingface/diffusers CHECKOUT     # of the installed version
    python -m bench.vs_diffusers --checkout CHECKOUT --work /somewhere/with/5/GB [--methods dreambooth --methods lora]

Same weights (SD 1.5 of full size, random, fp32; or --base pocket), pictures, batch, precision and steps. Prints JSON:
CPU seconds to the end of the first step and of a step (the least of each side's rounds), peak resident memory of the
steps over what was resident after the imports, and the ratios ours / theirs. The scripts want torchvision, and
the LoRA one `datasets`. A step of theirs ends where torch's AdamW returns, as ours does. No side writes a model.
Everything takes OMP_NUM_THREADS threads, 1 where it is unset.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.full_size import build, options, photographs, run
from bench.products import unet
from bench.real import print_report
from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.models.loading import find_base

SCRIPTS = {
    "dreambooth": "examples/dreambooth/train_dreambooth.py",
    "textual_inversion": "examples/textual_inversion/textual_inversion.py",
    "lora": "examples/text_to_image/train_text_to_image_lora.py",
}
# Ours steps in the backward pass then. Their script clips; unclipped, ours does not.
FUSED = ("dreambooth-fused", "dreambooth-unclipped")
# Their script encodes the prompt once then, as ours always does.
PRECOMPUTED = "dreambooth-precomputed"
SCRIPTS |= dict.fromkeys((*FUSED, PRECOMPUTED), SCRIPTS["dreambooth"])
GOALS = {"dreambooth": (0.75, 0.75), "textual_inversion": (0.68, 0.78), "lora": (0.7, 0.85)}
GOALS |= dict.fromkeys((*FUSED, PRECOMPUTED), GOALS["dreambooth"])
"""Ours over theirs at most: (a step, memory)."""
PASSES = 358
FLOPS = {"dreambooth": (537, 537 + 293), "textual_inversion": (358, 358 + 280), "lora": (359, 363 + 293)}
FLOPS |= {"dreambooth-fused": (537 + 358, 537 + 293), "dreambooth-unclipped": FLOPS["dreambooth"]}
FLOPS |= {PRECOMPUTED: (537, 537 + 280)}
"""GFLOP of a step of 256 px, (ours, theirs): the U-Net's, theirs with the VAE's 280 and, where it is no part of what is
learned or encoded beforehand, the text encoder's 13; clipped and fused, ours goes backward twice. PASSES: of the U-Net
with frozen weights, forward and backward. A step in less than the time that these would take at each side's pace
(`bench.products`) is a mistake."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure ours beside the diffusers example scripts."""

    checkout: Path
    """Checkout of huggingface/diffusers."""
    work: Path
    """Folder for the base (4.3 GB, made once) and the runs."""
    methods: tuple[str, ...] = tuple(SCRIPTS)
    """dreambooth, dreambooth-fused, dreambooth-unclipped, dreambooth-precomputed (theirs encodes the prompt once, as
    ours always does), textual_inversion, lora. Repeat it for several."""
    base: str = "full"
    """full: SD 1.5 with random weights. pocket: the embedded base."""
    resolution: int | None = None
    """Side of the pictures in pixels. Unset: 256, on pocket 64."""
    steps: int = 3
    """Optimizer steps of a round; the first is the warm-up."""
    rounds: int = 1
    """Rounds of both sides in turns."""
    limit_s: int = 3600
    """Seconds after which a process is given up."""


def theirs(method: str, base: Path, pictures: Path, output: Path, px: int, steps: int) -> list[str]:
    """The options of their script."""
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": base, "output_dir": output, "resolution": px, "train_batch_size": 1,
        "max_train_steps": steps, "checkpointing_steps": 10_000, "mixed_precision": "no", "learning_rate": 1e-5,
        "lr_scheduler": "constant", "lr_warmup_steps": 0, "seed": 0, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "dreambooth": {"instance_data_dir": pictures, "instance_prompt": "sks thing"},
        "textual_inversion": {
            "train_data_dir": pictures, "placeholder_token": "<thing>", "initializer_token": "dog",
            "learnable_property": "object", "save_steps": 10_000, "num_vectors": 1,
        },
        "lora": {"train_data_dir": pictures, "rank": 16, "caption_column": "text"},
    }  # fmt: skip
    own |= dict.fromkeys(FUSED, own["dreambooth"])
    own[PRECOMPUTED] = own["dreambooth"] | {"pre_compute_text_embeddings": True}
    return options(shared | own[method])


def ours(method: str, base: str, pictures: Path, output: Path, px: int, steps: int) -> list[str]:
    """The options of our trainer for the same."""
    shared: dict[str, Any] = {
        "base": base, "images": pictures, "output": output, "resolution": px, "batch": 1, "steps": steps,
        "learning-rate": 1e-5, "schedule": "constant", "seed": 0, "precision": "fp32", "sample-every": 0,
        "measure-every": 0, "checkpoint-every": 0, "overwrite": True,
    }  # fmt: skip
    subject = {"method": "full", "class-name": "thing", "prior": "none"}
    own: dict[str, dict[str, Any]] = {
        "dreambooth": subject,
        "dreambooth-fused": subject | {"fused": True},
        "dreambooth-unclipped": subject | {"fused": True, "clip": 0},
        PRECOMPUTED: subject,
        "textual_inversion": {"placeholder": "<thing>", "initial-words": "dog", "vectors": 1},
        "lora": {"learn": "plain", "rank": 16, "targets": "attention", "caption": "a thing"},
    }
    return options(shared | own[method])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block, torch takes this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    unknown = [method for method in config.methods if method not in SCRIPTS]
    if unknown:
        raise ConfigError(f"--methods {unknown[0]}: wanted {', '.join(SCRIPTS)}.")
    full = config.base == "full"
    px = config.resolution or (256 if full else 64)
    folder = build(config.work / "sd15-random") if full else find_base(config.base)[0]
    bare, captioned = (photographs(config.work / name, 4, 2 * px) for name in ("photographs", "captioned"))
    # What only the LoRA script reads; the others would take it for a picture.
    captions = [{"file_name": file.name, "text": "a thing"} for file in sorted(captioned.glob("*.jpg"))]
    (captioned / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions), encoding="utf-8")
    count = int(os.environ.get("OMP_NUM_THREADS", "1"))  # of the processes that train, too
    report: dict[str, Any] = {"base": config.base, "resolution_px": px, "threads": count}
    if full and px == 256:
        with threads(count):
            report["passes"] = unet("sd1", px)["forward and backward"]
    for method in config.methods:
        rows: dict[str, list[dict[str, Any]]] = {"diffusers": [], "sfumato": []}
        for number in range(config.rounds):
            output, pictures = config.work / "runs", captioned if method == "lora" else bare
            given = (folder, pictures, output / f"{method}-theirs-{number}", px, config.steps)
            script = str((config.checkout / SCRIPTS[method]).resolve())
            words = ours(method, str(folder), pictures, output / f"{method}-ours-{number}", px, config.steps)
            sides = {"diffusers": (script, theirs(method, *given)), "sfumato": (method.partition("-")[0], words)}
            for side, (program, words) in sides.items():
                rows[side].append(run(side, program, words, config.limit_s))
                print(json.dumps({method: rows[side][-1]}), file=sys.stderr, flush=True)
        report[method] = {**rows, **ratios(rows, method, report.get("passes"))}
    return report


def ratios(rows: dict[str, list[dict[str, Any]]], method: str, passes: Mapping[str, float] | None) -> dict[str, Any]:
    """Ours over theirs, by the least of each side; goals and floors where they were set, for the full size.

    passes: how long one U-Net's passes take by torch and by us, in ms, where goals were set.
    """
    least: dict[str, dict[str, Any]] = {
        key: {side: min((row[key] for row in rows[side] if row.get(key)), default=None) for side in rows}
        for key in ("first_step_cpu_s", "step_cpu_s", "over_imports_gib")
    }
    found = {key: round(of["sfumato"] / of["diffusers"], 3) for key, of in least.items() if all(of.values())}
    judged: dict[str, Any] = {"ratio": found}
    if passes and "step_cpu_s" in found:
        step, memory = GOALS[method]
        judged["goal_step"] = {"at_most": step, "met": found["step_cpu_s"] <= step}
        judged["goal_memory"] = {"at_most": memory, "met": found["over_imports_gib"] <= memory}
        pace = {"sfumato": passes["ours_ms"], "diffusers": passes["torch_ms"]}
        for side, flops in zip(("sfumato", "diffusers"), FLOPS[method], strict=True):
            floor = round(flops / PASSES * pace[side] / 1000, 2)
            judged.setdefault("floor_s", {})[side] = floor
            if least["step_cpu_s"][side] < floor:
                judged["mistake"] = f"a step of {side} is under its operations' time: bench or measurement is wrong"
    return judged


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.vs_diffusers")


if __name__ == "__main__":
    cli.run(main)
