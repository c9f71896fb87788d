"""The run folder and the loop that every trainer writes as `for step in run.steps(n)`.

    RUN/config.toml     the resolved config; `sfumato train NAME RUN/config.toml` runs it again
    RUN/log.jsonl       one line a step, one a measurement
    RUN/plot.png        the curves of the log
    RUN/samples.png     the growing sheet of sample pictures
    RUN/NAME.safetensors, RUN/README.md      what was learned, and its card

Losses stay on the device until the log is flushed, so that no step waits for the one before.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from sfumato import config as configs
from sfumato.errors import RunError
from sfumato.files.atomic import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_FLUSH_EVERY = 10


@dataclass
class Step:
    """One optimizer step. number counts from 0."""

    number: int
    run: "Run"

    def done(self, **values: float | Tensor) -> None:
        """Log the step; `loss` and `rate` are also shown."""
        self.run._record({"step": self.number + 1, **values})


class Run:
    """One training's folder, log and progress. Only the main process writes."""

    def __init__(self, folder: Path, *, is_main: bool = True, tensorboard: bool = False):
        self.folder = folder
        self.is_main = is_main
        self._pending: list[dict[str, Any]] = []
        self._log: TextIO | None = None
        self._bar: Any = None
        self._smooth = math.nan
        self._board = _tensorboard(folder) if tensorboard and is_main else None

    @classmethod
    def start(
        cls,
        folder: Path,
        config: "DataclassInstance",
        *,
        is_main: bool = True,
        overwrite: bool = False,
        tensorboard: bool = False,
    ) -> "Run":
        """Make the folder and write the config into it; a folder that holds a run is refused unless `overwrite`."""
        run = cls(folder, is_main=is_main, tensorboard=tensorboard)
        if not is_main:
            return run
        if folder.exists() and not folder.is_dir():
            raise RunError(f"{folder} is a file; --output wants a folder of its own for the run.")
        if (folder / "log.jsonl").exists() and not overwrite:
            raise RunError(f"{folder} holds a run already; give another --output, or --overwrite to replace it.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.toml", configs.to_toml(config))
            run._log = (folder / "log.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{folder} cannot be written ({error.strerror}); give another --output.") from None
        return run

    def say(self, text: str) -> None:
        """A line for the person, above the progress bar, once for all processes."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def steps(self, count: int) -> Iterator[Step]:
        """The optimizer steps 0 to count - 1, with progress, loss and time left on stderr."""
        # A terminal gets a moving bar; a log file gets a line every ten seconds.
        pause_s = 0.2 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=count,
            file=sys.stderr,
            disable=not self.is_main,
            mininterval=pause_s,
            maxinterval=pause_s,
            dynamic_ncols=True,
            desc="training",
            unit="step",
        )
        try:
            for number in range(count):
                yield Step(number, self)
                self._bar.update()
            self.flush()
        finally:
            self._bar.close()

    def log(self, **values: float | Tensor) -> None:
        """A line of measurements in the log."""
        self._record(values)
        self.flush()

    def _record(self, values: dict[str, Any]) -> None:
        self._pending.append({name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()})
        if len(self._pending) >= _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Bring the pending values to the host, check them and write them down. Raises RunError on NaN or Inf."""
        rows, self._pending = self._pending, []
        tensors = [v.float() for row in rows for v in row.values() if isinstance(v, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])
        for row in rows:
            plain = {name: next(numbers) if isinstance(v, Tensor) else v for name, v in row.items()}
            self._write(plain)
            bad = [name for name, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
            if bad:
                raise RunError(
                    f"step {plain.get('step')}: {', '.join(bad)} is not finite, so the training is broken; lower the "
                    f"learning rate or use another --precision. {self.folder / 'log.jsonl'} has the steps before."
                )

    def _write(self, row: dict[str, Any]) -> None:
        if "loss" in row:
            loss = float(row["loss"])
            self._smooth = loss if math.isnan(self._smooth) else 0.9 * self._smooth + 0.1 * loss
            if self._bar is not None:
                self._bar.set_postfix_str(f"loss {self._smooth:.4f}", refresh=False)
        if self._log is not None:
            self._log.write(json.dumps({k: v if k == "step" else float(f"{v:.6g}") for k, v in row.items()}) + "\n")
            self._log.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def rows(self) -> list[dict[str, float]]:
        """The log so far."""
        with (self.folder / "log.jsonl").open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Finish the log."""
        self.flush()
        if self._log is not None:
            self._log.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RunError("--tensorboard: the package is not installed; pip install 'sfumato[tensorboard]'.") from None
    return SummaryWriter(str(folder / "tensorboard"))


def now() -> float:
    """Seconds since the epoch, or SOURCE_DATE_EPOCH where a build must be reproducible."""
    import os

    return float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
