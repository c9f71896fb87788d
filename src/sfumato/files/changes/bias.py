"""What a change does to its module's bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.files.changes.change import Change, check_fits
from sfumato.files.changes.ia3 import Ia3
from sfumato.files.changes.replacement import Replacement
from sfumato.files.kohya import Target


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
    return part != "unet" or path.rpartition(".")[2] not in _WITHOUT_BIAS


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
