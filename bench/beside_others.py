"""How long `sfumato generate` takes, alone and beside a busy program, as torch's threads wait for each other.

    python -m bench.beside_others

Ours, where they soon sleep, beside what GNU's OpenMP does where nothing is said: each in its own process in turns, by
the clock, from the command to its end. Prints JSON: the median seconds of each and ours over the other. Where torch
does not use GNU's OpenMP (macOS, Windows) both are the same.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.real import check_least, print_report
from sfumato import cli

SIDES: dict[str, dict[str, str]] = {"sfumato": {}, "libgomp": {"GOMP_SPINCOUNT": "300000"}}
"""What each side's environment says besides; the second is what libgomp takes of its own."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure drawing beside other programs."""

    pictures: int = 3
    """Pictures that the command draws."""
    steps: int = 25
    """Steps of each."""
    busy: int = 1
    """Programs beside it that never wait."""
    rounds: int = 3
    """Times that each side is measured."""
    out: Path | None = None
    """File that receives the JSON besides."""


@contextmanager
def busy_programs(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Within the block, this many processes that never wait, each in a session of its own, as from another terminal:
    where it groups by them (autogroup, on by default), Linux shares the cores between sessions, not processes."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def timed(command: Sequence[str], variables: dict[str, str]) -> float:
    """Seconds that the command takes."""
    unset = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
    began = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def in_turns(command: Sequence[str], rounds: int) -> dict[str, float]:
    """The median seconds of each side, and our ratio."""
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, variables in SIDES.items():
            seconds[name].append(timed(command, variables))
    median = {name: statistics.median(some) for name, some in seconds.items()}
    ours, theirs = median.values()
    return {name: round(some, 1) for name, some in median.items()} | {"ratio": round(ours / theirs, 2)}


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    check_least(config, "pictures", "steps", "busy", "rounds")
    with tempfile.TemporaryDirectory() as folder:
        words = ["generate", "crab, noto style", "--count", str(config.pictures), "--steps", str(config.steps)]
        command = [sys.executable, "-m", "sfumato", *words, "--output", folder, "--overwrite"]
        report: dict[str, Any] = {"cores": os.cpu_count(), "alone": in_turns(command, config.rounds)}
        with busy_programs(config.busy):
            report[f"beside {config.busy} busy"] = in_turns(command, config.rounds)
    return report


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.beside_others")


if __name__ == "__main__":
    cli.run(main)
