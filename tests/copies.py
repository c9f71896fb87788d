"""Copies that take less time than those of `copy.deepcopy`, so that what many tests begin with is made once."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def copies(original: T, *, shared: tuple[type, ...] = ()) -> Callable[[], T]:
    """What gives an independent copy of the original, as it is now, at each call. shared: of what all copies have one.

    All but tensors and what is shared is pickled once: to read it back takes less of Python than `copy.deepcopy` does.
    """
    apart: dict[int, Any] = {}  # by id, as `copy.deepcopy` knows them, too

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not isinstance(obj, (Tensor, *shared)):
                return None
            apart[id(obj)] = obj
            return id(obj)

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: int) -> Any:
            if pid not in made:
                found = kept[pid]
                made[pid] = copy.deepcopy(found) if isinstance(found, Tensor) else found
            return made[pid]

    file, made = io.BytesIO(), {}
    Pickler(file, pickle.HIGHEST_PROTOCOL).dump(original)
    pickled = file.getvalue()
    kept = {key: copy.deepcopy(found) if isinstance(found, Tensor) else found for key, found in apart.items()}

    def one() -> T:
        made.clear()
        return Unpickler(io.BytesIO(pickled)).load()

    return one


def made_once(make: Callable[..., T]) -> Callable[..., T]:
    """The function, whose results for arguments that look the same are copies of the first."""
    known: dict[str, Callable[[], T]] = {}

    def of(*args: Any) -> T:
        if (key := repr(args)) not in known:
            known[key] = copies(make(*args))
        return known[key]()

    return of
