"""Ctrl-C, SIGTERM, a closed terminal and Windows' Ctrl-Break end a training after its step; a second one ends it at
once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Self

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
_HEARD = b"\nstopping after this step and saving; once more to stop now\n"


class Stop:
    """Within the block a first signal is only remembered, in `signal`; the second is KeyboardInterrupt or the end.

    alone: whether no launcher stands above, which passes on what the system has sent to every process already: then a
    second signal is no person's, and the launcher itself ends who takes too long.
    """

    def __init__(self, *, quiet: bool = False, alone: bool = True) -> None:
        self.signal: int | None = None
        self._quiet, self._alone = quiet, alone
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Elsewhere signals cannot be handled, and whoever runs a training in a thread stops it by other means.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and not self._alone:
            return
        if self.signal is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.signal = number
        # A print could meet the print that the signal has interrupted. Without a stream for errors 2 may be another
        # file, and the reader of one, such as tee, may have been stopped by the same Ctrl-C.
        if not self._quiet and sys.stderr is not None:
            with suppress(OSError):
                os.write(2, _HEARD)
