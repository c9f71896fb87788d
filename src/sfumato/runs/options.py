"""Options of every run: its folder, and how it goes on after a stop. The text under a field is its `--help`."""

# No annotations as texts: a program that inherits the options reads them in its own module.
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sfumato.config import settle


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Where a run is kept, and how it goes on after a stop."""

    output: Path
    """Folder of the run: what is learned, its card, checkpoints, samples, log and plot."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, besides those at both ends; 0 saves only the last, and that of an interruption. Unset:
    a quarter of the run."""
    keep: int = 2
    """How many checkpoints to keep; fewer than two count as two."""
    resume: bool = False
    """Go on with the run in the output folder, from its newest whole checkpoint."""
    force: bool = False
    """Resume although config, pictures, base or version have changed."""
    overwrite: bool = False
    """Replace the run in the output folder; it stays there until the new one takes its first step."""
    tensorboard: bool = False
    """Also write the log for TensorBoard (pip install "sfumato[tensorboard]")."""

    def __post_init__(self) -> None:
        settle(self)


AnyRun = TypeVar("AnyRun", bound=FolderOptions)


def settled(config: AnyRun) -> AnyRun:
    """The config without the permissions of one call, as it is written down for whoever runs it again."""
    return dataclasses.replace(config, overwrite=False, resume=False, force=False)
