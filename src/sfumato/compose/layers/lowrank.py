"""W + sum of w_i (alpha_i / r_i) up_i down_i, as one product. Pure functions on plain tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.files.kinds import LoraModule
from sfumato.files.read import is_finite
from sfumato.precision.cpu_matmul import onednn, processor

Terms = Sequence[tuple[float, LoraModule]]
"""(weight, change) of each adapter; no change has a `mid` (`LoraModule.plain`)."""

_BLOCK = 1 << 18
"""fp32 numbers of a block of rows, 1 MiB: it stays in a core's cache between the sum and the rounding."""
_SPLIT_RANK = 32
"""Above it one product of fp32 costs less, unless the CPU multiplies whole tiles of bf16 (AMX)."""
_SLIGHT = 0.15
"""Share of the weight's norm up to which a change's factors are rounded to bf16: each rounding is as large, relative to
what it rounds, as the sum's own, so that all three make sqrt(1 + 2 x 0.15^2) = 1.022 of that one."""
_ROWS = 16
"""Of so many rows one is looked at to tell the weight's norm."""
_SPLIT_SIDE = 128
"""Smaller matrices take no bf16 product: their library call costs more than the product."""
_SAFE = {torch.float32: 1e30, torch.bfloat16: 1e35, torch.float16: 15.0}
"""Less than half of the last place at the dtype's largest number: adding it cannot overflow a finite weight."""


@cache
def _bf16_product_ranks() -> int:
    """Up to which rank three products of bf16, with sums in fp32, cost less than one of fp32 and a rounding."""
    flags = processor().split()
    if "amx_bf16" in flags:
        return sys.maxsize
    return _SPLIT_RANK if "avx512_bf16" in flags else 0


class FactorPair(NamedTuple):
    """Two factors in one piece of memory. whole: all their numbers; up: (rows, rank); down: (rank, columns)."""

    whole: Tensor
    up: Tensor
    down: Tensor


