"""What frozen weights are kept in: int8 or nf4, as tensors of whole numbers that no `to` of a model rounds.

**int8** (one byte a weight): each output of a layer has a scale of its own, the largest of its weights divided by 127
(symmetric quantization per channel; Jacob et al. 2018, Nagel et al. 2021, sections 2.2 and 2.4).

**nf4** (half a byte, and a quarter of a bit for the scales): each 64 weights in a row have a scale, the largest of them
in bf16, and each weight is the nearest of 16 levels, which are as likely as each other where weights are distributed
normally (QLoRA, Dettmers et al. 2023, section 3 and appendix E; as bitsandbytes packs it, whose scales are fp32).

A frozen U-Net's large weights in few bits: in int8 half the memory of bf16, in nf4 little more than a quarter.

The weight is made again for each product, in the product's dtype, and nothing of its size is kept between the forward
and the backward pass. `bench/quantized.py` measures the rounding, beside that of fp8.

Normalisations, biases, time embeddings and the first and the last convolution stay as they are: they are small, and
what they compute is in all of the picture.

The tensor behind a module's weight or bias, wherever offloading and quantisation have put it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import PrecisionError

Quantization = Literal["int8", "nf4"]

_LARGEST_CODE = 127
BLOCK = 64
"""Weights of nf4 that share a scale."""
# fmt: off
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""Of nf4, as shares of the scale."""


class Format(Protocol):
    """names: of the tensors that hold a weight. a_weight: what a weight takes, in words."""

    names: Sequence[str]
    a_weight: str

    def held(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What holds this weight (out, ...), rounded: whole numbers, in the order of `names`."""
        ...

    def made(self, held: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The weight of this shape that is held, rounded once to this dtype."""
        ...


class Int8:
    """codes: int8 of the weight's shape. scale_bits: of fp32 (out, 1, ...)."""

    names: Sequence[str] = ("codes", "scale_bits")
    a_weight = "one byte each"

    def held(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Each weight as a multiple of its output's scale."""
        largest = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1))
        scale = (largest.float() / _LARGEST_CODE).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (weight.float() / scale).round().clamp(-_LARGEST_CODE, _LARGEST_CODE)
        return codes.to(torch.int8), scale.view(torch.int32)

    def made(self, held: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Codes times scales."""
        codes, scale_bits = held
        return (codes * scale_bits.view(torch.float32)).to(dtype)


class Nf4:
    """codes: uint8, two weights each, the first in the upper half. scale_bits: of bf16, one a block. pair_bits: of fp32
    (256, 2), the levels of both halves of each code, here so that they are on the weight's device."""

    names: Sequence[str] = ("codes", "scale_bits", "pair_bits")
    a_weight = "half a byte each"

    def held(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Each weight as the nearest level of its block."""
        flat = weight.float().flatten()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True).to(torch.bfloat16)
        levels = torch.tensor(LEVELS, device=weight.device)
        between = (levels[1:] + levels[:-1]) / 2
        shares = blocks / scale.float().clamp(min=torch.finfo(torch.float32).tiny)
        nearest = torch.bucketize(shares, between, out_int32=True).to(torch.uint8).view(-1, 2)
        codes = nearest[:, 0] * 16 + nearest[:, 1]
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
        return codes, scale.flatten().view(torch.int16), pairs.view(torch.int32)

    def made(self, held: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Levels times scales."""
        codes, scale_bits, pair_bits = held
        values = F.embedding(codes.int(), pair_bits.view(torch.float32)).view(-1, BLOCK)
        weights = values.mul_(scale_bits.view(torch.bfloat16)[:, None]).flatten()
        return weights[: prod(shape)].view(shape).to(dtype)


FORMATS: Mapping[Quantization, Format] = MappingProxyType({"int8": Int8(), "nf4": Nf4()})


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


def set_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module one of its weights, frozen."""
    if name == "weight" and isinstance(module, Quantized):
        module.take(value)
    else:
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def drop_weights(module: nn.Module) -> None:
    """Leave the module's own weights without memory."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    if isinstance(module, Quantized):
        module.hold(tensor.to("meta") for tensor in module.held)


def stored_tensor(module: nn.Module, name: str) -> Tensor | None:
    """The module's tensor of this name, to be read and written; None if it has none.

    Where accelerate has switched on sequential offload, the module itself is empty (on the device `meta`) between its
    calls, and each call takes the weight from a map in main memory: then that one is meant.
    """
    if name == "weight" and isinstance(module, Quantized):
        return module.held[0]  # what it gives as its weight is nobody's to write into
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        return None
    if tensor.device.type != "meta":
        return tensor
    for hook in _hooks(getattr(module, "_hf_hook", None)):
        weights = getattr(hook, "weights_map", None)
        try:
            found = None if weights is None else weights[name]
        except KeyError:
            continue
        if isinstance(found, Tensor) and found.device.type != "meta":
            return found
    return tensor


def _hooks(hook: Any) -> tuple[Any, ...]:
    return tuple(getattr(hook, "hooks", (hook,)))


def group_offloading(part: nn.Module) -> set[str]:
    """How diffusers' `enable_group_offload` keeps the tensors between calls: "disk" where they are in files alone,
    "stream" where they come back from copies that it holds; empty otherwise."""
    found = set()
    for module in part.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for group in (getattr(hook, "group", None) for hook in hooks.values()):
            if getattr(group, "offload_to_disk_path", None) is not None:
                found.add("disk")
            elif getattr(group, "stream", None) is not None:
                found.add("stream")
    return found


def is_plain_float(tensor: Tensor | None) -> bool:
    """Whether the tensor holds its numbers in a float dtype of 16 bits or more, so that it can be summed into."""
    return _holds_numbers(tensor) and tensor.dtype.itemsize > 1


def is_layerwise_cast(module: nn.Module, weight: Tensor | None) -> bool:
    """Whether torch's own layer keeps its weight in 8 bits and widens it to compute, as diffusers' layerwise casting
    has it. In a layer of another class the numbers may have a scale beside them."""
    return type(module) in (nn.Linear, nn.Conv2d) and _holds_numbers(weight) and weight.dtype.itemsize == 1


def _holds_numbers(tensor: Tensor | None) -> TypeGuard[Tensor]:
    # A quantised weight of torchao and the like says it were bf16; it is a class of its own.
    return tensor is not None and tensor.is_floating_point() and type(tensor) in (Tensor, nn.Parameter)


def module_weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the module's weight as a change sees it, also where quantisation packs it into another."""
    if isinstance(getattr(module, "in_features", None), int):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without the library's: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
