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
    """Those of one process. global_batch: samples of a step, of all processes together. firsts: where each of the
    process's batches of `count` begins. at_once: the most of a batch that one pass computes; unset, all."""

    global_batch: int
    firsts: tuple[int, ...]
    count: int
    at_once: int | None = None

    def of(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, in order."""
        size = self.at_once or self.count
        return [
            MicroBatch(step, self.global_batch, first + done, min(size, self.count - done))
            for first in self.firsts
            for done in range(0, self.count, size)
        ]
