"""fp32 on a CPU, torch's own layers beside `sfumato.precision.cpu_matmul`: single layers, a full-size U-Net's passes.

    python -m bench.products [--family sdxl --resolution 512]

Both sides in turns in one process; prints JSON: CPU milliseconds, the least of the rounds, and ours over torch's. That
values and gradients are the same is in tests/precision/test_products.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.full_size import added_conditions
from bench.real import check_least, print_report
from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.models.single_file import packaged_config
from sfumato.models.weights import unet_skeleton
from sfumato.precision import cpu_matmul

LINEAR = ((1024, 320, 2560), (256, 640, 640), (64, 1280, 10240), (64, 5120, 1280), (77, 768, 320), (1024, 320, 16))
"""Rows, in, out: of SD 1.5 at 256 px."""
CONVOLUTIONS = ((1, 320, 320, 32), (1, 1920, 640, 16), (1, 1280, 1280, 8), (1, 2560, 1280, 4), (4, 1280, 1280, 8))
"""Pictures, in, out, side."""
TAPS = ((1, 1), (1, 1), (1, 1))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure fp32 products."""

    family: Literal["sd1", "sd2", "sdxl"] = "sd1"
    """Whose U-Net."""
    resolution: int = 256
    """Side of the picture in pixels."""
    rounds: int = 5
    """Rounds of each layer; of the U-Net two."""
    threads: int = 1
    """Threads of torch."""


Work = Callable[[], Any]


def beside(torchs: Work, ours: Work, rounds: int) -> dict[str, float]:
    """The least CPU milliseconds of both, in turns after one unmeasured call of each."""
    least = {"torch_ms": float("inf"), "ours_ms": float("inf")}
    for number in range(rounds + 1):
        for name, work in (("torch_ms", torchs), ("ours_ms", ours)):
            began = time.process_time()
            work()
            if number:
                least[name] = min(least[name], (time.process_time() - began) * 1e3)
    return {name: round(ms, 3) for name, ms in least.items()} | {
        "ratio": round(least["ours_ms"] / least["torch_ms"], 3)
    }


def passes(y: Tensor, x: Tensor) -> Work:
    """The backward pass to the input."""
    return lambda: torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)


def both_ways(x: Tensor, torchs: Work, ours: Work, rounds: int) -> dict[str, Any]:
    """What both take forward, and backward to `x`."""
    return {
        "forward": beside(torchs, ours, rounds),
        "backward": beside(passes(torchs(), x), passes(ours(), x), rounds),
    }


def linear(rows: int, inner: int, out: int, rounds: int) -> dict[str, Any]:
    """One frozen linear layer, both ways."""
    x, weight = torch.randn(rows, inner, requires_grad=True), torch.randn(out, inner)
    return both_ways(x, lambda: F.linear(x, weight), lambda: cpu_matmul.linear(x, weight), rounds)


def convolution(pictures: int, channels: int, out: int, side: int, rounds: int) -> dict[str, Any]:
    """One frozen 3 x 3 convolution, both ways; as a product only where `quicken` takes it for one."""
    x, weight = torch.randn(pictures, channels, side, side, requires_grad=True), torch.randn(out, channels, 3, 3)
    if not cpu_matmul.is_small_convolution(x, weight, TAPS, 1):
        return {"as": "torch's own"}
    return both_ways(
        x,
        lambda: F.conv2d(x, weight, None, *TAPS),
        lambda: cpu_matmul.convolve_small(x, weight, None, TAPS),
        rounds,
    )


def unet(family: str, px: int, rounds: int = 2) -> dict[str, Any]:
    """A U-Net of full size with constant weights: forward, and forward with the backward pass to the text."""
    model: Any = unet_skeleton(packaged_config(family, "unet/config.json")).to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1e-3)
    side = px // 8
    x, text = torch.randn(1, 4, side, side), torch.randn(1, 77, model.config.cross_attention_dim, requires_grad=True)
    added = added_conditions(model.config)

    def forward() -> Tensor:
        drawn: Tensor = model(x, torch.zeros(1), text, added_cond_kwargs=added).sample
        return drawn

    def both() -> None:
        forward().sum().backward()

    report: dict[str, Any] = {}
    for name, work in (("forward", torch.no_grad()(forward)), ("forward and backward", both)):
        report[name] = beside(_as(model, work, quick=False), _as(model, work, quick=True), rounds)
    return report


def _as(model: nn.Module, work: Work, *, quick: bool) -> Work:
    """The work, with the model's layers quickened, or as torch has them."""

    def done() -> None:
        if quick:
            cpu_matmul.use_fast_matmul(model)
        try:
            work()
        finally:
            for module in model.modules():
                module.__dict__.pop("forward", None)
                module.__dict__.pop("_conv_forward", None)

    return done


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    check_least(config, "rounds", "threads")
    if config.resolution < 64 or config.resolution % 64:
        raise ConfigError(f"--resolution {config.resolution}: wanted a multiple of 64 px.")
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    return {
        "by": "oneDNN" if cpu_matmul.mkl_is_slow() and cpu_matmul.onednn() else "torch",
        "threads": config.threads,
        "linear": {" x ".join(map(str, sizes)): linear(*sizes, config.rounds) for sizes in LINEAR},
        "convolutions": {" x ".join(map(str, sizes)): convolution(*sizes, config.rounds) for sizes in CONVOLUTIONS},
        f"{config.family} U-Net at {config.resolution} px": unet(config.family, config.resolution),
    }


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.products")


if __name__ == "__main__":
    cli.run(main)
