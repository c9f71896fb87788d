"""fp32 products on a CPU: by oneDNN where MKL is slow, and small pictures' convolutions as products.

torch multiplies fp32 matrices by MKL, which leaves half of the speed of AMD's processors with AVX-512 unused; oneDNN,
which torch has for convolutions, does not. And oneDNN packs a convolution's weight anew at each call: at the inner
levels of a U-Net, where the picture is smaller than the weight, that takes three times as long as the product itself.
`bench/products.py` measures both.

Products of fp32 numbers that are as exact as fp32, whatever is switched on for all others.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Stride, padding and dilation of a convolution."""

SMALL = 4_000
"""A convolution is a product where its output has at most one pixel (of all pictures) for so many pairs of channels."""
_PIXELS = 2048
"""Of all pictures; with more, turning them into rows and back takes longer than the quicker product saves."""
_LEAST = 1 << 20
"""Multiplications of a product below which the way to oneDNN takes longer than it saves."""


@cache
def onednn() -> Callable[..., Tensor] | None:
    """oneDNN's fp32 product (x, weight, bias, "none", [], "") -> x weight' + bias, if torch has it."""
    product: Callable[..., Tensor] | None = getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)
    if product is None:
        return None
    up, down = torch.arange(6.0).view(3, 2), torch.arange(8.0).view(2, 4)
    try:  # it is torch's own, not promised to anyone: another signature in another version is no reason to fail
        good = torch.equal(product(up, down.t(), None, "none", [], ""), up @ down)
    except (RuntimeError, TypeError):
        return None
    return product if good else None


@cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies by MKL on a processor whose AVX-512 that leaves unused: AMD's. With AVX2 alone MKL is
    the quicker one there, too.

    Told by maker and flags and not by the clock, so that a run gives the same bits each time.
    """
    mkl: Any = torch.backends.mkl  # whose functions have no types
    return mkl.is_available() and "AuthenticAMD" in processor() and "avx512f" in processor().split()


@cache
def processor() -> str:
    """What Linux tells of the first processor, its maker and flags among it; elsewhere its name, which on Windows holds
    the maker, and the flags that torch knows of."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        flags = (flag for flag, asked in _FLAGS.items() if getattr(torch.cpu, asked, bool)())
        return " ".join([platform.processor(), *flags])


_FLAGS = {
    "avx512f": "_is_avx512_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "amx_bf16": "_is_amx_tile_supported",  # no processor has the one without the other
}
"""By Linux's names of flags, what torch calls its questions; they are its own, and may be lacking."""


def _product() -> Callable[..., Tensor] | None:
    return onednn() if mkl_is_slow() and torch.backends.mkldnn.enabled else None


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias, (rows, in) by (out, in); no gradients."""
    product = _product()
    return F.linear(x, weight, bias) if product is None else product(x, weight, bias, "none", [], "")


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether both are ordinary fp32 tensors on the CPU."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias, as torch.nn.functional.linear; (..., in), (out, in), (out,)."""
    if (
        torch.compiler.is_compiling()
        or x.numel() * len(weight) < _LEAST
        or _product() is None
        or not _is_plain(x, weight)
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias)):
        learned: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return learned
    return _matmul(x, weight, bias)


