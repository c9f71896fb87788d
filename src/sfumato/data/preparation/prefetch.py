"""What is read of pictures on the other cores, while what was read before is worked on. Imports no torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition
from typing import TypeVar

from sfumato.utils import processes

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_PIXELS = 100_000_000
"""Of the pictures that are decoded at one time: each pixel takes up to 20 bytes meanwhile."""
_THREADS = 8


def prefetch(
    items: Iterable[Item], read: Callable[[Item], Result], *, window: int, pixels: Callable[[Item], int]
) -> Iterator[Result]:
    """What `read` makes of each, in order, while it reads the next ones, at most `window`.

    Pillow lets go of the interpreter while it decodes. Memory does not grow with what is given. pixels: of each; those
    that are read at one time have at most MOST_PIXELS together, or are one.
    """
    room = _PixelBudget(MOST_PIXELS)

    def read_one(item: Item) -> Result:
        size = pixels(item)
        with room.taken(size):
            try:
                return read(item)
            finally:
                if size > MOST_PIXELS / _THREADS:  # else each thread would keep what its largest picture took
                    processes.trim_heap()

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        waiting: deque[Future[Result]] = deque()
        for each in items:
            waiting.append(pool.submit(read_one, each))
            if len(waiting) == window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _PixelBudget:
    """So much that threads take parts of, and wait for; who asks for more than all gets all."""

    def __init__(self, size: int):
        self._size, self._free, self._changed = size, size, Condition()

    @contextmanager
    def taken(self, wanted: int) -> Iterator[None]:
        part = min(wanted, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= part)
            self._free -= part
        try:
            yield
        finally:
            with self._changed:
                self._free += part
                self._changed.notify_all()
