"""W + sum of w_i (alpha_i / r_i) up_i down_i, as one product. Pure functions on plain tensors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.files.lora_file import LoraModule


def fits(change: LoraModule, shape: Sequence[int]) -> bool:
    """Whether `change` is one to a weight of this shape; a 1x1 convolution counts as a linear layer."""
    rank, *inner = _trim(change.down.shape)
    return list(_trim(change.up.shape)) == [shape[0], rank] and inner == list(_trim(shape)[1:])


def _trim(shape: Sequence[int]) -> Sequence[int]:
    return shape[:2] if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else shape


@dataclass
class Scratch:
    """fp32 memory that is used again for every weight: fresh pages would cost as much as the product itself."""

    _blocks: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    def take(self, purpose: str, rows: int, columns: int, device: torch.device) -> Tensor:
        """A contiguous (rows, columns) fp32 view with arbitrary content, valid until the next call for the purpose."""
        size = rows * columns
        block = self._blocks.get((purpose, device))
        if block is None or block.numel() < size:
            block = self._blocks[purpose, device] = torch.empty(size, dtype=torch.float32, device=device)
        return block[:size].view(rows, columns)


def weighted_sum(original: Tensor, terms: Sequence[tuple[float, LoraModule]], scratch: Scratch | None = None) -> Tensor:
    """original + sum of weight * change over `terms`, in fp32 and in original's shape; round it once, at the end.

    original: (out, in) or (out, in, k, k), of any float dtype. The ranks of all terms are stacked, so that the sum is a
    single product. The result lives in `scratch` until its next use.
    """
    scratch = scratch or Scratch()
    device, rows, columns = original.device, original.shape[0], original[0].numel()
    rank = sum(change.rank for _, change in terms)
    up = scratch.take("up", rows, rank, device)
    down = scratch.take("down", rank, columns, device)
    start = 0
    for weight, change in terms:
        end = start + change.rank
        up[:, start:end].copy_(change.up.reshape(rows, -1)).mul_(weight * change.scale)
        down[start:end].copy_(change.down.reshape(-1, columns))
        start = end
    total = scratch.take("total", rows, columns, device)
    total.view(original.shape).copy_(original)
    with exact_products():
        total.addmm_(up, down)  # in place, which autocast leaves alone
    return total.view(original.shape)


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products in fp32, not in TF32 or bf16, whatever the caller has switched on."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
