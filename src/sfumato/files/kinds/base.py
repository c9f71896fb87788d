"""What every kind of adapter is to a weight: a change that knows its shape and its delta.

One module's tensors as a file gives them, on the way to a Change. Looks at shapes only.

LoRA and LoCon: alpha / rank * up down (Hu et al. 2021), for convolutions also with a Tucker core (LyCORIS).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.module_names import Target
from sfumato.files.peft import PeftSettings


@runtime_checkable
class Change(Protocol):
    """An adapter's change of one module's weight W, at mixing weight 1. A mix is W + sum of w_i delta_i(W).

    Shapes were checked when the file was read. Nothing as large as the weight is computed before `delta` is called, and
    `delta` computes nothing larger than a few tensors of the weight's size.
    """

    @property
    def kind(self) -> str:
        """ "LoRA", "DoRA", "LoHa", ...: a key of `sfumato.files.kinds.KINDS`."""

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


def weight_independent_delta(change: Change) -> Tensor | None:
    """The delta of a change that adds the same to every weight; None of others, and where their shape is not known.

    Its shape is that of the factors, in which a kernel may lie within the columns.
    """
    shape = getattr(change, "shape", None)
    return None if change.needs_weight or shape is None else change.delta(torch.zeros(1).expand(tuple(shape)))


def squeeze_kernel(shape: Sequence[int]) -> tuple[int, ...]:
    """A weight's shape with a 1x1 kernel left out, so that a 1x1 convolution is a linear layer."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def check_fits(change: Change, shape: Sequence[int]) -> None:
    """Raise AdapterError unless `change` is one to a weight of this shape; called before any product is formed."""
    if not change.fits(shape):
        raise AdapterError(
            f"this {change.kind} does not fit a weight of shape {list(shape)}. Load it on the base it was trained on."
        )


KERNEL_LIMIT = 1024
"""Values in a convolution's kernel. Those of SD have nine; more would let a small file ask for much memory."""


@dataclass(frozen=True)
class ModuleTensors:
    """tensors: by role, views of the mapped file. names: what the file calls them. settings: peft's, if it has any.

    by_onetrainer: whether the file says that OneTrainer wrote it.
    """

    file: str
    target: Target
    kind: str
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    settings: PeftSettings
    by_onetrainer: bool = False

    def __getitem__(self, role: str) -> Tensor:
        return self.tensors[role]

    def get(self, role: str) -> Tensor | None:
        return self.tensors.get(role)

    def matrix(self, role: str) -> Tensor:
        """The tensor of a role, (rows, columns) or a convolution of 1x1."""
        value = self.tensors[role]
        if value.ndim not in (2, 4) or (value.ndim == 4 and prod(value.shape[2:]) != 1):
            raise self.shape_error(role, "(rows, columns)")
        return value.reshape(value.shape[:2])

    def core(self, role: str, rank: int) -> Tensor | None:
        """The Tucker core of a role, (rank, rank, height, width); None where the file has none."""
        value = self.tensors.get(role)
        if value is not None and (value.ndim != 4 or tuple(value.shape[:2]) != (rank, rank)):
            raise self.shape_error(role, f"({rank}, {rank}, height, width)")
        if value is not None and prod(value.shape[2:]) > KERNEL_LIMIT:
            raise self.shape_error(role, f"a kernel of at most {KERNEL_LIMIT:,} values")
        return value

    def number(self, role: str) -> float | None:
        """The one value of a role, None where the file has none."""
        value = self.tensors.get(role)
        if value is None:
            return None
        if value.numel() != 1:
            raise self.shape_error(role, "one number")
        return float(value)

    def alpha(self, rank: int) -> float:
        """The module's own alpha, else that of peft's config, else the rank (scale 1)."""
        own = self.number("alpha")
        return self.settings.alpha(self.target, rank) if own is None else own

    def vector(self, role: str) -> Tensor | None:
        """The tensor of a role of which one axis only is longer than 1, as (length,); None where there is none."""
        value = self.tensors.get(role)
        if value is not None and max(value.shape, default=1) != value.numel():
            raise self.shape_error(role, "one value a channel")
        return None if value is None else value.reshape(-1)

    def shape_error(self, role: str, wanted: str) -> AdapterError:
        shape = list(self.tensors[role].shape)
        return self.error(f"{self.names[role].rpartition('.')[2] or role} ({role}) is {shape}; wanted {wanted}")

    def error(self, what: str) -> AdapterError:
        """The error that this module's tensors make no adapter, what: found and wanted."""
        return AdapterError(f"{self.file}: {'.'.join(self.target)}: {what}. Take the file from its source again.")


