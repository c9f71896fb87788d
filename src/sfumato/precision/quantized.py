"""A frozen U-Net's large weights in few bits: in int8 half the memory of bf16, in nf4 little more than a quarter.

The weight is made again for each product, in the product's dtype, and nothing of its size is kept between the forward
and the backward pass. `bench/quantized.py` measures the rounding, beside that of fp8.

Normalisations, biases, time embeddings and the first and the last convolution stay as they are: they are small, and
what they compute is in all of the picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import PrecisionError
from sfumato.precision.formats import FORMATS, Quantization

_LEAST = 4096
"""Numbers of a weight below which it stays as it is."""
_KEPT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding")
"""Parts of the U-Net that stay as they are."""


class Quantized(nn.Module):
    """A layer whose weight is held as its format has it. Its `weight` is made anew each time it is asked for, in the
    dtype of that which it took.

    format: the format's name. shape: of the weight. The tensors that hold it are buffers, by the format's names.
    """

    format: Quantization
    shape: torch.Size
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def held(self) -> tuple[Tensor, ...]:
        """What holds the weight."""
        return tuple(getattr(self, name) for name in FORMATS[self.format].names)

    @property
    def weight(self) -> Tensor:
        return FORMATS[self.format].made(self.held, self.shape, self.dtype)

    def take(self, weight: Tensor) -> None:
        """Hold this weight from now on, rounded."""
        self.shape, self.dtype = weight.shape, weight.dtype
        self.hold(FORMATS[self.format].held(weight))

    def hold(self, held: Iterable[Tensor]) -> None:
        """Hold what these tensors stand for, instead."""
        for name, tensor in zip(FORMATS[self.format].names, held, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        how = self.format, self.shape, self.geometry()
        made: Tensor = _Product.apply(x.to(dtype), bias, how, *self.held)  # type: ignore[no-untyped-call]
        return made

    def geometry(self) -> tuple[Any, ...] | None:
        """Stride, padding, dilation and groups of a convolution."""
        return None


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[misc, override]
    """A linear layer."""


class QuantizedConv2d(Quantized, nn.Conv2d):  # type: ignore[misc, override]
    """A convolution."""

    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


class _Product(torch.autograd.Function):
    """Keeps what holds the weight, and neither the weight nor the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, how: tuple[Any, ...], *held: Tensor) -> Tensor:
        ctx.save_for_backward(*held)
        ctx.input, ctx.how = x.shape, how
        format_, shape, geometry = how
        weight = FORMATS[format_].made(held, shape, x.dtype)
        return F.linear(x, weight, bias) if geometry is None else F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (format_, shape, geometry), held = grads, ctx.how, ctx.saved_tensors
        weight, others = FORMATS[format_].made(held, shape, grad.dtype), [None] * (2 + len(held))
        if geometry is None:
            return grad @ weight, *others
        stride, padding, dilation, groups = geometry
        shape_only = grad.new_empty(1).expand(ctx.input)
        mask = [True, False, False]
        found, _, _ = torch.ops.aten.convolution_backward(
            grad, shape_only, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return found, *others


def quantize(unet: nn.Module, format_: Quantization) -> int:
    """Let a U-Net's large layers hold their weights in this format, from when they are read; how many do.

    Raises PrecisionError for a U-Net whose weights are there already.
    """
    found = 0
    for path, module in unet.named_modules():
        kind = _KINDS.get(type(module))
        if kind is None or path.split(".")[0] in _KEPT or module.weight.numel() < _LEAST:  # type: ignore[union-attr]
            continue
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            continue
        weight: Tensor = module.weight  # type: ignore[assignment]
        if not weight.is_meta:
            raise PrecisionError(f"{format_} is for a base whose U-Net is not read yet; load it with unet=False.")
        vars(module).pop("forward", None)  # what computes in its place reads the weight
        del module.weight
        module.__class__ = kind
        module.format = format_
        module.take(weight)
        found += 1
    return found


_KINDS: dict[type[nn.Module], type[Quantized]] = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}


def stored_weights(module: nn.Module) -> dict[str, torch.Size]:
    """The module's own weights as files have them: their names and shapes."""
    shapes = {name: weight.shape for name, weight in module.named_parameters(recurse=False)}
    return {"weight": module.shape, **shapes} if isinstance(module, Quantized) else shapes


def take_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module one of its weights, frozen."""
    if name == "weight" and isinstance(module, Quantized):
        module.take(value)
    else:
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def empty(module: nn.Module) -> None:
    """Leave the module's own weights without memory."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    if isinstance(module, Quantized):
        module.hold(tensor.to("meta") for tensor in module.held)
