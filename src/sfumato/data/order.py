"""Which samples a batch holds: a pure function of (seed, step, size of the global batch)."""

from collections.abc import Sequence

from sfumato import randomness


class Order:
    """The batches of one seed and one global batch size, each from a single bucket.

    samples: the picture of each sample of an epoch, a picture with repeats several times. buckets: the bucket of each
    picture. Epoch e runs through the samples by `permutation(n, seed, "order", e)`; each joins the queue of its bucket,
    and a queue that is full is the next batch. What is queued when an epoch ends stays queued, so that over time all
    samples come equally often, no batch is short and none is dropped. With one bucket that is the epochs one after
    another, cut into batches.
    """

    def __init__(self, samples: Sequence[int], buckets: Sequence[object], seed: int, batch: int):
        self._samples, self._buckets = samples, buckets
        self._seed, self._batch = seed, batch
        self._epoch = 0
        self._queues: dict[object, list[int]] = {}
        self._done: list[list[int]] = []

    def __getitem__(self, step: int) -> list[int]:
        """The pictures of a step's global batch. Steps may be asked for in any order."""
        while len(self._done) <= step:
            self._next_epoch()
        return self._done[step]

    def _next_epoch(self) -> None:
        for place in randomness.permutation(len(self._samples), self._seed, "order", self._epoch):
            picture = self._samples[place]
            queue = self._queues.setdefault(self._buckets[picture], [])
            queue.append(picture)
            if len(queue) == self._batch:
                self._done.append(queue.copy())
                queue.clear()
        self._epoch += 1
