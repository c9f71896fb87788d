"""Who holds a run's folder, as the next one is told."""

import json
import os
import re
import socket
import threading
import time

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
