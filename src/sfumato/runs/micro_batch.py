"""How the samples of a step are parted: over the processes, and over the passes whose gradients are summed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """What one pass of a step computes: `count` samples of its global batch, from place `first` on."""

    step: int
    global_batch: int
    first: int
    count: int

    @property
    def places(self) -> range:
        """Its samples' places in the global batch."""
        return range(self.first, self.first + self.count)


@dataclass(frozen=True)
class MicroBatches:
    """Those of one process. global_batch: samples of a step, of all processes together. firsts: where each begins."""

    global_batch: int
    firsts: tuple[int, ...]
    count: int

    def of(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, in order."""
        return [MicroBatch(step, self.global_batch, first, self.count) for first in self.firsts]
