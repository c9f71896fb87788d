"""SIGKILL at random moments while checkpoints are saved back to back: is any lost, is a broken one ever picked?

    python bench/runs_kill.py --kills 200 [--folder DIR]

One small training that saves after every step is killed and resumed, again and again in the same folder. Before each
kill the child reports each checkpoint as it is finished; after it, the newest one that verifies must be no older than
the last reported, must load, and a resumed training must go on from it. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sfumato.errors import RunError
from sfumato.runs.checkpoints import Checkpoints

ROOT = Path(__file__).resolve().parents[1]
_CHILD = """
import sys, torch
from sfumato.runs.checkpoints import Checkpoints
store = Checkpoints(__import__("pathlib").Path(sys.argv[1]), keep=2)
step, passed = store.newest()
value = -1 if step is None else int(store.load(step)["value"])
print(f"resumed {value}", flush=True)
assert step is None or value == step
for number in range(value + 1, value + 1_000_000):
    store.save(number, {"value": number, "weights": torch.full((300_000,), float(number))})
    print(f"saved {number}", flush=True)
"""


def kill_once(folder: Path, delay_s: float) -> tuple[int | None, int]:
    """(what the child resumed from or None if it did not get there, the last step that it reported as saved)."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    first = child.stdout.readline().split()
    time.sleep(delay_s)
    child.send_signal(signal.SIGKILL)
    lines = [line.split() for line in child.stdout.read().splitlines() if line.startswith("saved ")]
    child.wait()
    resumed = int(first[1]) if first[:1] == ["resumed"] else None
    saved = [int(line[1]) for line in lines if len(line) == 2]
    return resumed, max(saved, default=-1 if resumed is None else resumed)


def measure(kills: int, folder: Path, seed: int = 0) -> dict[str, float]:
    """The figures of `kills` kills."""
    rng = random.Random(seed)
    lost = broken = resumes = in_a_save = passed_over = 0
    expected = -1
    began = time.monotonic()
    for _ in range(kills):
        resumed, saved = kill_once(folder, rng.uniform(0.01, 0.15))
        resumes += resumed is not None and resumed >= expected
        in_a_save += any(folder.glob(".*.part"))
        store = Checkpoints(folder)
        newest, passed = store.newest()
        passed_over += len(passed)
        valid = sum(store.problem(step) is None for step in store.steps())
        expected = -1 if newest is None else newest  # killed before the first was finished, there is none
        lost += expected < saved or valid < min(2, saved + 1)
        try:
            state: dict[str, Any] = {"value": -1, "weights": -torch.ones(1)} if newest is None else store.load(newest)
            broken += state["value"] != expected or bool((state["weights"] != expected).any())
        except RunError:
            broken += 1
    return {
        "kills": kills,
        "checkpoints_lost": lost,
        "broken_picked": broken,
        "resumes": resumes,
        "killed_inside_a_save": in_a_save,
        "unfinished_in_their_place": passed_over,
        "last_step": expected,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Print the figures; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options.kills, options.folder or Path(temporary) / "checkpoints", options.seed)
    print(json.dumps(found))
    sys.exit(bool(found["checkpoints_lost"] or found["broken_picked"] or found["resumes"] != options.kills))


if __name__ == "__main__":
    main()
