"""What --quantize costs: how far the frozen U-Net's weights and predictions move, and what is learned beside it.

    python -m bench.quantized --images datasets/line-style

Of the weights that are quantized the relative rounding error in each format, beside that of bf16 and of fp8 (e4m3
without scales, as sd-scripts' fp8_base has it); of the predictions of the U-Net with each the relative change, over
timesteps and prompts. Then the shipped recipe of a style is trained without and with each format, in one process: the
loss at the end of the run, the fit and drift that it measures there, the same two of its adapter on the base as it is
(`whole`), and the seconds of a step with their ratio to those of a step without. Prints JSON.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sfumato.trainers import lora
from torch import Tensor

from bench.real import print_report
from sfumato import cli, load_base
from sfumato.config import parse
from sfumato.models import Base
from sfumato.precision import decide, quantization
from sfumato.precision.quantization import Quantized, quantize
from sfumato.runs.reporting.overview import read_overview
from sfumato.runs.run import Step
from sfumato.training.loss.validation import UNRELATED
from sfumato.utils import randomness

_RECIPE = Path(__file__).parents[1] / "trainers/configs/lora-style.toml"
_TIMESTEPS = (50, 250, 500, 750, 950)
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda weight: _rounded(weight, "int8"),
    "nf4": lambda weight: _rounded(weight, "nf4"),
    "fp8": lambda weight: weight.to(torch.float8_e4m3fn).float(),
    "bf16": lambda weight: weight.bfloat16().float(),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare the formats of frozen weights, and trainings beside them with one beside what they stand for."""

    images: Path
    """Folder of images of a style, with captions by their names."""
    base: str = "pocket"
    """Base model."""
    steps: int = 240
    """Of each training; 0 trains nothing."""


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    base = load_base(config.base, precision=decide("fp32", device="cpu"))
    plain = {path: weight.clone() for path, weight in _large(config.base, base).items()}
    whole = _predictions(base)
    formats: dict[str, Any] = {}
    for name, rounded in FORMATS.items():
        squares = [((rounded(weight) - weight).square().sum(), weight.square().sum()) for weight in plain.values()]
        for path, weight in plain.items():
            base.unet.get_submodule(path).weight.data = rounded(weight)
        moved = _predictions(base) - whole
        formats[name] = {
            "weights": round(float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5), 5),
            "predictions": round(float(moved.norm() / whole.norm()), 5),
        }
    report: dict[str, Any] = {"base": config.base, "weights": len(plain), "relative_change": formats}
    if config.steps:
        trained = {name: _trained(config, *words) for name, words in _WAYS.items()}
        whole_s = trained["plain"]["step_s"]
        ratios = {name: round(each["step_s"] / whole_s, 3) for name, each in trained.items() if name != "plain"}
        report |= {"trainings": trained, "step_ratio": ratios}
    return report


_WAYS: dict[str, tuple[str, ...]] = {"plain": (), **{name: ("--quantize", name) for name in quantization.FORMATS}}


def _rounded(weight: Tensor, name: quantization.Quantization) -> Tensor:
    """What a format makes of a weight."""
    format_ = quantization.FORMATS[name]
    return format_.made(format_.held(weight), weight.shape, torch.float32)


def _large(source: str, base: Base) -> dict[str, Tensor]:
    """The weights of the base that would be quantized."""
    shell = load_base(source, precision=base.precision, unet=False)
    quantize(shell.unet, "int8")
    found = [path for path, each in shell.unet.named_modules() if isinstance(each, Quantized)]
    return {path: base.unet.get_submodule(path).weight.detach() for path in found}


@torch.no_grad()
def _predictions(base: Base) -> Tensor:
    prompts = list(UNRELATED)
    text, side = base.encode_text(prompts), base.resolution // base.vae_factor
    latents = randomness.normal((len(prompts), base.unet.config.in_channels, side, side), 0, "int8")
    found = []
    for timestep in _TIMESTEPS:
        found.append(base.predict(latents, torch.full((len(prompts),), timestep), text))
    return torch.cat(found)


def _trained(config: Config, *words: str) -> dict[str, Any]:
    """What the run's log says at its end, the same on the base as it is, and the median seconds of a step."""
    at: list[float] = []
    done = Step.done

    def timed(step: Step, **values: Any) -> None:
        done(step, **values)
        at.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        told = ["--images", str(config.images), "--output", str(output), "--base", config.base, "--sample-every", "0"]
        options = parse(lora.Config, [str(_RECIPE), *told, "--steps", str(config.steps), *words], program="train lora")
        Step.done = timed  # type: ignore[assignment, method-assign]
        try:
            adapter = lora.train(options)
        finally:
            Step.done = done  # type: ignore[method-assign]
        # A step that learns nothing measures what is there.
        still = {"init_from": adapter, "steps": 1, "learning_rate": 1e-12, "measure_every": 1, "quantize": None}
        again = lora.train(replace(options, output=Path(folder) / "whole", **still)).parent
        figures, whole = (
            {name: round(value, 4) for name, value in read_overview(run).figures.items()} for run in (output, again)
        )
    steps_s = [later - earlier for earlier, later in pairwise(at)]
    return {
        **figures,
        "whole": {name: whole[name] for name in ("fit", "drift")},
        "step_s": round(median(steps_s), 3),
    }


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.quantized")


if __name__ == "__main__":
    cli.run(main)
