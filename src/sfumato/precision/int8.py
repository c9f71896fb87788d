"""A frozen U-Net's large weights in int8: half the memory of bf16, a quarter of fp32's.

Each output of a layer has a scale of its own, the largest of its weights divided by 127 (symmetric quantization per
channel; Jacob et al. 2018, Nagel et al. 2021, sections 2.2 and 2.4). The weight is made again for each product, in the
product's dtype, and nothing of its size is kept between the forward and the backward pass. `bench/int8.py` measures the
rounding, beside that of fp8 at the same size.

Normalisations, biases, time embeddings and the first and the last convolution stay as they are: they are small, and
what they compute is in all of the picture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import PrecisionError

_LEVELS = 127
_LEAST = 4096
"""Numbers of a weight below which it stays as it is."""
_KEPT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding")
"""Parts of the U-Net that stay as they are."""


class Quantized(nn.Module):
    """A layer whose weight is `codes` times the scale of each output. Its `weight` is made anew each time it is asked
    for, in the dtype of that which it took.

    scale_bits: of the fp32 scales, as whole numbers, which no `to` of a model in half precision rounds.
    """

    codes: Tensor
    scale_bits: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def scale(self) -> Tensor:
        """(out, 1, ...), fp32."""
        return self.scale_bits.view(torch.float32)

    @property
    def weight(self) -> Tensor:
        return dequantized(self.codes, self.scale, self.dtype)

    def take(self, weight: Tensor) -> None:
        """Hold this weight from now on, rounded."""
        codes, scale = quantized(weight)
        self.codes, self.scale_bits, self.dtype = codes, scale.view(torch.int32), weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        made: Tensor = _Product.apply(x.to(dtype), self.codes, self.scale, bias, self.geometry())  # type: ignore[no-untyped-call]
        return made

    def geometry(self) -> tuple[Any, ...] | None:
        """Stride, padding, dilation and groups of a convolution."""
        return None


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[misc, override]
    """A linear layer in int8."""


class QuantizedConv2d(Quantized, nn.Conv2d):  # type: ignore[misc, override]
    """A convolution in int8."""

    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a weight (out, ...): int8 of its shape, and fp32 (out, 1, ...)."""
    largest = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1))
    scale = (largest.float() / _LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight.float() / scale).round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scale


def dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in this dtype, rounded once."""
    return (codes * scale).to(dtype)


class _Product(torch.autograd.Function):
    """Keeps codes and scales, and neither the weight nor the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, geometry: tuple[Any, ...] | None
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.shape, ctx.geometry = x.shape, geometry
        weight = dequantized(codes, scale, x.dtype)
        return F.linear(x, weight, bias) if geometry is None else F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (codes, scale) = grads, ctx.saved_tensors
        weight = dequantized(codes, scale, grad.dtype)
        if ctx.geometry is None:
            return grad @ weight, None, None, None, None
        stride, padding, dilation, groups = ctx.geometry
        shape_only = grad.new_empty(1).expand(ctx.shape)
        mask = [True, False, False]
        found, _, _ = torch.ops.aten.convolution_backward(
            grad, shape_only, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return found, None, None, None, None


def quantize(unet: nn.Module) -> int:
    """Let a U-Net's large layers hold their weights in int8, from when they are read; how many do.

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
            raise PrecisionError("int8 is for a base whose U-Net is not read yet; load it with unet=False.")
        vars(module).pop("forward", None)  # what computes in its place reads the weight
        del module.weight
        module.__class__ = kind
        for name in ("codes", "scale_bits"):
            module.register_buffer(name, None, persistent=False)
        module.take(weight)
        found += 1
    return found


_KINDS: dict[type[nn.Module], type[Quantized]] = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}


def stored_weights(module: nn.Module) -> dict[str, torch.Size]:
    """The module's own weights as files have them: their names and shapes."""
    shapes = {name: weight.shape for name, weight in module.named_parameters(recurse=False)}
    return {"weight": module.codes.shape, **shapes} if isinstance(module, Quantized) else shapes


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
        module.codes, module.scale_bits = module.codes.to("meta"), module.scale_bits.to("meta")
