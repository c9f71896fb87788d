"""The log of a run: one JSON line a step, one a measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.errors import RunError
from sfumato.files.atomic import write_text
from sfumato.json_text import value_of

if TYPE_CHECKING:
    from sfumato.runs.wandb_run import WandbRun

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
                row = value_of(line)
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
