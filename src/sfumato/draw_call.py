"""What is known, anywhere below it, of the call of `sfumato.draw` that is under way in this thread or task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

PICTURES: ContextVar[tuple[Sequence[int], int] | None] = ContextVar("PICTURES", default=None)
"""The places in the call of the pictures that are encoded or drawn at once, and how many the call has; what each
picture has for itself asks for it."""
STEPS: ContextVar[int | None] = ContextVar("STEPS", default=None)
"""How many steps of each picture `sfumato.draw` is drawing, by which words that change are counted."""


@contextmanager
def at_once(places: Sequence[int], count: int) -> Iterator[None]:
    """Within the block the pictures of these places, of so many in the call, are encoded or drawn."""
    before = PICTURES.set((places, count))
    try:
        yield
    finally:
        PICTURES.reset(before)


@contextmanager
def step_count(steps: int) -> Iterator[None]:
    """Within the block so many steps of each picture are drawn."""
    before = STEPS.set(steps)
    try:
        yield
    finally:
        STEPS.reset(before)
