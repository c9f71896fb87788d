"""What is asked of a training that is under way, by `sfumato ask`: files in its folder, which it looks for."""

from __future__ import annotations

import time
from contextlib import suppress
from enum import Flag, auto
from pathlib import Path

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
