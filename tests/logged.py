"""The rows of a run's log."""

import json
from pathlib import Path
from typing import Any


def log_in(folder: Path) -> list[dict[str, Any]]:
    """Of the run in this folder."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def log_beside(learned: Path) -> list[dict[str, Any]]:
    """Of the run that left this in its folder."""
    return log_in(learned.parent)
