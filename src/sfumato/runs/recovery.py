"""When a run's state is saved, and how it is brought back: after an interruption, and after broken numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import RunError
from sfumato.files.space import require_space
from sfumato.runs.checkpointed import CheckpointedParts
from sfumato.runs.checkpoints import Checkpoints, NotFiniteError, bytes_of
from sfumato.runs.health import Health

if TYPE_CHECKING:
    from sfumato.runs.alone import Alone
    from sfumato.runs.log import Log
    from sfumato.runs.options import FolderOptions
    from sfumato.runs.processes import Processes

_SAVED, _UNSAVED, _BROKEN = 0, 1, 2
"""What became of a checkpoint: it is there, could not be written, or would not be finite."""


class Recovery:
    """Only the main process saves.

    log: written down before a state is saved. say: tells the person lines. kept: what a checkpoint holds of the
    training. health: whether the run can go on from where it is. rate_factor: what the learning rate is multiplied
    with; a half after the run has gone back once. saved_at: the step of the last checkpoint.
    """

    def __init__(
        self, folder: Path, config: FolderOptions, processes: Processes | Alone, log: Log, say: Callable[..., None]
    ):
        self.folder = folder
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep)
        self.kept = CheckpointedParts()
        self.health = Health()
        self.rate_factor = 1.0
        self.saved_at: int | None = None
        self._every = config.checkpoint_every or 0
        self._processes, self._log, self._say = processes, log, say

    def find(self) -> int | None:
        """The step of the newest checkpoint that is whole; None where the run was stopped before its first one.

        Raises RunError where there are some and none is whole.
        """
        step, passed = self.checkpoints.newest()
        self._say(*passed)
        if step is not None:
            self._say(f"resuming from step {step}")
        elif passed:
            raise RunError(
                f"no checkpoint in {self.folder} is whole: {passed[0]} Bring one back from a copy, or begin anew with "
                "--overwrite."
            )
        else:
            self._say("resuming: there is no checkpoint yet, so from the beginning")
        return step

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"kept": self.kept.state(), "rate_factor": self.rate_factor, "bad": self.health.bad}

    def check_space(self) -> None:
        """Before the start: room for all checkpoints that will be there."""
        most, bytes_each = self.most_there()
        missing = max(1, most - len(self.checkpoints.steps()))
        require_space(self.folder, missing * bytes_each)

    def most_there(self) -> tuple[int, int]:
        """How many checkpoints are there at once, that which is being written among them, and the bytes of each."""
        most = self.checkpoints.keep + 1 if self._every else 1
        return most, bytes_of(self.state()) + self.kept.bytes_to_come()

    def save(self, step: int, *, due: bool) -> None:
        """Save the state of `step`, if it is one whose state is saved and is not saved yet.

        due: whatever the step, as at the end. A disk that does not take it is said, and stops a run that has not begun.
        """
        wanted = due or (self._every > 0 and step % self._every == 0)
        if not wanted or step == self.saved_at:
            return
        if self._processes.is_main:
            self._write(step, due=due)
        # All processes know what became of it, so that each asks for the same checkpoints.
        unsaved = self._processes.is_main and self.saved_at != step
        worst = self._processes.largest(_BROKEN if self.health.broken else _UNSAVED if unsaved else _SAVED)
        if worst == _SAVED:
            self.saved_at = step
        elif worst == _BROKEN and not self.health.broken:
            self.health.broken = f"the state of step {step} is not finite"

    def _write(self, step: int, *, due: bool) -> None:
        self._log.flush()
        try:
            self.checkpoints.save(step, self.state())
            self.saved_at = step
        except NotFiniteError as error:  # which only the main process, that saves, has found
            self.health.broken = str(error)
        except RunError as error:
            earlier, _ = self.checkpoints.newest()
            if step == 0:
                raise RunError(f"{error}. The training stops before it could lose anything.") from None
            whole = "" if earlier is None else f" That of step {earlier} is whole."
            self._say(f"{error}.{whole}{'' if due else ' The training goes on.'}")

    def load(self, step: int) -> None:
        """Bring the state of `step` back into what is kept."""
        match self.checkpoints.load(step):
            case {"kept": dict(kept), "rate_factor": int() | float() as rate_factor, "bad": list(bad)}:
                self.kept.load(kept, step)
            case _:  # whole, and by another hand
                raise RunError(
                    f"the checkpoint of step {step} is no training's; remove it, then resume from an earlier one."
                )
        self.saved_at = step
        self.rate_factor, self.health.bad = rate_factor, list(bad)

    def to_go_back_to(self, reason: str) -> int:
        """The step that a run whose numbers are broken goes back to. Raises RunError where it has gone back already."""
        newest, passed = self.checkpoints.newest()
        self._say(*passed)
        if newest is None or self.rate_factor < 1:
            again = ", also with half the learning rate" if self.rate_factor < 1 else ""
            raise RunError(
                f"{reason}{again}, so the training is broken. Lower --learning-rate, use another --precision, or look "
                f"at the images; {self._log.path} has the steps before."
            )
        return newest
