"""OFT (Qiu et al. 2023): rotations of blocks of a weight's outputs (kohya, LyCORIS) or inputs (peft)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.files.changes.change import WithoutLowRank, check_fits
from sfumato.files.changes.module_tensors import ModuleTensors
from sfumato.files.kinds import side_of

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
        size = side_of(packed.shape[1]) if packed.ndim == 2 else 0
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
        return side_of(self.packed.shape[1])

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