_OF_3X3 = ("conv1", "conv2", "conv", "conv_in", "conv_out")


@dataclass(frozen=True)
class LoraModule:
    """One module's LoRA update, alpha / rank * up down (Hu et al. 2021).

    down: (rank, in), or for a convolution (rank, in, height, width). up: (out, rank) or (out, rank, 1, 1).
    mid: (rank, rank, height, width) for a Tucker convolution, whose down is (rank, in, 1, 1).
    bias_delta: (out,), what peft's lora_bias or a `diff_b` adds to the module's bias, including its scale.
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None
    bias_delta: Tensor | None = None

    kind: ClassVar[str] = "LoRA"
    needs_weight: ClassVar[bool] = False

    @classmethod
    def from_scale(cls, down: Tensor, up: Tensor, scale: float) -> LoraModule:
        """The module whose update is scale * up down, whatever the trainer's scaling rule is."""
        return cls(down, up, scale * down.shape[0])

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> LoraModule:
        down, up = _with_kernel(parts["down"], parts.target), parts["up"]
        rank = down.shape[0] if down.ndim else 0
        fits = down.ndim in (2, 4) and up.ndim in (2, 4)
        if not fits or up.shape[1] != rank or up.shape[1:].numel() != rank:
            raise parts.error(
                f"the halves do not fit: lora_down {list(down.shape)}, lora_up {list(up.shape)}; wanted (rank, in) "
                "and (out, rank)"
            )
        mid = parts.core("mid", rank)
        if mid is not None and down.shape[1:].numel() != down.shape[1]:
            raise parts.shape_error("down", "(rank, in, 1, 1) beside lora_mid")
        alpha = parts.alpha(rank)
        bias, up_bias = parts.vector("bias"), parts.vector("up_bias")
        if bias is not None and up_bias is not None:
            raise parts.error("there are two changes of the bias, lora_B.bias and diff_b")
        if up_bias is not None:
            bias = up_bias.float() * (alpha / rank)
        if bias is not None and bias.numel() != up.shape[0]:
            raise parts.error(f"the bias has {bias.numel()} values; wanted {up.shape[0]}, as lora_up has rows")
        # Where one module changes its bias, diffusers' form has one in all of them, of zeros.
        return cls(down, up, alpha, mid, bias if bias is not None and bool(bias.any()) else None)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The update's shape: (out, in) or (out, in, height, width)."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    @property
    def is_zero(self) -> bool:
        """Whether a factor is all zeros, as before any training; the bias is ignored."""
        return not (self.up.any() and self.down.any())

    def fits(self, shape: Sequence[int]) -> bool:
        return squeeze_kernel(self.shape) == squeeze_kernel(shape)

    def plain(self) -> LoraModule:
        """The same update without `mid`: a Tucker convolution becomes a convolution of the same rank, with down in
        fp32."""
        if self.mid is None:
            return self
        down = torch.einsum("pqhw,qi->pihw", self.mid.float(), self.down.float().flatten(1))
        # Rounded to the file's dtype, the product of the core would be another change.
        return LoraModule(down, self.up, self.alpha, bias_delta=self.bias_delta)

    def low_rank(self) -> LoraModule:
        return self.plain()

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The update in fp32, in the shape of `weight` and on its device; without a weight, in its own shape."""
        if weight is not None:
            check_fits(self, weight.shape)
        down, up = self.down.float(), self.up.float()
        if weight is not None:
            down, up = down.to(weight.device), up.to(weight.device)
        if self.mid is not None:
            down = torch.einsum("pqhw,qi->pihw", self.mid.to(down), down.flatten(1))
        shape = self.shape if weight is None else weight.shape
        return self.scale * (up.flatten(1) @ down.flatten(1)).view(shape)


def _with_kernel(down: Tensor, target: Target) -> Tensor:
    """Down, of a convolution of 3x3 with its kernel: ComfyUI's Train LoRA node writes (rank, in * 9)."""
    flat = target[0] == "unet" and target[1].rpartition(".")[2] in _OF_3X3 and down.ndim == 2
    return down.view(len(down), -1, 3, 3) if flat and down.shape[1] and down.shape[1] % 9 == 0 else down
