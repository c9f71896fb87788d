"""Hooks of a module that no copy of it takes along: there they would go on acting on the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sfumato.errors import AdapterError


class Uncopied:
    """A function on a module, or in its place, for as long as a block lasts; copying or pickling the module raises
    AdapterError meanwhile."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    def __reduce__(self) -> Any:
        raise AdapterError(
            "a copy of a pipeline made within adapter_guidance, over_steps, per_picture, composite or regions would go "
            "on acting on the first; copy it before the block, or after."
        )
