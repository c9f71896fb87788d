"""OFT (Qiu et al. 2023): rotations of blocks of a weight's outputs (kohya, LyCORIS) or inputs (peft).

BOFT (Liu et al. 2024): butterfly products of block rotations, of the outputs (LyCORIS) or the inputs (peft).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.files.keys import triangle_side
from sfumato.files.kinds.base import ModuleTensors, WithoutLowRank, check_fits

TERM_LIMIT = 64


def skew(blocks: Tensor, constraint: float | None, *, always: bool) -> Tensor:
    """Q = blocks - blocks', shortened to the norm `constraint`, in fp64 and so on the CPU: Apple's GPUs have none.

    always: kohya's rule, which clamps by any constraint, 0 too; LyCORIS's takes 0 for none.
    """
    q = blocks.cpu().double()
    q = q - q.transpose(-1, -2)
    if constraint is None or (constraint <= 0 and not always):
        return q
    norm: Tensor = torch.linalg.vector_norm(q)
    if always:
        return q * ((norm.clamp(max=constraint) + 1e-8) / (norm + 1e-8))
    return q * (constraint / (norm + 1e-8)) if norm + 1e-8 > constraint else q


def cayley(q: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 of skew matrices (..., n, n): rotations."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    rotation: Tensor = torch.linalg.solve(identity - q, identity + q, left=False)
    return rotation


@dataclass(frozen=True)
class OutputOft(WithoutLowRank):
    """Blocks of outputs rotated: (R' - I) W blockwise, R the Cayley transform; then `rescale` on each output.

    blocks: (count, size, size), not skew yet. alpha: the constraint over the number of outputs; kohya: by whose rule
    (`skew`). rescale: (out,) of LyCORIS, or None.
    """

    blocks: Tensor
    alpha: float | None
    kohya: bool
    rescale: Tensor | None = None
    bias_delta: Tensor | None = None

    kind: ClassVar[str] = "OFT"
    needs_weight: ClassVar[bool] = True

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> OutputOft:
        blocks, rescale = parts["oft_blocks"], parts.vector("rescale")
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
            raise parts.shape_error("oft_blocks", "(blocks, size, size)")
        kohya = parts.names["oft_blocks"].startswith("oft_")
        alpha = parts.number("alpha")
        if kohya and alpha is None:
            raise parts.error("there is no alpha, by which kohya's OFT is constrained")
        if alpha is not None and parts.names["oft_blocks"].startswith("diffusion_model."):  # ComfyUI's Train LoRA node,
            alpha /= prod(blocks.shape[:2])  # whose constraint is alpha itself
        return cls(blocks, alpha, kohya, rescale, parts.vector("bias"))

    def fits(self, shape: Sequence[int]) -> bool:
        whole = len(shape) > 1 and prod(self.blocks.shape[:2]) == shape[0]
        return whole and (self.rescale is None or self.rescale.numel() == shape[0])

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        constraint = None if self.alpha is None else self.alpha * weight.shape[0]
        turn = cayley(skew(self.blocks, constraint, always=self.kohya))
        turn = (turn - torch.eye(turn.shape[-1], dtype=turn.dtype)).float().to(weight.device)
        flat = weight.float().reshape(*self.blocks.shape[:2], -1)
        delta = (turn.transpose(1, 2) @ flat).view(weight.shape)
        return delta if self.rescale is None else rescaled(delta, weight, self.rescale)


def rescaled(delta: Tensor, weight: Tensor, rescale: Tensor) -> Tensor:
    """The delta of rescale * (weight + delta), rescale: (out,)."""
    factor = rescale.to(delta).view(-1, *(1 for _ in delta.shape[1:]))
    return factor * delta + (factor - 1) * weight.float()


@dataclass(frozen=True)
class InputOft(WithoutLowRank):
    """peft's OFT: W (R' - I) on blocks of the flattened inputs, a convolution's kernel among them.

    packed: (blocks, size * (size - 1) / 2), the upper triangles of skew matrices, one block for all where shared.
    terms: of the Neumann series for R, None for the exact (I - Q)(I + Q)^-1. limit: a block's largest norm (COFT).
    onetrainer: OneTrainer's copy of it, of five terms always, which turns a convolution the other way, W (R - I);
    its scaled variant divides the triangles by 2 sqrt(size - 1).
    """

    packed: Tensor
    shared: bool
    terms: int | None
    limit: float | None
    onetrainer: bool = False
    bias_delta: Tensor | None = None

    kind: ClassVar[str] = "OFT"
    needs_weight: ClassVar[bool] = True

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> InputOft:
        packed = parts["oft_r"]
        size = triangle_side(packed.shape[1]) if packed.ndim == 2 else 0
        if packed.ndim != 2 or size * (size - 1) // 2 != packed.shape[1]:
            raise parts.shape_error("oft_r", "(blocks, size * (size - 1) / 2)")
        if parts.by_onetrainer or parts.names["oft_r"].startswith("lora_"):  # no one else writes it in kohya's names
            if parts.number("oft_scaled"):
                packed = packed.float() / (2 * (size - 1) ** 0.5)
            return cls(packed, packed.shape[0] == 1, 5, None, onetrainer=True, bias_delta=parts.vector("bias"))
        series = parts.settings.get(parts.target, "use_cayley_neumann")
        if not isinstance(series, bool):
            raise parts.error(
                "oft_R without peft's use_cayley_neumann, so which rotation is meant is not said; wanted peft's folder "
                "with its adapter_config.json"
            )
        terms = parts.settings.get(parts.target, "num_cayley_neumann_terms") if series else None
        if series and (not isinstance(terms, int) or isinstance(terms, bool) or not 1 <= terms <= TERM_LIMIT):
            raise parts.error(f"num_cayley_neumann_terms is {terms!r:.40}; wanted 1 to {TERM_LIMIT}")
        limit = None
        if parts.settings.get(parts.target, "coft"):
            limit = parts.settings.get(parts.target, "eps")
            if not isinstance(limit, float) or not 0 < limit < 1e9:
                raise parts.error(f"eps of the constrained OFT is {limit!r:.40}; wanted a number above 0")
        shared = bool(parts.settings.get(parts.target, "block_share"))
        return cls(packed, shared, terms, limit, bias_delta=parts.vector("bias"))

    @property
    def size(self) -> int:
        return triangle_side(self.packed.shape[1])

    def fits(self, shape: Sequence[int]) -> bool:
        columns = prod(shape[1:])
        count = columns // self.size if self.shared else self.packed.shape[0]
        return len(shape) > 1 and count * self.size == columns

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        turn = self._rotation()
        turn = (turn - torch.eye(self.size, dtype=turn.dtype)).float().to(weight.device)
        if self.onetrainer and weight.ndim == 4:
            turn = turn.transpose(1, 2)
        flat = weight.float().reshape(weight.shape[0], -1, self.size)
        return torch.einsum("obi,bji->obj", flat, turn.expand(flat.shape[1], -1, -1)).reshape(weight.shape)

    def _rotation(self) -> Tensor:
        """In fp64 on the CPU, as `skew`."""
        packed = self.packed.cpu().double()
        q = packed.new_zeros(packed.shape[0], self.size, self.size)
        rows, columns = torch.triu_indices(self.size, self.size, 1)
        q[:, rows, columns] = packed
        q = q - q.transpose(1, 2)
        if self.limit is not None:
            norm = torch.linalg.vector_norm(q, dim=(1, 2), keepdim=True)
            limit = self.limit / packed.shape[0] ** 0.5
            q = torch.where(norm <= limit, q, q * (limit / norm.clamp(min=1e-300)))
        if self.terms is None:
            return cayley(-q)
        total = torch.eye(self.size, dtype=q.dtype).expand_as(q).clone()
        power = q
        for coefficient in _neumann_coefficients(self.terms)[1:]:
            total += coefficient * power
            power = power @ q
        return total


def _neumann_coefficients(terms: int) -> list[int]:
    """Of I, Q, Q^2 and so on in peft's series for (I + Q)(I - Q)^-1, which is I + 2 Q + 2 Q^2 + ...

    From three terms on peft ends with one further power, taken once:
    """
    # terms   coefficients
    # 1       1
    # 2       1  2
    # 3, 4    1  2  2  1
    # 5       1  2  2  2  1
    # 6       1  2  2  2  2  1
    return [1, 2][:terms] if terms <= 2 else [1, *[2] * max(terms - 2, 2), 1]


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
