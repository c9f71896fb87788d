"""The log of a run: one JSON line a step, one a measurement.

What looks at a run on the way, such as samples and measurements, and what becomes of a look that fails.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.errors import RunError, SfumatoError, is_out_of_memory, package_error
from sfumato.precision.memory import release_freed_memory
from sfumato.runs.options import Request
from sfumato.runs.reporting import plot
from sfumato.utils.atomic import write_text
from sfumato.utils.text_files import parse_json

if TYPE_CHECKING:
    from sfumato.runs.claim import RunClaim
    from sfumato.runs.reporting.trackers import WandbRun


_FLUSH_EVERY = 10
_OF_THE_LOOP = {"loss", "skipped", "went_back_from"}
"""What no measurement has."""


class Log:
    """Appends rows to a file, and to TensorBoard's and W&B's if asked.

    Values stay on their device until the log is flushed, so that writing them down makes no step wait. A row holds
    finite numbers only: what is not finite is left out of it. A disk that takes no more loses no row and ends no
    training: `warn` is told once, and the rows wait for the next flush.
    """

    def __init__(
        self,
        path: Path,
        *,
        tensorboard: bool = False,
        wandb: WandbRun | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ):
        self.path, self.wandb = path, wandb
        self._pending: list[dict[str, Any]] = []
        self._warn, self._warned = warn, False
        self._open_board = _board(path.parent) if tensorboard else None
        self._board: Any = None

    def add(self, row: Mapping[str, float | Tensor]) -> None:
        """A row; `step` among its values says when it was."""
        self._pending.append({name: v.detach() if isinstance(v, Tensor) else v for name, v in row.items()})
        if len(self._pending) >= _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows down."""
        self._settle()
        if not self._pending:
            return
        text = "".join(json.dumps(row) + "\n" for row in self._pending)
        try:
            _append(self.path, text.encode())
        except OSError as error:
            if not self._warned:
                self._warn(f"{self.path.name} cannot be written ({error.strerror}); it goes on as soon as it can.")
            self._warned = True
            return
        rows, self._pending, self._warned = self._pending, [], False
        if self._open_board is not None:
            self._board = self._board or self._open_board()
            for row in rows:
                for name in row.keys() - {"step"}:
                    self._board.add_scalar(name, row[name], row["step"])
        if self.wandb is not None:
            self.wandb.add(rows)

    def _settle(self) -> None:
        """The pending rows as plain finite numbers; one wait for the device for all of them."""
        tensors = [v.float() for row in self._pending for v in row.values() if isinstance(v, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])
        settled = []
        for row in self._pending:
            plain = {name: next(numbers) if isinstance(v, Tensor) else v for name, v in row.items()}
            settled.append(
                {k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in plain.items() if math.isfinite(v)}
            )
        self._pending = settled

    def rows(self) -> list[dict[str, float]]:
        """The rows so far; a last line that a killed process left half written is none."""
        self.flush()
        found = []
        if self.path.exists():
            for line in self.path.read_bytes().splitlines():
                row = parse_json(line)
                if not isinstance(row, dict) or not isinstance(row.get("step", 0), int):
                    break
                found.append(row)
        return [*found, *self._pending]

    def cut(self, step: int, *, seen: int | None = None, again: bool = True) -> None:
        """Forget the rows after `step`, and measurements after `seen`, which will be written again.

        again: whether they will be the same.
        """
        kept: list[dict[str, float]] = []
        gone: list[dict[str, float]] = []
        for row in self.rows():
            last = step if seen is None or row.keys() & _OF_THE_LOOP else min(step, seen)
            (kept if row.get("step", 0) <= last else gone).append(row)
        self._pending = []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        if self.wandb is not None:
            self.wandb.forget(gone, again=again)

    def close(self) -> None:
        """Write down what is pending."""
        self.flush()
        if self._board is not None:
            self._board.flush()


def _append(path: Path, content: bytes) -> None:
    """Add to the file's end, all or nothing: half a line would hide all that follow it."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        left = memoryview(content)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


def _board(folder: Path) -> Callable[[], Any]:
    """What opens TensorBoard's file, with the first row: until then the folder may be another run's."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError('--tensorboard: the package is not installed; pip install "sfumato[tensorboard]".') from None
    return partial(SummaryWriter, str(folder / "tensorboard"))


_LAST_CALLBACK_STEP = "looked"
"""The fact that names the last step whose looks are done."""
_PLOT_EVERY_S = 60.0
"""Between two plots of a run that goes on."""


class RunCallbacks:
    """claim: which notes the last step that was looked at. log: what the looks measured. say: tells the person lines.
    Only the main process plots."""

    def __init__(self, claim: RunClaim, log: Log, say: Callable[..., None], *, is_main: bool):
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

    def is_pending(self, step: int) -> bool:
        """Whether the looks at the checkpoint's step are still to come: always at 0, of which there may be none yet,
        and where the run was stopped or killed between the two."""
        looked = self._claim.facts.get(_LAST_CALLBACK_STEP, "")
        return step == 0 or (looked.isdecimal() and int(looked) < step)

    def note(self, step: int) -> None:
        """The looks up to this step are done. Where a full disk does not take that, a run that goes on looks twice."""
        self._claim.note(_LAST_CALLBACK_STEP, str(step))

    def plot(self) -> None:
        """Draw the log as it is so far, for whoever looks at a run that is under way or was stopped."""
        if self._is_main:
            self._log.flush()
            try:
                plot.plot_log(self._log.path, self._claim.folder / "plot.png")
            except Exception as error:  # a full disk, nothing to draw yet, a matplotlib that is broken
                if not (isinstance(error, (OSError, RunError)) or package_error(error)):
                    raise
        self._plotted_s = time.monotonic()


def _reason(error: Exception, step: int) -> str:
    """Why a look failed, where the training goes on without it. Raises RunError where it does not."""
    if is_out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # which hold what filled the memory
        release_freed_memory()
        return (
            "the memory does not hold them beside the training; --sample-every 0 and --measure-every 0 leave them out"
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if step == 0:  # nothing is lost yet, and it would go on like this
        raise RunError(f"the first samples or measurements failed: {reason}") from None
    return reason
