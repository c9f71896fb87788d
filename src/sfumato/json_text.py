"""JSON that another program may have written, or half written: what is none is nothing, not an error. Imports no
torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def value_of(text: str | bytes) -> Any:
    """The value; None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def object_of(text: str | bytes) -> dict[str, Any]:
    """The JSON object that the text is; an empty one where it is none."""
    found = value_of(text)
    return found if isinstance(found, dict) else {}


def object_in(path: Path) -> dict[str, Any]:
    """The JSON object that the file holds; an empty one where it is missing, cannot be read or holds none."""
    try:
        return object_of(path.read_bytes())
    except OSError:
        return {}
