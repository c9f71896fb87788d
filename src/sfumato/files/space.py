"""Room on the disk, asked for before anything is written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

SPARE_BYTES = 64 * 2**20
"""Room that is left beside what is written: for the log, the samples and everybody else."""


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError where the disk of the folder has less than `needed` bytes and a reserve."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"no space: {(needed + SPARE_BYTES) / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free on "
            f"the disk of {folder}",
        )
