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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

from sfumato.command_line.streams import STOPS_UNREAD

_LOOK_S = 0.1
"""Between two looks for interruptions."""
# SIGINT is not heard by what a shell began in the background, and Windows' terminate leaves no time to save.
_STOP = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)
_HEARD = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""What ends all: the commands have sessions of their own, which a closed terminal's SIGHUP does not reach."""
_OURS = "sfumato: "
"""How the line begins that says why a command failed; a warning's, too."""


def run(
    commands: Mapping[str, Sequence[str]], *, threads: int, after: Mapping[str, Iterable[object]] | None = None
) -> tuple[str, int, str] | None:
    """Run each command; returns the first that failed, by name, exit code and its reason, or None.

    commands: a name for the person -> the words after `sfumato`. threads: of torch, to be shared out. What they say
    goes to stderr, each line after the name of whose it is. Where one fails, or this process is interrupted, the others
    are told to stop: a training finishes its step and saves it, and a second interruption ends it at once. The reason
    is what follows "sfumato: " in the last line of the failed one, which is left to the caller to say; else empty.
    after: by a command's name what is done when it has ended well, in steps, while the others go on; the next step is
    not begun once one has failed.
    """
    processes: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[tuple[str, int, str]] = []

    def stop() -> None:
        for process in processes.values():
            if process.poll() is None:
                process.send_signal(_STOP)

    def follow(name: str) -> None:
        try:
            follow_to_the_end(name)
        except BaseException:  # what is done after it, say: the others would go on for nothing
            stop()
            raise

    def follow_to_the_end(name: str) -> None:
        before = name.ljust(max(map(len, processes)) + 2)
        last = _relay(processes[name], before)
        code = processes[name].wait()
        if code and not failed and not signals:
            failed.append((name, code, last))
        elif last:
            _say(f"{before}{_OURS}{last}")
        steps = iter((after or {}).get(name, ()))
        while not (failed or signals) and next(steps, steps) is not steps:
            pass

    told = 0
    with _heard() as signals, ThreadPoolExecutor(len(commands)) as pool:
        processes.update({name: _start(words, max(1, threads // len(commands))) for name, words in commands.items()})
        followed = [pool.submit(follow, name) for name in processes]
        while wait(followed, timeout=_LOOK_S).not_done:
            due = max(len(signals), bool(failed))  # a first interruption after a failure finds all told already
            if due > told:
                told = due
                stop()
    for one in followed:
        one.result()
    if signals:
        raise KeyboardInterrupt if signals[0] == signal.SIGINT else SystemExit(128 + signals[0])
    return failed[0] if failed else None


@contextmanager
def _heard() -> Iterator[list[int]]:
    """The interruptions within the block, as they come. None is an exception: one that is raised while the main thread
    waits for a lock breaks the lock, and one that comes just before it waits is not seen until the wait is over."""
    signals: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: signals.append(number))
        for number in (getattr(signal, name) for name in _HEARD if hasattr(signal, name))
        if signal.getsignal(number) != signal.SIG_IGN or number in (signal.SIGINT, signal.SIGTERM)  # nohup
    }
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(words: Sequence[str], threads: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "sfumato", *words],
        # "utf-8" as `_relay` reads it.
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8", STOPS_UNREAD: "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A terminal's Ctrl-C comes here alone, and from here each is told once.
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
    )


def _relay(process: subprocess.Popen[bytes], before: str) -> str:
    """Print what the process says until it ends, a bar's states as lines; returns what follows "sfumato: " in its last
    line, which is not printed, or nothing."""
    assert process.stdout is not None
    said, some, held = b"", b"\n", ""
    while some:
        some = os.read(process.stdout.fileno(), 1 << 16)
        *lines, said = re.split(rb"[\r\n]+", said + (some or b"\n"))  # its last line may have no end
        for line in lines:
            if not (text := line.decode("utf-8", errors="replace").strip()):
                continue
            if held:
                _say(f"{before}{held}")
            held = text if text.startswith(_OURS) else ""
            if not held:
                _say(f"{before}{text}")
    return held.removeprefix(_OURS)


def _say(line: str) -> None:
    print(f"{line}\n", end="", file=sys.stderr, flush=True)  # two writes could meet another's
