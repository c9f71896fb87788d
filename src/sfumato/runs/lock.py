"""One run in a folder at a time; the second is told who is there."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sfumato.errors import RunError
from sfumato.utils.atomic import write_text
from sfumato.utils.text_files import read_json_object

_PATIENCE_S = 1.0
"""How long a holder may take between locking the folder and signing for it."""


class Lock:
    """Holds a run's folder until it is released or the process ends, however it ends.

    The system keeps the lock, so that a killed process leaves none behind; who holds it stands in `.holder.json`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock = FileLock(folder / ".lock")
        self._holder = folder / ".holder.json"

    def take(self) -> str | None:
        """Hold the folder. Returns a line about a holder that ended without letting go, if there was one.

        Raises RunError that names the holder.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"{self._folder} is in use by {_who(self._wait_for_holder())}. Wait for it, or give another --output."
            ) from None
        earlier = read_json_object(self._holder)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_text(self._holder, json.dumps(me))
        return f"{_who(earlier)} used this folder and ended without finishing; its lock is void." if earlier else None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the folder."""
        return bool(self._lock.is_locked)

    def release(self, *, trace: bool = True) -> None:
        """Let the folder go; without effect if it is not held. trace: leave the file that the system locks."""
        if self.is_held:
            _removed(self._holder)
            # While it is held, so that nobody gets a lock on a file that is gone; Windows removes none that is open.
            gone = trace or _removed(self._folder / ".lock")
            self._lock.release()
            if not gone:
                _removed(self._folder / ".lock")

    def _wait_for_holder(self) -> dict[str, Any]:
        """Who holds the folder; it may be about to sign, or the file may still name one that was killed."""
        until = time.monotonic() + _PATIENCE_S
        while not (found := read_json_object(self._holder)) and time.monotonic() < until:
            time.sleep(0.02)
        return found


def is_in_use(folder: Path) -> bool:
    """Whether a process holds the run folder."""
    if not read_json_object(folder / ".holder.json"):
        return False
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # somebody else's folder
        return False
    lock.release()
    return False


def _removed(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    pid, host, since = (str(holder.get(name, "?"))[:80] for name in ("pid", "host", "since"))
    return f"process {pid} on {host} (since {since})"
