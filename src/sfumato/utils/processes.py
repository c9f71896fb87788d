"""Output that nobody reads any more stops no work: `sfumato train ... 2>&1 | head` learns to the end. Nor does a log
that finds no room: `sfumato train ... 2> log`.

How torch's threads share the processor with other programs: how many there are, and how they wait.

OpenMP reads both from the environment when torch is loaded, so this must be said before. It loads no torch.

Commands of `sfumato` at the same time, each in a process of its own with its share of the processor's cores.

Two small trainings with a core each are done in two thirds of the time that they take one after the other with both:
a small model's step is many short products, of which two cores make little more than one. `quickstart` learns so.

Functions of the GNU C library, which knows what memory is free.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROKEN_PIPE_VARIABLE = "SFUMATO_STOPS_UNREAD"
"""Set for a command whose reader is the program that began it: it is to end with that one."""
_BROKEN_PIPE_ERRORS = (errno.EPIPE, errno.EIO, *((errno.EINVAL,) if os.name == "nt" else ()))
"""A pipe whose reader has gone, on Windows, too, and a terminal that is closed."""
_DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A file on a full disk, or at a limit."""


class _PipeSafeFile(io.FileIO):
    """Writes to a file descriptor, and to nowhere once its reader has gone.

    is_news: it says how the work goes and holds no result. What a full disk does not take of it is lost, and what comes
    later is written again.
    """

    is_news = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.is_news and error.errno in _DISK_FULL_ERRORS:
                return len(memoryview(data).cast("B"))
            if error.errno not in _BROKEN_PIPE_ERRORS:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # what others write there, too
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


def ignore_broken_pipes() -> None:
    """Make the process's standard output and errors such streams, where they are its own; a letter that the other end
    lacks is shown as its number."""
    if BROKEN_PIPE_VARIABLE in os.environ:
        return
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue
        if os.name == "nt" and stream.isatty():  # its console takes letters, and not the bytes of a file
            continue
        try:
            stream.flush()
            raw = _PipeSafeFile(stream.fileno(), "wb", closefd=False)
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


_GROUP = re.compile(r"^\d+:([^:]*):/(.*)$", re.MULTILINE)
"""A line of /proc/self/cgroup: the controllers of a group of version 1, and the group's path."""


def set_thread_environment(environment: MutableMapping[str, str], root: Path = Path("/")) -> None:
    """Say both in `environment`, where the person has said nothing of them.

    As many threads as there are cores to use: torch sees those of the whole machine where a container may use a few.

    Threads that wait for each other do so busily for a tenth of a millisecond, not for several, as GNU's OpenMP does: a
    thread spins away the time that the thread it waits for needs, where another program has the other core. Beside one
    of another terminal drawing takes seven times as long so (bench/beside_others.py).
    """
    if "OMP_NUM_THREADS" not in environment and (share := cgroup_cores(root)) < available_cores():
        environment["OMP_NUM_THREADS"] = str(max(1, int(share)))
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "4000")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroup_cores(root: Path = Path("/")) -> float:
    """Cores that this process may use at once by Linux's control groups, which Docker's `--cpus` and Kubernetes' limits
    set; infinite where nothing is set."""
    return min((share for folder in _cgroup_folders(root) for share in _cgroup_quotas(folder)), default=float("inf"))


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """Folders of the process's groups that may limit it, and of those around them. In a container the path that the
    system names may lie outside, and its own group at the top."""
    for controllers, path in _GROUP.findall(_read(root / "proc/self/cgroup")):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path
        yield group
        yield from (around for around in group.parents if around.is_relative_to(top))


def _cgroup_quotas(group: Path) -> Iterator[float]:
    """What a group's folder says, in cores: the microseconds of each period, "max" or -1 where there is no limit."""
    of_version_2 = _read(group / "cpu.max").split()
    of_version_1 = [*_read(group / "cpu.cfs_quota_us").split(), *_read(group / "cpu.cfs_period_us").split()]
    for said in (of_version_2, of_version_1):
        if len(said) == 2 and all(map(str.isdecimal, said)) and int(said[1]):
            yield int(said[0]) / int(said[1])


def _read(path: Path) -> str:
    """Empty where there is no such file, or no text in it."""
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


_LOOK_S = 0.1
"""Between two looks for interruptions."""
# SIGINT is not heard by what a shell began in the background, and Windows' terminate leaves no time to save.
_STOP = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)
_HEARD = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""What ends all: the commands have sessions of their own, which a closed terminal's SIGHUP does not reach."""
_OURS = "sfumato: "
"""How the line begins that says why a command failed; a warning's, too."""


def run_commands(
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
    with _received_signals() as signals, ThreadPoolExecutor(len(commands)) as pool:
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
def _received_signals() -> Iterator[list[int]]:
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
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8", BROKEN_PIPE_VARIABLE: "1"},
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


def libc_function(name: str) -> Any:
    """The function of this name, None on systems without it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def trim_heap() -> None:
    """Return to the system the memory that is free; glibc keeps some, for each thread by itself."""
    malloc_trim = libc_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)
