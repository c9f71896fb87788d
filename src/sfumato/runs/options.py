"""Options of every run: its folder, its checkpoints and how it is resumed. The text under a field is its `--help`."""

# No annotations as texts: a program that inherits the options reads them in its own module.
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sfumato.config import Settled


@dataclass(frozen=True, kw_only=True)
class FolderOptions(Settled):
    """The run's folder, checkpoints and resuming."""

    output: Path
    """Folder of the run: what is learned, its model card, checkpoints, samples, log and plot."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, besides those at the start and the end. 0 saves only the last one, and one at an
    interruption. Unset: a quarter of the run, at most 1000."""
    keep: int = 2
    """Number of checkpoints to keep; fewer than two count as two."""
    resume: bool = False
    """Resume the run in the output folder from its newest complete checkpoint."""
    finish: bool = False
    """With --resume: make no more steps, and write what is learned so far, as at the end of a run."""
    force: bool = False
    """Resume even if config, images, base model or version have changed."""
    overwrite: bool = False
    """Replace the run in the output folder. The old run stays until the new one takes its first step."""
    dry_run: bool = False
    """Make only the first four steps, keep nothing of them, and tell what the whole run takes: time, memory and disk.
    OUTPUT.dry-run.png shows what these steps learned from: images as cropped, mirrored, masked and encoded, each with
    its caption as drawn. Images that the base model generates beforehand, as of a class, stay for the run."""
    tensorboard: bool = False
    """Also write the log for TensorBoard (pip install "sfumato[tensorboard]")."""
    wandb: str | None = None
    """Also send config, log and sample images to this project of Weights & Biases, PROJECT or TEAM/PROJECT (pip install
    "sfumato[wandb]", then `wandb login` once). WANDB_MODE=offline keeps them in the run's folder for `wandb sync`."""
    wandb_name: str | None = None
    """Name of the run at Weights & Biases. Unset: the name of the output folder."""


AnyRun = TypeVar("AnyRun", bound=FolderOptions)


def settled(config: AnyRun) -> AnyRun:
    """The config without the options that are meant for one call alone (overwrite, resume, finish, force, dry_run), as
    it is saved for later runs."""
    return dataclasses.replace(config, overwrite=False, resume=False, finish=False, force=False, dry_run=False)
