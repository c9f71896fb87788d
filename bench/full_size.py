"""A Stable Diffusion 1.5 of full size with random weights, and a training of it watched from within its own process.

Values do not matter for time and memory; shapes do. Other benches share this.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_DIFFUSERS = ("AutoencoderKL", "DDPMScheduler", "StableDiffusionPipeline", "UNet2DConditionModel")

CHILD = """
import sys
from bench.full_size import watch
watch(*sys.argv[1:])
"""


def build(folder: Path) -> Path:
    """SD 1.5 (859.5 M weights in its U-Net) as a diffusers folder in fp32, made once; std 1/sqrt(fan in)."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from sfumato.models.single_file import packaged_config
    from sfumato.models.vocabulary import clip_tokenizer

    if (folder / "model_index.json").is_file():
        return folder
    unet = diffusers.UNet2DConditionModel.from_config(packaged_config("sd1", "unet/config.json"))
    vae = diffusers.AutoencoderKL.from_config(packaged_config("sd1", "vae/config.json"))
    text = CLIPTextModel(CLIPTextConfig(**packaged_config("sd1", "text_encoder/config.json")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in unet.parameters():
            if weight.ndim > 1:
                weight.normal_(generator=generator).mul_(weight[0].numel() ** -0.5)
    config = packaged_config("sd1", "scheduler/scheduler_config.json")
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=clip_tokenizer(positions=77),
        scheduler=getattr(diffusers, config["_class_name"]).from_config(config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(str(folder))
    return folder


def photographs(folder: Path, count: int, side_px: int) -> Path:
    """So many pictures of noise and colour, JPEG, as a camera would give them."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        small.resize((side_px, side_px), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=92)
    return folder


def added_conditions(config: Any) -> dict[str, Any]:
    """What SDXL's U-Net with this config is told besides, zeros for one picture; the other families' ask for none."""
    import torch

    width = (config.projection_class_embeddings_input_dim or 0) - 6 * (config.addition_time_embed_dim or 0)
    return {"time_ids": torch.zeros(1, 6), "text_embeds": torch.zeros(1, max(0, width))}


def run(name: str, script: str, words: Sequence[str], limit_s: int) -> dict[str, Any]:
    """Train in a process of its own, and what it saw; {"error": ...} where it did not come to an end.

    script: a trainer of ours, or the path of a script with `parse_args` and `main`.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    began = time.monotonic()
    command = [sys.executable, "-c", CHILD, script, *words]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"not done after {limit_s} s"}
    found = [line.removeprefix("WATCHED ") for line in done.stdout.splitlines() if line.startswith("WATCHED ")]
    if not found:
        return {
            "name": name,
            "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300],
            "rc": done.returncode,
        }
    return {"name": name, **json.loads(found[-1]), "process_s": round(time.monotonic() - began, 1)}


def watch(script: str, *words: str) -> None:
    """In the child: run the program, note each optimizer step, and print what was seen before it writes its result."""
    import gc

    import torch

    began_wall, began_cpu = time.monotonic(), time.process_time()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    program = _ours(script) if not script.endswith(".py") else _script(script)
    gc.collect()
    baseline = resident()
    _forget_peak()
    steps: list[tuple[float, float, float]] = []
    stepped, trained = 0, 0  # weights since the last step's end, and of the optimizer

    def watch_steps_of(kind: Any) -> None:
        built, plain = kind.__init__, kind.step

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal trained
            built(self, *args, **kwargs)
            trained = sum(len(group["params"]) for group in self.param_groups)

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal stepped
            result = plain(self, *args, **kwargs)
            # A fused step comes once for every weight: only the last one ends a step.
            stepped += sum(len(group["params"]) for group in self.param_groups)
            if stepped >= trained:
                stepped = 0
                steps.append((time.monotonic() - began_wall, time.process_time() - began_cpu, peak()))
            return result

        kind.__init__, kind.step = init, step

    watch_steps_of(torch.optim.AdamW)
    for name, module, kind in (
        ("adamw8bit", "bitsandbytes.optim", "AdamW8bit"),
        ("adafactor", "transformers.optimization", "Adafactor"),
    ):
        if name in words:
            watch_steps_of(getattr(importlib.import_module(module), kind))
    stopped = ""
    try:
        program(list(words))
    except BaseException as error:
        stopped = f"{type(error).__name__}: {error}"[:300]
        if not steps:
            raise
    each = [round(after[1] - before[1], 2) for before, after in itertools.pairwise(steps)]
    report = {
        "imports_gib": round(baseline / 2**30, 3),
        "first_step_cpu_s": round(steps[0][1], 1),
        "first_step_wall_s": round(steps[0][0], 1),
        "step_cpu_s": min(each) if each else None,
        "steps_cpu_s": each,
        "peak_of_steps_gib": round(steps[-1][2] / 2**30, 3),
        "over_imports_gib": round((steps[-1][2] - baseline) / 2**30, 3),
    }
    print("WATCHED " + json.dumps(report | ({"stopped": stopped} if stopped else {})), flush=True)


def _ours(trainer: str) -> Any:
    """A trainer of this package, everything that it imports loaded; it writes no result."""
    for name in (
        "drawing.pictures",
        "bases",
        "runs",
        "training.ema",
        "training.metrics",
        "training.objective",
        "training.optimizers",
        "runs.processes",
        "data.preparing",
    ):
        importlib.import_module(f"sfumato.{name}")
    # What the scripts import by name, so that both sides begin with the same libraries in memory.
    for library, used in (("diffusers", _DIFFUSERS), ("transformers", ("CLIPTextModel", "CLIPTokenizer"))):
        for name in used:
            getattr(importlib.import_module(library), name)
    module: Any = importlib.import_module(f"sfumato.trainers.{trainer}")
    finish: Any = importlib.import_module("sfumato.training.finish")
    writer, name = (finish, "finish_adapter") if trainer == "lora" else (module, "save")
    assert callable(getattr(writer, name, None)), f"trainers/{trainer}.py has no {name}"
    setattr(writer, name, lambda *_, **__: None)
    return module.main


def _script(path: str) -> Any:
    """The `main` of a script with parse_args, as the diffusers examples have it; it writes no pipeline."""
    import runpy

    import diffusers

    diffusers.DiffusionPipeline.save_pretrained = lambda *_, **__: None
    names = runpy.run_path(path, run_name="watched")

    def program(words: list[str]) -> None:
        sys.argv = [path, *words]
        args = names["parse_args"]()
        names["main"](args) if names["main"].__code__.co_argcount else names["main"]()

    return program


def resident() -> int:
    """Bytes of memory this process holds."""
    return _status("VmRSS")


def peak() -> int:
    """The most it has held since `_forget_peak`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}; this bench wants Linux")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def options(values: Mapping[str, Any]) -> list[str]:
    """{"a_b": 1, "c": True} -> ["--a_b", "1", "--c"]."""
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words
