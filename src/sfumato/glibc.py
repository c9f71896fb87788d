"""Functions of the GNU C library, which knows what memory is free."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def function(name: str) -> Any:
    """The function of this name, None on systems without it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def trim() -> None:
    """Return to the system the memory that is free; glibc keeps some, for each thread by itself."""
    malloc_trim = function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)
