"""How torch's threads share the processor with other programs: how many there are, and how they wait.

OpenMP reads both from the environment when torch is loaded, so this must be said before. It loads no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path

_GROUP = re.compile(r"^\d+:([^:]*):/(.*)$", re.MULTILINE)
"""A line of /proc/self/cgroup: the controllers of a group of version 1, and the group's path."""


def settle(environment: MutableMapping[str, str], root: Path = Path("/")) -> None:
    """Say both in `environment`, where the person has said nothing of them.

    As many threads as there are cores to use: torch sees those of the whole machine where a container may use a few.

    Threads that wait for each other do so busily for a tenth of a millisecond, not for several, as GNU's OpenMP does: a
    thread spins away the time that the thread it waits for needs, where another program has the other core. Beside one
    of another terminal drawing takes seven times as long so (bench/beside_others.py).
    """
    if "OMP_NUM_THREADS" not in environment and (share := cores_of_group(root)) < cores_of_process():
        environment["OMP_NUM_THREADS"] = str(max(1, int(share)))
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "4000")


def cores_of_process() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_group(root: Path = Path("/")) -> float:
    """Cores that this process may use at once by Linux's control groups, which Docker's `--cpus` and Kubernetes' limits
    set; infinite where nothing is set."""
    return min((share for folder in _groups(root) for share in _shares(folder)), default=float("inf"))


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the process's groups that may limit it, and of those around them. In a container the path that the
    system names may lie outside, and its own group at the top."""
    for controllers, path in _GROUP.findall(_read(root / "proc/self/cgroup")):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path
        yield group
        yield from (around for around in group.parents if around.is_relative_to(top))


def _shares(group: Path) -> Iterator[float]:
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