class _Linear(torch.autograd.Function):
    """Keeps the input only where the weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _matmul(rows, weight.t()).view(*grads[0].shape[:-1], -1) if of_x else None,
            _matmul(rows.t(), x.reshape(len(rows), -1).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def is_small_convolution(x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> bool:
    """Whether the convolution takes less time as a product: the packing of its weight would outweigh it."""
    if groups != 1 or x.ndim != 4 or weight.shape[2:] == (1, 1):
        return False
    height, width = _size(x, weight, geometry)
    return len(x) * height * width * SMALL <= weight.shape[0] * weight.shape[1] and _is_plain(x, weight)


def is_pointwise_convolution(x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> bool:
    """Whether the convolution is a linear layer of a few pixels, which oneDNN multiplies in less time."""
    return (
        _product() is not None
        and groups == 1
        and x.ndim == 4
        and weight.shape[2:] == (1, 1)
        and geometry == ((1, 1), (0, 0), (1, 1))
        and len(x) * x.shape[2] * x.shape[3] <= _PIXELS
        and _is_plain(x, weight)
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int) -> Tensor | None:
    """As torch.nn.functional.conv2d where a product takes less time; None where it does not."""
    if torch.compiler.is_compiling():  # which makes kernels of its own, and cannot look into these
        return None
    if is_small_convolution(x, weight, geometry, groups):
        return convolve_small(x, weight, bias, geometry)
    if is_pointwise_convolution(x, weight, geometry, groups):
        drawn = linear(x.flatten(2).transpose(1, 2), weight.flatten(1), bias)
        return drawn.transpose(1, 2).reshape(len(x), len(weight), *x.shape[2:]).contiguous()
    return None


def _size(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, int]:
    height, width = (
        (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for side, kernel, stride, padding, dilation in zip(x.shape[2:], weight.shape[2:], *geometry, strict=True)
    )
    return height, width


def convolve_small(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """As torch.nn.functional.conv2d, for what `is_small` says yes to."""
    result: Tensor = _Convolution.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return result


class _Convolution(torch.autograd.Function):
    """Keeps the input only where the weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        columns = _unfold(x, weight, geometry)
        drawn = _matmul(weight.flatten(1), columns.t())
        if bias is not None:
            drawn += bias[:, None]
        return drawn.view(len(weight), len(x), *_size(x, weight, geometry)).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = grads[0].permute(0, 2, 3, 1).reshape(-1, len(weight))
        return (
            _fold(rows, weight, ctx.shape, ctx.geometry) if of_x else None,
            _matmul(rows.t(), _unfold(x, weight, ctx.geometry)).view(weight.shape) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
        )


def _unfold(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(in kernel, pictures pixels): what each output pixel is made of."""
    stride, padding, dilation = geometry
    columns = F.unfold(x, weight.shape[2:], dilation, padding, stride)
    return columns[0] if len(columns) == 1 else columns.transpose(0, 1).flatten(1)


def _fold(rows: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """The gradient of the input, (pictures, in, height, width), from that of each output pixel: (pixels, out)."""
    stride, padding, dilation = geometry
    columns = _matmul(rows, weight.flatten(1).t()).view(shape[0], -1, weight[0].numel()).transpose(1, 2)
    return F.fold(columns, shape[2:], weight.shape[2:], dilation, padding, stride)


def _linear_forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def _conv_forward(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    stride: Any = module.stride
    padding: Any = module.padding
    dilation: Any = module.dilation
    quick = convolve(x, weight, bias, (stride, padding, dilation), module.groups)
    return quick if quick is not None else F.conv2d(x, weight, bias, stride, padding, dilation, module.groups)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether this is torch's linear layer and nothing else, such as an adapter, computes in its place or after it."""
    forward = vars(module).get("forward", _linear_forward)
    return (
        type(module) is nn.Linear and not module._forward_hooks and getattr(forward, "func", forward) is _linear_forward
    )


def use_fast_matmul(model: nn.Module) -> None:
    """Let a model's linear layers and convolutions compute so; its modules, their names and weights stay.

    What computes in a way of its own already keeps it, such as what `lean.save_activation_memory` made of a
    convolution before its weights were there.
    """
    for module in model.modules():
        if {"forward", "_conv_forward"} & vars(module).keys():
            continue
        if type(module) is nn.Linear:
            module.forward = partial(_linear_forward, module)  # type: ignore[method-assign]
        elif type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module._conv_forward = partial(_conv_forward, module)  # type: ignore[method-assign]


class _Exact:
    """The process's settings of fp32 products: the first thread that wants them exact changes them, and the last puts
    them back."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._within = 0
        self._before: list[str] = []

    def begin(self, places: Sequence[Any]) -> None:
        with self._lock:
            if not self._within:
                self._before = [place.fp32_precision for place in places]
                for place in places:
                    place.fp32_precision = "ieee"
            self._within += 1

    def end(self, places: Sequence[Any]) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                for place, precision in zip(places, self._before, strict=True):
                    place.fp32_precision = precision


_EXACT = _Exact()


@contextmanager
def exact_matmul() -> Iterator[None]:
    """fp32 products in fp32, not TF32 or bf16, whatever the caller has switched on, by torch's old settings or new."""
    backends: Any = torch.backends  # whose stubs lack these
    places = backends.mkldnn.matmul, backends.cuda.matmul
    _EXACT.begin(places)
    try:
        yield
    finally:
        _EXACT.end(places)
