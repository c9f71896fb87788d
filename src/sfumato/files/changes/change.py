"""What every kind of adapter is to a weight: a change that knows its shape and its delta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from sfumato.errors import AdapterError

if TYPE_CHECKING:
    from sfumato.files.changes.lora import LoraModule


@runtime_checkable
class Change(Protocol):
    """An adapter's change of one module's weight W, at mixing weight 1. A mix is W + sum of w_i delta_i(W).

    Shapes were checked when the file was read. Nothing as large as the weight is computed before `delta` is called, and
    `delta` computes nothing larger than a few tensors of the weight's size.
    """

    @property
    def kind(self) -> str:
        """ "LoRA", "DoRA", "LoHa", ...: a key of `sfumato.files.changes.KINDS`."""

    @property
    def needs_weight(self) -> bool:
        """Whether delta depends on W. If so, W must be the unchanged base weight."""

    @property
    def bias_delta(self) -> Tensor | None:
        """What mixing weight 1 adds to the module's bias, (out,); None if the file has no such change."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether this changes a weight of this shape. A 1x1 convolution counts as a linear layer."""

    def delta(self, weight: Tensor) -> Tensor:
        """What mixing weight 1 adds to the unchanged `weight`: fp32, of its shape, on its device.

        Raises AdapterError for a weight that the change does not fit. Products run at the caller's fp32 precision.
        """

    def low_rank(self) -> LoraModule | None:
        """The exact low-rank form if there is one (LoRA, Tucker included), else None."""


class WithoutLowRank:
    """A kind of change that no LoRA is exactly equal to."""

    def low_rank(self) -> LoraModule | None:
        """None, see `Change`."""
        return None


def delta_on_any_weight(change: Change) -> Tensor | None:
    """The delta of a change that adds the same to every weight; None of others, and where their shape is not known.

    Its shape is that of the factors, in which a kernel may lie within the columns.
    """
    shape = getattr(change, "shape", None)
    return None if change.needs_weight or shape is None else change.delta(torch.zeros(1).expand(tuple(shape)))


def trim(shape: Sequence[int]) -> tuple[int, ...]:
    """A weight's shape with a 1x1 kernel left out, so that a 1x1 convolution is a linear layer."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def check_fits(change: Change, shape: Sequence[int]) -> None:
    """Raise AdapterError unless `change` is one to a weight of this shape; called before any product is formed."""
    if not change.fits(shape):
        raise AdapterError(
            f"this {change.kind} does not fit a weight of shape {list(shape)}. Load it on the base it was trained on."
        )
