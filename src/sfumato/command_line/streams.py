"""Output that nobody reads any more stops no work: `sfumato train ... 2>&1 | head` learns to the end."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Unbroken(io.FileIO):
    """Writes to a file descriptor, and to nowhere once its reader has gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # what others write there, too
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


def keep_unbroken() -> None:
    """Make the process's standard output and errors such streams, where they are files of the system; a letter that a
    console lacks is shown as its number."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or isinstance(_raw(stream), _Unbroken):
            continue
        try:
            stream.flush()
            raw = _Unbroken(stream.fileno(), "wb", closefd=False)
        except OSError:  # it is no file
            continue
        buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
        unbroken = io.TextIOWrapper(
            buffer,
            stream.encoding,
            "backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, unbroken)


def _raw(stream: io.TextIOWrapper) -> Any:
    return getattr(stream.buffer, "raw", stream.buffer)
