"""What is read of pictures on the other cores, while what was read before is worked on. Imports no torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(items: Iterable[Item], read: Callable[[Item], Result], *, window: int) -> Iterator[Result]:
    """What `read` makes of each, in order, while it reads the next ones, at most `window`.

    Pillow lets go of the interpreter while it decodes. Memory does not grow with what is given.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        waiting: deque[Future[Result]] = deque()
        for each in items:
            waiting.append(pool.submit(read, each))
            if len(waiting) == window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
