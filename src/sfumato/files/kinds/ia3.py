"""(IA)^3 (Liu et al. 2022): a factor on each input or output.

What a change does to its module's bias.

The weight of another model in the place of one: what a whole model is as an adapter.

Full differences of weights, biases and norms, and weights to set (ComfyUI): no factors at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.files.kinds.base import Change, ModuleTensors, WithoutLowRank, check_fits, squeeze_kernel
from sfumato.files.module_names import DENOISERS, Target


@dataclass(frozen=True)
class Ia3(WithoutLowRank):
    """W * gain along one axis, gain: the factor less 1, (out,) or, where on_input, (in,).

    LyCORIS stores the gain and leaves the bias alone. peft stores the factor, and on outputs it multiplies the bias
    with it as well: scales_bias, so that the bias changes by gain * bias.
    """

    gain: Tensor
    on_input: bool
    scales_bias: bool = False
    bias_delta: Tensor | None = None

    kind: ClassVar[str] = "IA3"
    needs_weight: ClassVar[bool] = True

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> Ia3:
        bias = parts.vector("bias")
        if parts.get("ia3_l") is None:
            gain, on_input = parts.vector("ia3_weight"), parts.number("on_input")
            assert gain is not None
            if on_input not in (0, 1):
                raise parts.shape_error("on_input", "0 or 1")
            return cls(gain, bool(on_input), bias_delta=bias)
        factor, vector = parts["ia3_l"], parts.vector("ia3_l")
        assert vector is not None
        if factor.ndim < 2:
            raise parts.shape_error("ia3_l", "(out, 1) or (1, in)")
        if factor.ndim == 2:
            on_input = factor.shape[0] == 1
        else:  # a convolution's is [1, channels, 1, 1] whatever the channels are
            names = parts.settings.get(parts.target, "feedforward_modules") or []
            if not parts.settings.folder:
                raise parts.error("ia3_l of a convolution, whose axis only peft's config tells; wanted peft's folder")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise parts.error("peft's feedforward_modules is a pattern; wanted a list of names")
            path = parts.target[1]
            on_input = any(path == name or path.endswith(f".{name}") for name in names)
        return cls(vector.float() - 1, on_input, scales_bias=not on_input, bias_delta=bias)

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1 and self.gain.numel() == shape[1 if self.on_input else 0]

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        sizes = [1] * weight.ndim
        sizes[1 if self.on_input else 0] = -1
        return weight.float() * self.gain.to(weight.device).float().view(sizes)


def extract_command(change: object) -> str:
    """The command that makes a LoRA of what is none."""
    if isinstance(change, Replacement):
        return "sfumato extract MODEL --base BASE --rank 32"
    return "sfumato convert FILE --bake lora"


@dataclass(frozen=True)
class Replacement(WithoutLowRank):
    """W' - W, so that a mix is W + w (W' - W), which web interfaces call the weighted sum of two checkpoints.

    value: W', of the weight's shape. bias: the other model's bias, (out,).
    """

    value: Tensor
    bias: Tensor | None = None

    kind: ClassVar[str] = "whole model"
    needs_weight: ClassVar[bool] = True
    bias_delta: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        return squeeze_kernel(self.value.shape) == squeeze_kernel(shape)

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        return self.value.to(weight.device).float().reshape(weight.shape) - weight.float()


@dataclass(frozen=True)
class BiasChange:
    """The change of a bias, as one of a weight: value + gain * bias."""

    kind: str
    value: Tensor | None
    gain: Tensor | None = None
    bias_delta: None = None

    @property
    def needs_weight(self) -> bool:
        return self.gain is not None

    def fits(self, shape: Iterable[int]) -> bool:
        return all(tuple(shape) == tuple(each.shape) for each in (self.value, self.gain) if each is not None)

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        total = torch.zeros(weight.shape, device=weight.device)
        if self.gain is not None:
            total.addcmul_(weight.float(), self.gain.to(weight.device, torch.float32))
        return total if self.value is None else total.add_(self.value.to(weight.device, torch.float32))

    def low_rank(self) -> None:
        return None


_WITHOUT_BIAS = frozenset({"to_q", "to_k", "to_v"})


def may_have_bias(target: Target) -> bool:
    """Whether a layer may have a bias: in the U-Net's attention, queries, keys and values have none in any family."""
    part, path = target
    return part not in DENOISERS or path.rpartition(".")[2] not in _WITHOUT_BIAS


def bias_change(change: Change, *, has_bias: bool = True) -> BiasChange | None:
    """What the change does to the bias; None where it leaves it alone.

    has_bias: whether the layer has one; a gain, which peft's IA3 gives every layer, is nothing where it has none.
    """
    found = _bias_change(change)
    return None if found is not None and found.value is None and not has_bias else found


def _bias_change(change: Change) -> BiasChange | None:
    if isinstance(change, Replacement):
        return None if change.bias is None else BiasChange(change.kind, change.bias, -torch.ones(change.bias.shape))
    gain = change.gain if isinstance(change, Ia3) and change.scales_bias else None
    return None if gain is None and change.bias_delta is None else BiasChange(change.kind, change.bias_delta, gain)


@dataclass(frozen=True)
class Difference(WithoutLowRank):
    """W + value, or value in W's place where it replaces; without a value the bias alone changes.

    value: of the weight's shape, for a norm (channels,).
    """

    value: Tensor | None
    bias_delta: Tensor | None = None
    replaces: bool = False

    kind: ClassVar[str] = "difference"

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> Difference:
        difference, whole = parts.get("diff"), parts.get("set_weight")
        if difference is not None and whole is not None:
            raise parts.error("a difference and a weight to set; wanted one of them")
        if parts.get("alpha") is not None:
            raise parts.error("an alpha beside a difference, which no tool scales")
        value = difference if whole is None else whole
        return cls(value, parts.vector("bias"), whole is not None)

    @property
    def needs_weight(self) -> bool:
        return self.replaces

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The weight's; None where what is added to it is not known without it."""
        return None if self.value is None or self.replaces else tuple(self.value.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        if self.bias_delta is not None and (not shape or self.bias_delta.numel() != shape[0]):
            return False
        return self.value is None or squeeze_kernel(self.value.shape) == squeeze_kernel(shape)

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        if self.value is None:
            return torch.zeros(weight.shape, device=weight.device)
        value = self.value.to(weight.device).float().reshape(weight.shape)
        return value - weight.float() if self.replaces else value.clone()


def changes_weight(change: Change) -> bool:
    """Whether it changes the module's weight; False where it is a difference of the bias alone."""
    return not isinstance(change, Difference) or change.value is not None
