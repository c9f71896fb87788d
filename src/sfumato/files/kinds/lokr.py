"""LoHa (Hyeon-Woo et al. 2022, FedPara; LyCORIS): the Hadamard product of two low-rank products.

LoKr (LyCORIS): a Kronecker product of a small and a large factor, either of them perhaps a low-rank product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.files.kinds.base import ModuleTensors, WithoutLowRank, check_fits, squeeze_kernel


@dataclass(frozen=True)
class Loha(WithoutLowRank):
    """scale * (w1_a w1_b) * (w2_a w2_b), or with Tucker cores t1, t2: each half einsum("ijhw,ip,jr->prhw", t, a, b).

    Without cores a: (out, rank), b: (rank, in * height * width); with them a: (rank, out), b: (rank, in),
    t: (rank, rank, height, width). scale: alpha / rank.
    """

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    scale: float
    cores: tuple[Tensor, Tensor] | None = None
    bias_delta: Tensor | None = None

    kind: ClassVar[str] = "LoHa"
    needs_weight: ClassVar[bool] = False

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> Loha:
        halves = [(parts.matrix(f"hada_w{n}_a"), parts.matrix(f"hada_w{n}_b")) for n in (1, 2)]
        rank = halves[0][1].shape[0]
        first, second = (parts.core(f"hada_t{n}", b.shape[0]) for n, (_, b) in zip((1, 2), halves, strict=True))
        if (first is None) != (second is None) or (
            first is not None and second is not None and first.shape[2:] != second.shape[2:]
        ):
            raise parts.error("hada_t1 and hada_t2 do not go together; wanted both, with one kernel, or neither")
        inner = 0 if first is not None else 1  # where the rank is in a
        sizes = {(a.shape[1 - inner], b.shape[1]) for a, b in halves}
        if any(a.shape[inner] != b.shape[0] for a, b in halves) or len(sizes) > 1:
            shapes = ", ".join(f"{list(a.shape)} and {list(b.shape)}" for a, b in halves)
            raise parts.error(f"the factors of LoHa do not fit ({shapes}); wanted (out, rank) and (rank, in) twice")
        cores = None if first is None or second is None else (first, second)
        return cls(halves[0], halves[1], parts.alpha(rank) / rank, cores, parts.vector("bias"))

    @property
    def shape(self) -> tuple[int, ...]:
        """The update's shape; a convolution without cores has its kernel within the columns."""
        a, b = self.first
        return (a.shape[0], b.shape[1]) if self.cores is None else (a.shape[1], b.shape[1], *self.cores[0].shape[2:])

    def fits(self, shape: Sequence[int]) -> bool:
        if self.cores is None:
            return len(shape) > 1 and self.shape == (shape[0], prod(shape[1:]))
        return self.shape == tuple(shape)

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        device, halves = weight.device, []
        for n, pair in enumerate((self.first, self.second)):
            a, b = (factor.to(device).float() for factor in pair)
            if self.cores is None:
                halves.append((a @ b).view(weight.shape))
            else:
                core = self.cores[n].to(device).float()
                halves.append(torch.einsum("prhw,po->rohw", core, a).permute(1, 2, 3, 0) @ b)  # (out, h, w, in)
        product = halves[0].mul_(halves[1]).mul_(self.scale)
        return product if self.cores is None else product.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Factor:
    """A factor of the product: whole (rows, columns[, height, width]), or left (rows, rank) right (rank, columns).

    With core (rank, rank, height, width), left is (rank, rows): einsum("ijhw,ip,jr->prhw", core, left, right).
    """

    whole: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    core: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.whole is not None:
            return tuple(self.whole.shape)
        assert self.left is not None
        assert self.right is not None
        if self.core is None:
            return self.left.shape[0], self.right.shape[1]
        return (self.left.shape[1], self.right.shape[1], *self.core.shape[2:])

    def value(self, device: torch.device) -> Tensor:
        """The factor in fp32, (rows, columns * height * width)."""
        if self.whole is not None:
            return self.whole.to(device).float().flatten(1)
        assert self.left is not None
        assert self.right is not None
        left, right = self.left.to(device).float(), self.right.to(device).float()
        if self.core is None:
            return left @ right
        return torch.einsum("ijhw,ip,jr->prhw", self.core.to(device).float(), left, right).flatten(1)


@dataclass(frozen=True)
class Lokr(WithoutLowRank):
    """scale * kron(first, second).

    scale: alpha / rank, the rank that of the factored half. With both factors whole LyCORIS and all who follow it
    take 1 and ignore alpha; peft takes alpha / r of its config then too.
    """

    first: Factor
    second: Factor
    scale: float
    bias_delta: Tensor | None = None

    kind: ClassVar[str] = "LoKr"
    needs_weight: ClassVar[bool] = False

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> Lokr:
        first, rank = _factor(parts, "lokr_w1")
        second, own = _factor(parts, "lokr_w2", parts.get("lokr_t2") is not None)
        rank = rank or own
        if len(first.shape) != 2:
            raise parts.shape_error("lokr_w1", "(rows, columns)")
        if parts.settings.folder:
            rank = parts.settings.rank(parts.target, rank or 1)
        scale = parts.alpha(rank) / rank if rank else 1.0
        return cls(first, second, scale, parts.vector("bias"))

    @property
    def shape(self) -> tuple[int, ...]:
        """The update's shape; where the second factor is a matrix, a convolution has its kernel within the columns."""
        first, second = self.first.shape, self.second.shape
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    def fits(self, shape: Sequence[int]) -> bool:
        first, second = self.first.shape, self.second.shape
        if len(shape) < 2 or shape[0] != first[0] * second[0] or prod(shape[1:]) != first[1] * prod(second[1:]):
            return False
        flat = len(second) == 2  # the kernel may be in its columns
        return flat or squeeze_kernel(shape)[1:] == (first[1] * second[1], *squeeze_kernel(second)[2:])

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        first, second = self.first.value(weight.device), self.second.value(weight.device)
        return torch.kron(first * self.scale, second).view(weight.shape)


def _factor(parts: ModuleTensors, name: str, tucker: bool = False) -> tuple[Factor, int | None]:
    """The factor and, where it is a product, its rank."""
    whole = parts.get(name)
    if whole is not None:
        if whole.ndim not in (2, 4) or parts.get(f"{name}_a") is not None or tucker:
            raise parts.shape_error(name, "(rows, columns[, height, width]), alone")
        return Factor(whole), None
    left, right = parts.matrix(f"{name}_a"), parts.matrix(f"{name}_b")
    rank = right.shape[0]
    if left.shape[0 if tucker else 1] != rank:
        raise parts.error(f"{name}_a {list(left.shape)} and {name}_b {list(right.shape)} do not fit")
    return Factor(left=left, right=right, core=parts.core("lokr_t2", rank) if tucker else None), rank
