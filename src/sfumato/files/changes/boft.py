"""BOFT (Liu et al. 2024): butterfly products of block rotations, of the outputs (LyCORIS) or the inputs (peft)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.files.changes.change import WithoutLowRank, check_fits
from sfumato.files.changes.module_tensors import ModuleTensors
from sfumato.files.changes.oft import cayley, rescaled, skew


@dataclass(frozen=True)
class OutputBoft(WithoutLowRank):
    """LyCORIS's: stage i regroups outputs (c, 2, k) as (c, k, 2), k = 2^i size / 2, rotates blocks, regroups back.

    blocks: (stages, count, size, size), not skew yet. alpha: the constraint over the number of outputs, over all
    stages together, 0 or None for none. rescale: (out,) or None.
    """

    blocks: Tensor
    alpha: float | None
    rescale: Tensor | None = None
    bias_delta: Tensor | None = None

    kind: ClassVar[str] = "BOFT"
    needs_weight: ClassVar[bool] = True

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> OutputBoft:
        blocks = parts["oft_blocks"]
        if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3] or blocks.shape[2] % 2 or blocks.shape[0] > 32:
            raise parts.shape_error("oft_blocks", "(stages, blocks, size, size), size even")
        return cls(blocks, parts.number("alpha"), parts.vector("rescale"), parts.vector("bias"))

    def fits(self, shape: Sequence[int]) -> bool:
        stages, count, size, _ = self.blocks.shape
        whole = len(shape) > 1 and count * size == shape[0] and shape[0] % (2 ** (stages - 1) * size) == 0
        return whole and (self.rescale is None or self.rescale.numel() == shape[0])

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        constraint = None if self.alpha is None else self.alpha * weight.shape[0]
        turns = cayley(skew(self.blocks, constraint, always=False)).float().to(weight.device)
        size = self.blocks.shape[2]
        turned = weight.float().flatten(1)
        for stage, turn in enumerate(turns):
            half = 2**stage * size // 2
            mixed = turned.view(-1, 2, half, turned.shape[1]).transpose(1, 2).reshape(-1, size, turned.shape[1])
            turned = (turn @ mixed).view(-1, half, 2, turned.shape[1]).transpose(1, 2).reshape(turned.shape)
        delta = turned.view(weight.shape) - weight.float()
        return delta if self.rescale is None else rescaled(delta, weight, self.rescale)


@dataclass(frozen=True)
class InputBoft(WithoutLowRank):
    """peft's: W M' scaled by rows, M the product of P_i blockdiag(R_i) P_i', R the Cayley transform of (B' - B) / 2.

    blocks: (stages, count, size, size). scale: (out,). The inputs are a convolution's flattened with its kernel.
    """

    blocks: Tensor
    scale: Tensor
    bias_delta: Tensor | None = None

    kind: ClassVar[str] = "BOFT"
    needs_weight: ClassVar[bool] = True

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> InputBoft:
        blocks, scale = parts["boft_r"], parts.vector("boft_s")
        assert scale is not None
        square = blocks.ndim == 4 and blocks.shape[2] == blocks.shape[3] and blocks.shape[0] <= 32
        if not square or (blocks.shape[0] > 1 and blocks.shape[2] % 2):
            raise parts.shape_error("boft_r", "(stages, blocks, size, size), size even where there are stages")
        return cls(blocks, scale, parts.vector("bias"))

    def fits(self, shape: Sequence[int]) -> bool:
        stages, count, size, _ = self.blocks.shape
        whole = len(shape) > 1 and count * size == prod(shape[1:]) and self.scale.numel() == shape[0]
        return whole and count % 2 ** (stages - 1) == 0

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        blocks = self.blocks.cpu().double()  # as `skew`
        turns = cayley(0.5 * (blocks.transpose(2, 3) - blocks)).float().to(weight.device)
        size = blocks.shape[2]
        turned = weight.float().flatten(1).T.contiguous()  # (inputs, out)
        for stage, turn in enumerate(turns):
            order = self._order(stage, turned.shape[0], weight.device)
            gathered = torch.empty_like(turned)
            gathered[order] = turned
            gathered = (turn @ gathered.view(-1, size, gathered.shape[1])).view(turned.shape)
            turned = gathered[order]
        delta = turned.T.reshape(weight.shape) - weight.float()
        return rescaled(delta, weight, self.scale)

    def _order(self, stage: int, width: int, device: torch.device) -> Tensor:
        """The row of each row of P: within a super-block, half-blocks of even place before those of odd place."""
        if len(self.blocks) == 1:
            return torch.arange(width, device=device)
        half = self.blocks.shape[2] // 2
        places = torch.arange(width, device=device).view(-1, 2**stage, 2, half)
        return places.transpose(1, 2).reshape(-1)
