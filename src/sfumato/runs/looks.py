"""What looks at a run on the way, such as samples and measurements, and what becomes of a look that fails."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sfumato.errors import RunError, SfumatoError, is_out_of_memory, unusable_package
from sfumato.precision.memory import give_back_freed_memory
from sfumato.runs import plot
from sfumato.runs.request import Request

if TYPE_CHECKING:
    from sfumato.runs.claim import Claim
    from sfumato.runs.log import Log

_LOOKED = "looked"
"""The fact that names the last step whose looks are done."""
_PLOT_EVERY_S = 60.0
"""Between two plots of a run that goes on."""


class Looks:
    """claim: which notes the last step that was looked at. log: what the looks measured. say: tells the person lines.
    Only the main process plots."""

    def __init__(self, claim: Claim, log: Log, say: Callable[..., None], *, is_main: bool):
        self._claim, self._log, self._say, self._is_main = claim, log, say, is_main
        self._looks: list[tuple[int, Callable[[int], None], Request]] = []
        self._plotted_s = time.monotonic()

    def add(self, every: int, look: Callable[[int], None], on: Request) -> None:
        """Have `look(step)` called every so many steps, and at the last, if that is not 0; and where `on` is asked."""
        self._looks.append((every, look, on))

    def at(self, step: int, count: int, asked: Request = Request.NOTHING) -> bool:
        """Look, after `step` of `count`. Returns whether there was anything to look at."""
        due = [
            look for every, look, on in self._looks if (every and (step % every == 0 or step == count)) or on in asked
        ]
        return self._look(step, due)

    def at_end(self, step: int) -> None:
        """Look at the step that a run ends with before its last, as far as `at` has not."""
        self._look(step, [look for every, look, _ in self._looks if every and step % every])

    def _look(self, step: int, due: Sequence[Callable[[int], None]]) -> bool:
        for look in due:
            try:
                look(step)
            except (OSError, SfumatoError, RuntimeError, MemoryError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                reason = _reason(error, step)
                self._say(f"step {step}: no sample, measurement or kept adapter: {reason}. The training goes on.")
        if due:
            self._log.flush()  # what is noted as looked at is not measured again
            self.note(step)
            if time.monotonic() - self._plotted_s > _PLOT_EVERY_S:
                self.plot()
        return bool(due)

    def are_behind(self, step: int) -> bool:
        """Whether the looks at the checkpoint's step are still to come: always at 0, of which there may be none yet,
        and where the run was stopped or killed between the two."""
        looked = self._claim.facts.get(_LOOKED, "")
        return step == 0 or (looked.isdecimal() and int(looked) < step)

    def note(self, step: int) -> None:
        """The looks up to this step are done. Where a full disk does not take that, a run that goes on looks twice."""
        self._claim.note(_LOOKED, str(step))

    def plot(self) -> None:
        """Draw the log as it is so far, for whoever looks at a run that is under way or was stopped."""
        if self._is_main:
            self._log.flush()
            try:
                plot.plot_log(self._log.path, self._claim.folder / "plot.png")
            except Exception as error:  # a full disk, nothing to draw yet, a matplotlib that is broken
                if not (isinstance(error, (OSError, RunError)) or unusable_package(error)):
                    raise
        self._plotted_s = time.monotonic()


def _reason(error: Exception, step: int) -> str:
    """Why a look failed, where the training goes on without it. Raises RunError where it does not."""
    if is_out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # which hold what filled the memory
        give_back_freed_memory()
        return (
            "the memory does not hold them beside the training; --sample-every 0 and --measure-every 0 leave them out"
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if step == 0:  # nothing is lost yet, and it would go on like this
        raise RunError(f"the first samples or measurements failed: {reason}") from None
    return reason
