"""What is read of pictures on the other cores, while what was read before is worked on. Imports no torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Found = TypeVar("Found")


def ahead(given: Iterable[Given], read: Callable[[Given], Found], *, most: int) -> Iterator[Found]:
    """What `read` makes of each, in order, while it reads the next ones, at most so many.

    Pillow lets go of the interpreter while it decodes. Memory does not grow with what is given.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        waiting: deque[Future[Found]] = deque()
        for each in given:
            waiting.append(pool.submit(read, each))
            if len(waiting) == most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
