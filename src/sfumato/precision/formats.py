"""What frozen weights are kept in: int8 or nf4, as tensors of whole numbers that no `to` of a model rounds.

**int8** (one byte a weight): each output of a layer has a scale of its own, the largest of its weights divided by 127
(symmetric quantization per channel; Jacob et al. 2018, Nagel et al. 2021, sections 2.2 and 2.4).

**nf4** (half a byte, and a quarter of a bit for the scales): each 64 weights in a row have a scale, the largest of them
in bf16, and each weight is the nearest of 16 levels, which are as likely as each other where weights are distributed
normally (QLoRA, Dettmers et al. 2023, section 3 and appendix E; as bitsandbytes packs it, whose scales are fp32).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

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
