"""Output that nobody reads any more stops no work: `sfumato train ... 2>&1 | head` learns to the end. Nor does a log
that finds no room: `sfumato train ... 2> log`."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

STOPS_UNREAD = "SFUMATO_STOPS_UNREAD"
"""Set for a command whose reader is the program that began it: it is to end with that one."""
_NOBODY_READS = (errno.EPIPE, errno.EIO, *((errno.EINVAL,) if os.name == "nt" else ()))
"""A pipe whose reader has gone, on Windows, too, and a terminal that is closed."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A file on a full disk, or at a limit."""


class _Unbroken(io.FileIO):
    """Writes to a file descriptor, and to nowhere once its reader has gone.

    is_news: it says how the work goes and holds no result. What a full disk does not take of it is lost, and what comes
    later is written again.
    """

    is_news = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.is_news and error.errno in _NO_ROOM:
                return len(memoryview(data).cast("B"))
            if error.errno not in _NOBODY_READS:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # what others write there, too
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


def keep_unbroken() -> None:
    """Make the process's standard output and errors such streams, where they are its own; a letter that the other end
    lacks is shown as its number."""
    if STOPS_UNREAD in os.environ:
        return
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue
        if os.name == "nt" and stream.isatty():  # its console takes letters, and not the bytes of a file
            continue
        try:
            stream.flush()
            raw = _Unbroken(stream.fileno(), "wb", closefd=False)
            raw.is_news = name == "stderr"
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
