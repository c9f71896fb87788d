"""Photographs of subjects through all trainers: every subject on pocket at 64 px, one on full-size SD 1.5 at 512 px.

    python -m bench.photographs --data PHOTOGRAPHS [--work /somewhere/with/5/GB --methods lora --methods words]

PHOTOGRAPHS is laid out as SUBJECT/*.jpg, as google/dreambooth is. Prints JSON. On pocket each training runs a few steps
to its end, and what it wrote is read again (`--subjects 0`: no training there). The full-size one has random weights:
each method runs in its own process, and its row says the most that was resident, the most over what was resident after
the imports, and CPU seconds of a step; with `--precision both` one after the other in fp32 and in bf16, and the ratios.
A training that fails is in `failed` with its line.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.full_size import build, options, run
from bench.real import print_report
from sfumato import cli
from sfumato.errors import ConfigError, DataError
from sfumato.files import read_tensors

QUIET = {"sample-every": 0, "measure-every": 0, "checkpoint-every": 0, "overwrite": True}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train on photographs, with every method."""

    data: Path
    """Folder of SUBJECT/*.jpg."""
    work: Path | None = None
    """Folder for the full-size base (4.3 GB, made once). Unset: only pocket."""
    methods: tuple[str, ...] = ("lora", "pivotal", "dreambooth-full", "dreambooth-lora", "words")
    """lora, pivotal, dreambooth-full (fused, unclipped), dreambooth-lora, words. Repeat it for several."""
    subjects: int | None = None
    """How many subjects pocket learns. Unset: all."""
    steps: int = 2
    """Optimizer steps of each training."""
    pictures: int = 2
    """Photographs that the full-size base learns from; its VAE takes half a minute of a core for each."""
    resolution: int = 512
    """Side of the pictures for the full-size base, in pixels."""
    precision: Literal["fp32", "bf16", "both"] = "fp32"
    """Of the full-size trainings; both: of each in turns."""
    limit_s: int = 3600
    """Seconds after which a full-size training is given up."""


def methods_of(subject: str, others: Path | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """method -> (program, its options). others: photographs in place of the class; without, no prior."""
    said = f"sks {subject}"
    prior: dict[str, Any] = {"prior": "none"} if others is None else {"class-images": others}
    booth = {"class-name": subject, "identifier": "sks", "prior-prompts": ""} | prior
    placeholder = f"<{subject.replace(' ', '-')}>"
    return {
        "lora": ("lora", {"learn": "plain", "caption": said, "targets": "attention"}),
        "pivotal": ("lora", {"caption": f"a photo of {placeholder}", "train-words": placeholder, "learn": "plain"}),
        "dreambooth-full": ("dreambooth", booth | {"method": "full", "fused": True, "clip": 0, "save": "difference"}),
        "dreambooth-lora": ("dreambooth", booth | {"method": "lora"}),
        "words": ("textual_inversion", {"placeholder": placeholder}),
    }


def on_pocket(config: Config, subjects: Sequence[Path]) -> dict[str, Any]:
    """Every subject by every method, 64 px."""
    done, failed = 0, []
    for place, folder in enumerate(subjects):
        others = subjects[place - 1] if len(subjects) > 1 else None
        for method, (program, chosen) in methods_of(folder.name.replace("_", " "), others).items():
            if method not in config.methods:
                continue
            with tempfile.TemporaryDirectory() as output:
                given = {"images": folder, "output": f"{output}/run", "steps": config.steps, "batch": 2, **QUIET}
                said = io.StringIO()
                with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                    code = cli.main(["train", program, *options(given | chosen)])
                files = list(Path(output).glob("run/*.safetensors"))
                if code or not files or not all(read_tensors(file) for file in files):
                    lines = said.getvalue().strip().splitlines() or [f"{len(files)} files"]
                    failed.append({"subject": folder.name, "method": method, "said": lines[-1][:300]})
                done += 1
    return {"resolution_px": 64, "steps": config.steps, "trainings": done, "failed": failed}


def on_full_size(config: Config, work: Path, subject: Path) -> dict[str, Any]:
    """One subject by every method, and how much memory each took."""
    base = build(work / "sd15-random")
    rows: dict[str, Any] = {}
    failed: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for file in sorted(subject.glob("*.jpg"))[: config.pictures]:
            shutil.copy(file, images)  # a link out of the folder is not read
        shared = {"base": base, "images": images, "resolution": config.resolution, "steps": config.steps, "batch": 1}
        shared |= QUIET
        formats = ("fp32", "bf16") if config.precision == "both" else (config.precision,)
        for method, (program, chosen) in methods_of(subject.name.replace("_", " "), None).items():
            if method not in config.methods:
                continue
            for precision in formats:
                given = {**shared, "output": f"{folder}/{method}", "precision": precision, **chosen}
                row = run(method, program, options(given), config.limit_s) | {"precision": precision}
                print(json.dumps(row), file=sys.stderr, flush=True)
                if "error" in row or "stopped" in row:
                    failed.append(row)
                else:
                    kept = ("imports_gib", "peak_of_steps_gib", "over_imports_gib", "step_cpu_s", "first_step_cpu_s")
                    rows.setdefault(method, {})[precision] = {name: row[name] for name in kept}
            if len(of_method := rows.get(method, {})) == 2:
                of_method["bf16_over_fp32"] = {
                    name: round(of_method["bf16"][name] / of_method["fp32"][name], 3)
                    for name in ("over_imports_gib", "step_cpu_s")
                }
    about = {"subject": subject.name, "resolution_px": config.resolution, "steps": config.steps, "batch": 1}
    return about | {"pictures": config.pictures, "rows": rows, "failed": failed}


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    known = methods_of("thing", None)
    if unknown := [method for method in config.methods if method not in known]:
        raise ConfigError(f"--methods {unknown[0]}: wanted {', '.join(known)}.")
    subjects = sorted(folder for folder in config.data.glob("*") if any(folder.glob("*.jpg")))
    if not subjects:
        raise DataError(f"{config.data} holds no SUBJECT/*.jpg; give --data a folder laid out so.")
    report: dict[str, Any] = {}
    if config.subjects != 0:
        report["pocket"] = on_pocket(config, subjects[: config.subjects])
    if config.work is not None:
        report["full size"] = on_full_size(config, config.work, subjects[0])
    return report


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.photographs")


if __name__ == "__main__":
    cli.run(main)
