"""The JSON files of a diffusers folder. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sfumato.errors import BaseModelError


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """A JSON file of the folder. Raises BaseModelError if it is missing or no JSON object."""
    where = f"{folder.name}/{part}"
    try:
        config = json.loads((folder / part).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(f"{where}: missing. The folder is incomplete; download it again.") from None
    except (OSError, ValueError, RecursionError):
        raise BaseModelError(f"{where}: not readable as JSON. Download it again.") from None
    if not isinstance(config, dict):
        raise BaseModelError(f"{where}: no JSON object. Download it again.")
    return config
