"""LoRA and LoCon: alpha / rank * up down (Hu et al. 2021), for convolutions also with a Tucker core (LyCORIS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.files.changes.change import check_fits, trim
from sfumato.files.changes.module_tensors import ModuleTensors
from sfumato.files.kohya import Target

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
        return trim(self.shape) == trim(shape)

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
