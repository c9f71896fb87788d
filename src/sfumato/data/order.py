"""Which samples a batch holds: a pure function of (seed, step, size of the global batch)."""

from collections.abc import Sequence

from sfumato import randomness


class Order:
    """The batches of one seed and one global batch size, of samples that lie together in one bucket.

    samples: the picture of each sample of an epoch, a picture with repeats several times. buckets: the bucket of each
    picture. together: how many samples of a batch are of one bucket, as a call of the U-Net wants them; it divides the
    batch. Epoch e runs through the samples by `permutation(n, seed, "order", e)`; each joins the queue of its bucket,
    and the queues that are full are the next batch, one after another: so the pictures of an accumulated step, or of
    several processes, are of several buckets. What is queued when an epoch ends stays queued, so that over time all
    samples come equally often, no batch is short and none is dropped. With one bucket that is the epochs one after
    another, cut into batches.

    Of pictures 0 to 4, of which 1 and 3 are tall, with seed 0 and batches of two:

        epoch 0 is 4 1 0 3 2    batches [4, 0] and [1, 3]; 2 stays queued
        epoch 1 is 0 3 1 2 4    batches [2, 0], [3, 1] and [2, 4]
    """

    def __init__(self, samples: Sequence[int], buckets: Sequence[object], seed: int, batch: int, together: int):
        self._samples, self._buckets = samples, buckets
        self._seed, self._batch, self._together = seed, batch, together
        self._epoch = 0
        self._queues: dict[object, list[int]] = {}
        self._full: list[int] = []

    def __getitem__(self, step: int) -> list[int]:
        """The pictures of a step's global batch. Steps may be asked for in any order."""
        while len(self._full) < (step + 1) * self._batch:
            self._next_epoch()
        return self._full[step * self._batch : (step + 1) * self._batch]

    def unseen(self, steps: int) -> int:
        """How many pictures come in none of the steps 0 to `steps`."""
        left = set(self._samples)
        for step in range(steps):
            left.difference_update(self[step])
            if not left:
                break
        return len(left)

    def _next_epoch(self) -> None:
        for place in randomness.permutation(len(self._samples), self._seed, "order", self._epoch):
            picture = self._samples[place]
            queue = self._queues.setdefault(self._buckets[picture], [])
            queue.append(picture)
            if len(queue) == self._together:
                self._full.extend(queue)
                queue.clear()
        self._epoch += 1
