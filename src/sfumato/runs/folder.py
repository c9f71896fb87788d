"""Whose a run's folder is: nobody's, a run's, or somebody else's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import RunError

if TYPE_CHECKING:
    from sfumato.options import FolderOptions

WRITTEN = ("config.toml", "README.md", "plot.png", "samples.png", "samples", "checkpoints")
"""What a run writes into its folder under a name of its own; NAME.safetensors comes beside them."""


def going_on(config: FolderOptions, also: Sequence[str] = ()) -> bool:
    """Whether the output folder holds a run that is to be resumed.

    Raises RunError for a folder that holds a run which is neither to be resumed nor replaced, for one without a run
    where one is to be resumed, and for one that holds other things under the names that a run writes. also: more names
    that this one writes.
    """
    folder = config.output
    holds_run = (folder / "run.json").exists() or (folder / "log.jsonl").exists()
    if holds_run and _has_begun(folder) and not (config.overwrite or config.resume):
        raise RunError(
            f"{folder} holds a run already; --resume goes on with it, --overwrite replaces it, or give another "
            "--output."
        )
    if config.resume and not holds_run:
        raise RunError(f"there is no run to resume in {folder}; without --resume one begins there.")
    mine = [*WRITTEN, f"{getattr(config, 'name', None) or folder.resolve().name}.safetensors", *also]
    taken = [] if holds_run else [name for name in mine if (folder / name).exists()]
    if taken:
        raise RunError(
            f"{folder} holds {', '.join(taken)} and no run; a run would write over that. Give an --output of its own."
        )
    return holds_run and config.resume


def _has_begun(folder: Path) -> bool:
    """Whether there is anything to lose; what an error stopped before its first step may simply be started again."""
    log = folder / "log.jsonl"
    return (log.exists() and log.stat().st_size > 0) or any((folder / "checkpoints").glob("[0-9]*"))