@dataclass
class Scratch:
    """Memory that is used again for every weight: fresh pages would cost as much as the product itself.

    Views of it are kept too. Between two large weights nothing is in a core's cache, and each call saved counts.
    """

    _blocks: dict[tuple[str, torch.dtype, torch.device], Tensor] = field(default_factory=dict)
    _views: dict[object, Tensor] = field(default_factory=dict)
    _pairs: dict[object, FactorPair] = field(default_factory=dict)
    _scales: dict[object, Tensor] = field(default_factory=dict)
    bf16_ranks: int = field(default_factory=lambda: _bf16_product_ranks() if torch.backends.mkldnn.enabled else 0)

    def take(
        self, purpose: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A contiguous (rows, columns) view with arbitrary content, valid until the next call for the purpose."""
        key = (purpose, rows, columns, dtype, device)
        view = self._views.get(key)
        if view is None:
            size = rows * columns
            block = self._blocks.get((purpose, dtype, device))
            if block is None or block.numel() < size:
                self._views.clear()  # which would keep the smaller block alive
                self._pairs.clear()
                block = self._blocks[purpose, dtype, device] = torch.empty(size, dtype=dtype, device=device)
            view = self._views[key] = block[:size].view(rows, columns)
        return view

    def pair(
        self,
        purpose: str,
        rows: int,
        rank: int,
        columns: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> FactorPair:
        """Room for two factors, as `take`."""
        key = (purpose, rows, rank, columns, dtype, device)
        pair = self._pairs.get(key)
        if pair is None:
            whole = self.take(purpose, 1, (rows + columns) * rank, device, dtype)[0]
            up, down = whole[: rows * rank].view(rows, rank), whole[rows * rank :].view(rank, columns)
            pair = self._pairs[key] = FactorPair(whole, up, down)
        return pair

    def scales(self, terms: Terms, device: torch.device) -> Tensor:
        """(rank,) fp32: weight * alpha / r of the term that each row of the stack belongs to."""
        key = (device, *((weight * change.scale, change.rank) for weight, change in terms))
        found = self._scales.get(key)
        if found is None:
            values = [weight * change.scale for weight, change in terms for _ in range(change.rank)]
            found = self._scales[key] = torch.tensor(values, dtype=torch.float32, device=device)
        return found


def stack(terms: Terms, rows: int, columns: int, device: torch.device, scratch: Scratch) -> FactorPair:
    """The factors in fp32, all ranks side by side, the weights within up; in `scratch`."""
    rank = sum(change.rank for _, change in terms)
    ups = [_computable(change.up).reshape(rows, -1) for _, change in terms]
    downs = [_computable(change.down).reshape(-1, columns) for _, change in terms]
    stacked = scratch.pair("factors", rows, rank, columns, device)
    # Halves are put side by side first: one conversion instead of one for each adapter.
    torch.mul(_joined(ups, 1, device), scratch.scales(terms, device), out=stacked.up)
    stacked.down.copy_(_joined(downs, 0, device))
    return stacked


def _computable(factor: Tensor) -> Tensor:
    """The factor, of 8 bits as fp32: torch neither multiplies these nor puts them beside others."""
    return factor.float() if factor.dtype.itemsize == 1 else factor


def _joined(parts: list[Tensor], dim: int, device: torch.device) -> Tensor:
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return joined if joined.device == device else joined.to(device)


def write_sum(
    weight: Tensor,
    original: Tensor | Callable[[], Tensor],
    terms: Terms,
    dense: Tensor | None,
    scratch: Scratch,
    *,
    pristine: bool = False,
) -> bool:
    """Write original + sum of the terms + dense into `weight`, summed in fp32 and rounded once; whether it is finite.

    weight, original: of one shape, on one device, of any float dtype. dense: fp32 of this shape, what has no low-rank
    form. pristine: whether `weight` already holds the original's bytes. original: a tensor; or a function that gives
    it, of a pristine weight and in its dtype: it is called last, as comparing the weight with its file brings it into
    the cache.

    There are three ways; the first whose conditions all hold is taken. With `dense`, without terms, and where
    `_takes_bf16` says no or the CPU multiplies no bf16, only the last is left:

        product of the factors            rank                 change of the weight
        one, of factors in bf16           <= _SPLIT_RANK       slight (`_is_slight`)
        three, of factors split in two    <= the CPU's limit   any
        one in fp32, by blocks of rows    any                  any
    """
    rows = weight.shape[0]
    columns = weight.numel() // rows
    if not terms:
        _write_blocks(weight, original() if callable(original) else original, None, None, dense, scratch)
        return is_finite(weight.detach())
    stacked = stack(terms, rows, columns, weight.device, scratch)
    is_safe = dense is None and _bound(stacked) < _SAFE.get(weight.dtype, 0.0)
    in_bf16 = None
    if dense is None:
        in_bf16 = _bf16_factors(stacked, weight, weight if callable(original) else original, scratch)
    original = original() if callable(original) else original
    if in_bf16 is not None:
        if not pristine:
            weight.copy_(original)
        weight.view(rows, columns).addmm_(*in_bf16)
    else:
        _write_blocks(weight, original, stacked.up, stacked.down, dense, scratch)
    return is_safe or is_finite(weight.detach())


def _bf16_factors(
    stacked: FactorPair, weight: Tensor, original: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor] | None:
    """The factors in bf16, rounded or split, for one product that is added in place; None where fp32 costs less or is
    needed. Split ones use `stacked` as their own memory."""
    if original.dtype != weight.dtype or not scratch.bf16_ranks or not _takes_bf16(weight):
        return None
    rank = stacked.up.shape[1]
    if rank <= _SPLIT_RANK and _is_slight(stacked, original, scratch):
        return _rounded(stacked, scratch)
    return _split(stacked, scratch) if rank <= scratch.bf16_ranks else None


def _bound(stacked: FactorPair) -> float:
    """No element of up @ down is larger than this: |up_i down_j| <= (|up_i|^2 + |down_j|^2) / 2."""
    return float(torch.dot(stacked.whole, stacked.whole)) / 2  # NaN compares as false


def _write_blocks(
    weight: Tensor,
    original: Tensor,
    up: Tensor | None,
    down: Tensor | None,
    dense: Tensor | None,
    scratch: Scratch,
) -> None:
    rows = weight.shape[0]
    columns = weight.numel() // rows
    on_cpu = weight.device.type == "cpu"
    product = onednn() if on_cpu and torch.backends.mkldnn.enabled else None
    step = max(1, min(rows, _BLOCK // columns)) if on_cpu else rows
    for start in range(0, rows, step):
        block = slice(start, start + step)
        before, after = original[block], weight[block]
        if up is not None and down is not None and product is not None:
            total = product(up[block], down.t(), None, "none", [], "").view(after.shape).add_(before)
        else:
            total = scratch.take("total", len(after), columns, weight.device).view(after.shape).copy_(before)
            if up is not None and down is not None:
                total.view(-1, columns).addmm_(up[block], down)  # in place, which autocast leaves alone
        after.copy_(total if dense is None else total.add_(dense[block]))


def _takes_bf16(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.shape[0] >= _SPLIT_SIDE
        and weight.numel() // weight.shape[0] >= _SPLIT_SIDE
    )


def _is_slight(stacked: FactorPair, original: Tensor, scratch: Scratch) -> bool:
    """Whether |up down| is so small a share of |original| that its factors' rounding is lost in the sum's.

    Frobenius norms: of the product exactly, from the factors' r x r products; of the original from every 16th row.
    """
    gram = torch.mm(stacked.up.t(), stacked.up)
    change = torch.dot(gram.view(-1), torch.mm(stacked.down, stacked.down.t()).view(-1))
    rows = original[::_ROWS]
    some = scratch.take("some rows", 1, rows.numel(), original.device)[0]
    some.view(rows.shape).copy_(rows)
    return bool(change < _SLIGHT**2 * _ROWS * torch.dot(some, some))  # NaN compares as false


def _rounded(stacked: FactorPair, scratch: Scratch) -> tuple[Tensor, Tensor]:
    (rows, rank), columns = stacked.up.shape, stacked.down.shape[1]
    high = scratch.pair("high", rows, rank, columns, stacked.whole.device, torch.bfloat16)
    high.whole.copy_(stacked.whole)
    return high.up, high.down


def _split(stacked: FactorPair, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """bf16 factors whose product is up @ down to 16 bits: with x = high + low, high high + high low + low high.

    The low parts are what rounding to bf16 leaves; low low is beyond the last bit that is kept. Products of bf16 are
    exact in fp32, in which they are summed, so the one rounding of the weight is the error that counts. Uses `stacked`
    as its own memory.
    """
    (rows, rank), columns, device = stacked.up.shape, stacked.down.shape[1], stacked.whole.device
    high = scratch.pair("high", rows, rank, columns, device, torch.bfloat16)
    low = scratch.pair("low", rows, rank, columns, device, torch.bfloat16)
    high.whole.copy_(stacked.whole)
    low.whole.copy_(stacked.whole.sub_(high.whole))
    left = scratch.take("left", rows, 3 * rank, device, torch.bfloat16)
    right = scratch.take("right", 3 * rank, columns, device, torch.bfloat16)
    torch.cat((high.up, high.up, low.up), 1, out=left)
    torch.cat((high.down, low.down, high.down), 0, out=right)
    return left, right
