"""When a run's state is saved, and how it is brought back: after an interruption, and after broken numbers.

Whether a training's numbers are numbers, found within the step in which they stop being some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.errors import RunError
from sfumato.runs.checkpoints import CheckpointedParts, Checkpoints, NotFiniteError, bytes_of
from sfumato.utils.atomic import require_disk_space

if TYPE_CHECKING:
    from sfumato.runs.options import FolderOptions
    from sfumato.runs.processes import Processes, SingleProcess
    from sfumato.runs.reporting.log import Log


BAD_IN_A_ROW = 3
"""Steps with broken numbers one after another that can no longer be an accident."""


class DivergenceGuard:
    """Counts broken steps. broken: why the run cannot go on from here, empty while it can.

    bad: a line on each broken step since the last healthy one; a part of the run's state.
    """

    def __init__(self) -> None:
        self.bad: list[str] = []
        self.broken = ""

    def check(self, number: int, named: Mapping[str, float | Tensor]) -> str:
        """What is wrong with these numbers of step `number`, counted from 0; empty if all are finite."""
        names = not_finite(named)
        if not names:
            self.bad = []
            return ""
        self.bad.append(f"step {number + 1}: {names} not finite")
        if len(self.bad) >= BAD_IN_A_ROW:
            self.broken = f"{self.bad[-1]}, in {len(self.bad)} steps in a row"
        return self.bad[-1]

    def check_weights(self, number: int, parts: Iterable[Any]) -> None:
        """After the optimizer: weights that are no numbers any more cannot be skipped, only gone back from.

        parts: what the run keeps; the optimizers among them know the trained weights. One wait for the device.
        """
        weights = [
            p.detach()
            for part in parts
            if isinstance(part, torch.optim.Optimizer)
            for group in part.param_groups
            for p in group["params"]
        ]
        if weights and not _are_finite(weights):
            self.broken = f"step {number + 1}: the trained weights are not finite"

    def reset(self) -> str:
        """Begin to count anew; returns why the run was broken."""
        reason, self.broken, self.bad = self.broken, "", []
        return reason


def _are_finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers are; one wait for the device where they are."""
    # The greatest would say it alone, and takes a CPU five times as long: 1.5 s a step with the whole U-Net of SD 1.5.
    if math.isfinite(float(torch.stack(torch._foreach_norm(tensors)).sum())):
        return True
    return math.isfinite(float(torch.stack(torch._foreach_norm(tensors, math.inf)).amax()))  # squares can overflow


def not_finite(named: Mapping[str, float | Tensor]) -> str:
    """The names of the numbers that are not finite; one wait for the device for all of them."""
    tensors = {name: value.detach().float() for name, value in named.items() if isinstance(value, Tensor)}
    values = torch.stack(list(tensors.values())).tolist() if tensors else []
    plain = {**named, **dict(zip(tensors, values, strict=True))}
    return ", ".join(name for name, value in plain.items() if not math.isfinite(value))


_SAVED, _UNSAVED, _BROKEN = 0, 1, 2
"""What became of a checkpoint: it is there, could not be written, or would not be finite."""


class Recovery:
    """Only the main process saves.

    log: written down before a state is saved. say: tells the person lines. kept: what a checkpoint holds of the
    training. health: whether the run can go on from where it is. rate_factor: what the learning rate is multiplied
    with; a half after the run has gone back once. saved_at: the step of the last checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        config: FolderOptions,
        processes: Processes | SingleProcess,
        log: Log,
        say: Callable[..., None],
    ):
        self.folder = folder
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep)
        self.kept = CheckpointedParts()
        self.health = DivergenceGuard()
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
        most, bytes_each = self.max_checkpoints()
        missing = max(1, most - len(self.checkpoints.steps()))
        require_disk_space(self.folder, missing * bytes_each)

    def max_checkpoints(self) -> tuple[int, int]:
        """How many checkpoints are there at once, that which is being written among them, and the bytes of each."""
        most = self.checkpoints.keep + 1 if self._every else 1
        return most, bytes_of(self.state()) + self.kept.future_bytes()

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

    def rollback_step(self, reason: str) -> int:
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
