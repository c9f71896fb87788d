"""Who holds a run's folder, as the next one is told."""

import errno
import json
import os
import re
import socket
import threading
import time
from pathlib import Path

from sfumato.runs import lock
from sfumato.runs.lock import Lock
from tests.runs.said import problem


def test_a_holder_signs_with_process_host_and_time(tmp_path):
    held = Lock(tmp_path)
    assert held.take() is None
    said = problem(Lock(tmp_path).take)
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))} is in use by process {os.getpid()} on "
        rf"{re.escape(socket.gethostname())} \(since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\)\. "
        r"Wait for it, or give another --output\.",
        said,
    )
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".holder.json"}
    held.release()
    held.release()


def test_a_holder_that_does_not_sign_and_one_that_signs_late(tmp_path, monkeypatch):
    held = Lock(tmp_path)
    held.take()
    signed = (tmp_path / ".holder.json").read_text()
    (tmp_path / ".holder.json").unlink()
    late = threading.Timer(0.1, lambda: (tmp_path / ".holder.json").write_text(signed))
    late.start()
    assert "is in use by process " in problem(Lock(tmp_path).take)
    late.join()
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.01)
    (tmp_path / ".holder.json").write_text("[1]")
    begun = time.monotonic()
    assert problem(Lock(tmp_path).take) == (
        f"{tmp_path} is in use by another process. Wait for it, or give another --output."
    )
    assert time.monotonic() - begun < 30
    held.release()


def test_a_holder_s_own_words_are_cut(tmp_path):
    (tmp_path / ".holder.json").write_text(json.dumps({"pid": "9" * 200}))
    taken = Lock(tmp_path)
    assert taken.take() == (
        f"process {'9' * 80} on ? (since ?) used this folder and ended without finishing; its lock is void."
    )
    taken.release()


def test_the_folder_is_let_go_where_the_system_removes_no_file_that_is_open(tmp_path, monkeypatch):
    """Windows: the lock's file goes once the lock is released, and a file that another program reads may stay."""
    held, unlink = Lock(tmp_path), Path.unlink

    def denied(path, missing_ok=False):
        if held.is_held:
            raise PermissionError(errno.EACCES, "in use", str(path))
        unlink(path, missing_ok=missing_ok)

    held.take()
    monkeypatch.setattr(Path, "unlink", denied)
    held.release(trace=False)
    assert not held.is_held
    assert [path.name for path in tmp_path.iterdir()] == [".holder.json"]
