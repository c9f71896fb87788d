"""OFT for training: W' = R W, R block-diagonal of rotations of outputs (Qiu et al. 2023), as LyCORIS's diag-oft has it.

R' = (I + Q)(I - Q)^-1 of each block, Q = B - B', turns its outputs and changes neither their lengths nor the angles
between them.
"""

from __future__ import annotations

from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.adapters.layers import BaseLayer, UpdateLayer
from sfumato.adapters.targets import RankGroup
from sfumato.errors import AdapterError
from sfumato.files.kinds import Change
from sfumato.files.kinds.oft import OutputOft
from sfumato.utils.formatting import pluralize


def block_size(outputs: int, rank: int) -> int:
    """The largest divisor of the outputs up to the rank and to their root.

    lycoris-lora takes the smaller of a file's (blocks, size) for the size: it refuses blocks larger than their number.
    """
    return max(size for size in range(1, min(isqrt(outputs), rank) + 1) if outputs % size == 0)


class OftLayer(UpdateLayer):
    """blocks: (outputs / size, size, size), not skew themselves, of the size `block_size`. It has no scale."""

    kind = "OFT"
    scale = 1.0

    def __init__(self, host: BaseLayer, rank: int) -> None:
        super().__init__()
        outputs = len(host.weight)
        self.rank = block_size(outputs, rank)
        self.blocks = nn.Parameter(torch.zeros(outputs // self.rank, self.rank, self.rank))

    def factors(self) -> tuple[Tensor, ...]:
        return (self.blocks,)

    def delta(self, weight: Tensor, *factors: Tensor) -> Tensor:
        (blocks,) = factors
        q = blocks - blocks.transpose(1, 2)
        # R' - I = 2 Q (I - Q)^-1, of which nothing is lost where Q is small; transposed it is -2 (I + Q)^-1 Q.
        turn = torch.linalg.solve(torch.eye(self.rank, device=q.device) + q, -2 * q)
        delta: Tensor = turn @ weight.float().reshape(*blocks.shape[:2], -1)
        return delta.view(weight.shape)

    def change(self) -> Change:
        return OutputOft(self.blocks.detach(), alpha=None, kohya=False)

    def load(self, change: Change, where: str) -> None:
        if not isinstance(change, OutputOft) or change.kohya or change.alpha or change.rescale is not None:
            raise AdapterError(
                f"{where} rotates inputs, is constrained, or rescales outputs, none of which is trained. Take another "
                "adapter."
            )
        if len(change.blocks) * change.blocks.shape[1] != prod(self.blocks.shape[:2]):
            raise AdapterError(
                f"{where} has blocks {tuple(change.blocks.shape)}, this run {tuple(self.blocks.shape)}. Give its own "
                "rank, and its own base."
            )
        self._resize(change.blocks)
        with torch.no_grad():
            self.blocks.copy_(change.blocks)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self._resize(state_dict.get(f"{prefix}blocks"))
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]

    def _resize(self, blocks: Tensor | None) -> None:
        """Take the block size of what 0.27 began, whose blocks could be larger than the outputs' root."""
        if blocks is None or prod(blocks.shape[:2]) != prod(self.blocks.shape[:2]):
            return
        self.rank = blocks.shape[1]
        self.blocks.data = self.blocks.data.new_zeros(blocks.shape)


def block_notes(some: RankGroup) -> list[str]:
    """Lines on what has no effect, and on the layers whose outputs the rank does not divide.

    Raises AdapterError for a layer whose blocks are of one output, which nothing turns.
    """
    sizes = [block_size(len(host.weight), some.rank) for host in some.hosts]
    if single := next((len(host.weight) for host, size in zip(some.hosts, sizes, strict=True) if size == 1), 0):
        raise AdapterError(
            f"{some.given}: {single} outputs make blocks of one, which nothing turns; wanted a rank that divides them, "
            "of which 4 to 32 is usual."
        )
    notes = [f"{some.given}: blocks of so many outputs are rotated, which has no scale, whatever the alpha"]
    if not (other := sorted({size for size in sizes if size != some.rank})):
        return notes
    count = sum(size != some.rank for size in sizes)
    return [
        *notes,
        f"{some.given}: in {count} of {pluralize(len(sizes), some.what)} the blocks have "
        f"{', '.join(map(str, other))} outputs, which divide the layer's, not more than the root",
    ]
