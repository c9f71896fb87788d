"""Options of every run: its folder, its checkpoints and how it is resumed. The text under a field is its `--help`.

What is asked of a training that is under way, by `sfumato ask`: files in its folder, which it looks for.
"""

from __future__ import annotations

# No annotations as texts: a program that inherits the options reads them in its own module.
import dataclasses
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Flag, auto
from pathlib import Path
from typing import TypeVar

from sfumato.config import TypedConfig


@dataclass(frozen=True, kw_only=True)
class FolderOptions(TypedConfig):
    """The run's folder, checkpoints and resuming."""

    output: Path
    """Folder for what is learned, its model card, samples, checkpoints, log and plot."""
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
    """Make four steps, keep nothing of them, and print what the whole run takes: time, memory and disk.
    OUTPUT.dry-run.png shows the images that these steps saw, with their captions. Images that the base model generates
    beforehand, such as of a class, stay for the run."""
    tensorboard: bool = False
    """Also write the log for TensorBoard (pip install "sfumato[tensorboard]")."""
    wandb: str | None = None
    """Also send config, log and sample images to this project of Weights & Biases, PROJECT or TEAM/PROJECT (pip install
    "sfumato[wandb]", then `wandb login` once). WANDB_MODE=offline keeps them in the run's folder for `wandb sync`."""
    wandb_name: str | None = None
    """Name of the run at Weights & Biases. Unset: the name of the output folder."""


AnyRun = TypeVar("AnyRun", bound=FolderOptions)


def persistent_config(config: AnyRun) -> AnyRun:
    """The config without the options that are meant for one call alone (overwrite, resume, finish, force, dry_run), as
    it is saved for later runs."""
    return dataclasses.replace(config, overwrite=False, resume=False, finish=False, force=False, dry_run=False)


_PAUSE_S = 0.5
"""Between two looks for files: a folder on a network takes longer than a small model's step."""


class Request(Flag):
    """samples: sample images and measurements now. save: a checkpoint, and what is learned so far as a file. stop: to
    stop as after Ctrl-C. finish: to make no more steps, and to write what is learned so far."""

    NOTHING = 0
    SAMPLES = auto()
    SAVE = auto()
    STOP = auto()
    FINISH = auto()

    def __str__(self) -> str:
        return ", ".join(each.word for each in self)

    @property
    def word(self) -> str:
        """Of one thing: what its option is called."""
        return str(self.name).lower()


def ask(folder: Path, what: Request) -> None:
    """Ask the training in this run folder. Raises OSError where the folder takes no file."""
    for each in what:
        _file(folder, each).touch()


class Requests:
    """What is asked of the run in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._looked_s = 0.0

    def take(self) -> Request:
        """What was asked since the last time, each once."""
        if time.monotonic() - self._looked_s < _PAUSE_S:
            return Request.NOTHING
        self._looked_s = time.monotonic()
        return self._taken()

    def forget(self) -> None:
        """Take nothing up of what was asked of a run that is over."""
        self._taken()

    def _taken(self) -> Request:
        found = Request.NOTHING
        for each in Request:
            with suppress(OSError):  # there is none, or the folder is out of reach for a while
                _file(self._folder, each).unlink()
                found |= each
        return found


def _file(folder: Path, one: Request) -> Path:
    return folder / f".ask-{one.word}"
