"""Makes one call of a block fail: the n-th open, write, fsync, rename or mkdir, or a write that falls short unsaid."""

from __future__ import annotations

import errno
import io
import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CALLS = ("open", "write", "fsync", "rename", "mkdir", "short")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


class Faults:
    """Counts the calls of one kind below `folder`; the one numbered `at` (from 0) fails with `code`."""

    def __init__(self, folder: pathlib.Path, call: str, at: int, code: int):
        self.folder, self.call, self.at, self.code = str(folder), call, at, code
        self.count = 0

    def meet(self, call: str, path: Any) -> bool:
        """Whether this call is the one; raises for all kinds but "short"."""
        if call != self.call or not str(path).startswith(self.folder):
            return False
        self.count += 1
        if self.count - 1 != self.at:
            return False
        if call == "short":
            return True
        raise OSError(self.code, os.strerror(self.code), str(path))


class _File:
    """A file that is written to, whose writes are counted; everything else is the file's own."""

    def __init__(self, file: Any, path: Any, faults: Faults):
        self._file, self._path, self._faults = file, path, faults

    def write(self, content: Any) -> int:
        self._faults.meet("write", self._path)
        if self._faults.meet("short", self._path):  # claims all and writes half
            self._file.write(memoryview(content)[: len(content) // 2] if not isinstance(content, str) else "")
            return len(content)
        return int(self._file.write(content))

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *problem: Any) -> Any:
        return self._file.__exit__(*problem)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def failing(monkeypatch: Any, folder: pathlib.Path, call: str, at: int, code: int = errno.EIO) -> Iterator[Faults]:
    """Within the block that call fails below the folder; the `count` of what comes back says how many were made."""
    faults = Faults(folder, call, at, code)
    real_open, real_fsync, real_replace, real_rename, real_mkdir = io.open, os.fsync, os.replace, os.rename, os.mkdir

    def opened(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        writes = any(letter in mode for letter in "wax+")
        if writes:
            faults.meet("open", path)
        file = real_open(path, mode, *rest, **more)
        return _File(file, path, faults) if writes and isinstance(path, str | pathlib.Path) else file

    def path_open(self: pathlib.Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return opened(self, mode, *rest, **more)

    def fsync(handle: int) -> None:
        faults.meet("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        real_fsync(handle)

    def replace(source: Any, target: Any, **more: Any) -> None:
        faults.meet("rename", target)
        real_replace(source, target, **more)

    def rename(source: Any, target: Any, **more: Any) -> None:
        faults.meet("rename", target)
        real_rename(source, target, **more)

    def mkdir(path: Any, *rest: Any, **more: Any) -> None:
        faults.meet("mkdir", path)
        real_mkdir(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", path_open)
        patch.setattr("builtins.open", opened)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        patch.setattr(os, "rename", rename)
        patch.setattr(os, "mkdir", mkdir)
        yield faults
