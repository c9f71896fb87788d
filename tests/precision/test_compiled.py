"""torch.compile on a CPU in bf16: what lies below an upsampling learns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import ConfigError
from sfumato.precision import decide
from sfumato.training.pretrain.checks import check_compiler


class Up(nn.Module):
    """What every U-Net does on its way up: double the size, convolve, put beside what was kept, SiLU, convolve."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.doubled, self.beside = (
            nn.Conv2d(width, out, 3, padding=1) for width, out in ((128, 128), (128, 128), (192, 64))
        )

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        doubled = self.doubled(F.interpolate(self.below(x), scale_factor=2.0, mode="nearest"))
        drawn: Tensor = self.beside(F.silu(torch.cat([doubled, kept], 1)))
        return drawn


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("ModuleNotFoundError: No module named 'setuptools'", "Run `pip install setuptools`, or give"),
        ("InvalidCxxCompiler: No working C++ compiler found", "Install a C\\+\\+ compiler such as g\\+\\+, or give"),
    ],
)
def test_what_compiling_wants_is_told(monkeypatch, reason, advice):
    def compiled(function):
        raise RuntimeError(f"{reason}\nand more")

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(ConfigError, match=advice):
        check_compiler(torch.device("cpu"))


@pytest.mark.slow
def test_a_compiled_unet_learns_in_bf16_what_a_plain_one_does():
    try:
        check_compiler(torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    up, x, kept = Up(), torch.randn(2, 128, 8, 8), torch.randn(2, 64, 16, 16)
    precision = decide("bf16", device="cpu")

    def gradients(module: Callable[..., Tensor]) -> list[Tensor]:
        with precision.autocast():
            drawn = module(x, kept)
        return list(torch.autograd.grad(drawn.float().square().mean(), list(up.parameters())))

    for found, wanted in zip(gradients(precision.compiled(up)), gradients(up), strict=True):
        assert (found - wanted).norm() < 0.05 * wanted.norm()
