"""Commands of `sfumato` at the same time, each in a process of its own with its share of the processor's cores.

Two small trainings with a core each are done in two thirds of the time that they take one after the other with both:
a small model's step is many short products, of which two cores make little more than one. `quickstart` learns so.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


def run(commands: Mapping[str, Sequence[str]], *, threads: int) -> tuple[str, int] | None:
    """Run each command; returns the first that failed, by name and exit code, or None.

    commands: a name for the person -> the words after `sfumato`. threads: of torch, to be shared out. What they say
    goes to stderr, each line after the name of whose it is. Where one fails, or this process is interrupted, the others
    are told to stop: a training finishes its step and saves it.
    """
    processes = {name: _start(words, max(1, threads // len(commands))) for name, words in commands.items()}
    stopped: list[subprocess.Popen[bytes]] = []
    failed: list[tuple[str, int]] = []

    def stop() -> None:
        for process in processes.values():
            if process.poll() is None and process not in stopped:  # a second signal would not let it save
                stopped.append(process)
                process.terminate()  # SIGINT is not heard by what a shell began in the background

    def follow(name: str) -> None:
        process = processes[name]
        _relay(process, name.ljust(max(map(len, processes)) + 2))
        if code := process.wait():
            failed.append((name, code))
            stop()

    with ThreadPoolExecutor(len(processes)) as pool, _ending_by_exception():
        try:
            list(pool.map(follow, processes))
        except BaseException:
            stop()
            raise
    return failed[0] if failed else None


@contextmanager
def _ending_by_exception() -> Iterator[None]:
    """Within the block SIGTERM is SystemExit, as SIGINT is KeyboardInterrupt: what is running is not left alone."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(words: Sequence[str], threads: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "sfumato", *words],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C comes here alone, and from here each is told once
    )


def _relay(process: subprocess.Popen[bytes], before: str) -> None:
    """Print what the process says until it ends, a bar's states as lines."""
    assert process.stdout is not None
    said, some = b"", b"\n"
    while some:
        some = os.read(process.stdout.fileno(), 1 << 16)
        *lines, said = re.split(rb"[\r\n]+", said + (some or b"\n"))  # its last line may have no end
        for line in lines:
            if text := line.decode(errors="replace").strip():
                print(f"{before}{text}\n", end="", file=sys.stderr, flush=True)  # two writes could meet another's
