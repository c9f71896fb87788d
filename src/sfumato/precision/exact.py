"""Products of fp32 numbers that are as exact as fp32, whatever is switched on for all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


class _Exact:
    """The process's settings of fp32 products: the first thread that wants them exact changes them, and the last puts
    them back."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._within = 0
        self._before: list[str] = []

    def begin(self, places: Sequence[Any]) -> None:
        with self._lock:
            if not self._within:
                self._before = [place.fp32_precision for place in places]
                for place in places:
                    place.fp32_precision = "ieee"
            self._within += 1

    def end(self, places: Sequence[Any]) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                for place, precision in zip(places, self._before, strict=True):
                    place.fp32_precision = precision


_EXACT = _Exact()


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products in fp32, not TF32 or bf16, whatever the caller has switched on, by torch's old settings or new."""
    backends: Any = torch.backends  # whose stubs lack these
    places = backends.mkldnn.matmul, backends.cuda.matmul
    _EXACT.begin(places)
    try:
        yield
    finally:
        _EXACT.end(places)
