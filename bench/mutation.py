"""How many wrong versions of `sfumato.runs` and `sfumato.files` do their tests notice? By mutmut, on a random sample.

    pip install -e '.[test,mutation]'
    python bench/mutation.py --sample 120 --seed 1 [--packages runs,files]

mutmut writes the mutants and switches between them; this program draws the sample and runs, in a process forked for
each mutant, the tests of the package that ever call the mutated function, quickest first, until one fails. A mutant
that no test calls has survived; one that does not end in several times its tests' time is killed, as mutmut counts it.
Prints JSON: the score of each package with its 95 % Wilson interval, both together weighted by their numbers of
mutants, and the survivors.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("runs", "files")
NEEDED = ("src", "tests", "bench", "pyproject.toml")
"""What the tests of these packages read."""
POLL_S = 0.02


def mutate(tree: Path, package: str) -> dict[str, tuple[str, str]]:
    """Write the package's files with all their mutants into `tree`; (file, function) of each by its full name."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name

    found = {}
    for path in sorted((ROOT / "src/sfumato" / package).rglob("*.py")):
        place = path.relative_to(ROOT)
        mutated = mutate_file_contents(str(place), path.read_text(encoding="utf-8"))
        (tree / place).write_text(mutated.code, encoding="utf-8")
        found |= {get_mutant_name(place, name): (str(place), name) for name in mutated.mutant_names}
    return found


def wilson(killed: int, of: int) -> list[float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if of == 0:
        return [0.0, 1.0]
    z, share = 1.96, killed / of
    middle, width = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return [round((middle + sign * width) / (1 + z * z / of), 3) for sign in (-1, 1)]


def difference(tree: Path, file: str, name: str) -> list[str]:
    """The lines that a mutant has instead of the original's, both as `ast` prints them."""
    import difflib

    functions = {
        node.name: ast.unparse(node.body).splitlines()
        for node in ast.walk(ast.parse((tree / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    before, after = functions[f"{name.partition('__mutmut_')[0]}__mutmut_orig"], functions[name]
    lines = difflib.unified_diff(before, after, n=0, lineterm="")
    return [line for line in lines if line[:1] in "+-" and line[:3] not in ("---", "+++")]


class Loop:
    """pytest's plugin that, instead of running the tests, runs them for each mutant of the sample."""

    def __init__(self, sample: Sequence[str]):
        self.sample = sample
        self.results: dict[str, str] = {}
        self.broken: list[str] = []
        self._calls: dict[str, list[tuple[float, Any]]] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """The tests once as they are, to learn which function each one calls; then the mutants."""
        self._run_clean(session.items)
        for number, mutant in enumerate(self.sample if not self.broken else ()):
            self.results[mutant] = self._try(mutant)
            _say(f"{number + 1}/{len(self.sample)} {self.results[mutant]}: {mutant}")
        return True

    def _run_clean(self, items: Sequence[Any]) -> None:
        from mutmut.mutation.trampoline import set_mutant_under_test
        from mutmut.state import state

        set_mutant_under_test("stats")
        for item, following in _in_turn(items):
            begun = time.perf_counter()
            if not _passes(item, following):
                self.broken.append(item.nodeid)
            seconds = time.perf_counter() - begun
            for function in state()._stats:
                self._calls.setdefault(function, []).append((seconds, item))
            state()._stats.clear()
        set_mutant_under_test("")
        _say(f"{len(items)} tests call {len(self._calls)} functions")

    def _try(self, mutant: str) -> str:
        calls = sorted(self._calls.get(mutant.partition("__mutmut_")[0], []), key=lambda call: call[0])
        if not calls:
            return "not tested"
        seconds = sum(spent for spent, _ in calls)
        child = os.fork()
        if child == 0:
            _run_mutant(mutant, [item for _, item in calls], int(10 + 5 * seconds))
        # Counted in looks and not by the clock: a machine that sleeps between two of them is no endless loop.
        for _ in range(int((30 + 10 * seconds) / POLL_S)):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(POLL_S)
        else:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        with suppress(ProcessLookupError):  # what its tests have started and left
            os.killpg(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(status)
        return {0: "survived", 1: "killed"}.get(code, "timeout")


def _run_mutant(mutant: str, items: Sequence[Any], seconds: int) -> None:
    """Never returns: exit code 1 as soon as a test fails, 0 if none does."""
    from mutmut.mutation.trampoline import set_mutant_under_test

    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silent, stream)
    set_mutant_under_test(mutant)
    code = 1
    try:
        code = 0 if all(_passes(item, following) for item, following in _in_turn(items)) else 1
    finally:
        os._exit(code)


def _in_turn(items: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(items, [*items[1:], None], strict=True)


def _passes(item: Any, following: Any) -> bool:
    from _pytest.runner import runtestprotocol

    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


def _say(line: str) -> None:
    os.write(_STDERR, f"{line}\n".encode())


_STDERR = os.dup(2)  # pytest takes the first one away


def run_package(package: str, sample: int, seed: int) -> dict[str, Any]:
    """The figures of one package. Called once a process, since what is imported stays."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as temporary:
        tree = Path(temporary)
        for name in NEEDED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, tree / name)
        mutants = mutate(tree, package)
        os.chdir(tree)
        sys.path[:0] = [str(tree / "src"), str(tree)]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for the processes that tests start
        loop = Loop(random.Random(f"{seed} {package}").sample(sorted(mutants), min(sample, len(mutants))))
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"]
        pytest.main([*options, "-o", "tmp_path_retention_policy=none", f"tests/{package}"], plugins=[loop])
        if loop.broken:
            raise SystemExit(f"{len(loop.broken)} tests fail without any mutant, first {loop.broken[0]}; mend them.")
        counts = {result: list(loop.results.values()).count(result) for result in sorted(set(loop.results.values()))}
        noticed = counts.get("killed", 0) + counts.get("timeout", 0)
        survivors = {
            mutant: {"file": mutants[mutant][0], "result": result, "lines": difference(tree, *mutants[mutant])}
            for mutant, result in loop.results.items()
            if result in ("survived", "not tested")
        }
        return {
            "mutants": len(mutants),
            "sampled": len(loop.results),
            **counts,
            "score": round(noticed / max(1, len(loop.results)), 3),
            "interval": wilson(noticed, len(loop.results)),
            "survivors": survivors,
        }


def together(figures: Mapping[str, Mapping[str, Any]]) -> float:
    """The share of all mutants of the packages that the samples let expect to be noticed."""
    mutants = sum(f["mutants"] for f in figures.values())
    return round(sum(f["score"] * f["mutants"] for f in figures.values()) / mutants, 3)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=120, help="mutants of each package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", default=",".join(PACKAGES))
    options = parser.parse_args()
    begun, figures = time.monotonic(), {}
    for package in options.packages.split(","):
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiver)
            os.dup2(2, 1)  # what pytest prints is not the figures
            with os.fdopen(sender, "w") as answer:
                json.dump(run_package(package, options.sample, options.seed), answer)
            os._exit(0)
        os.close(sender)
        with os.fdopen(receiver) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        if not text:
            raise SystemExit(f"the tests of {package} could not be run; the lines above say why.")
        figures[package] = json.loads(text)
    whole = {"score_together": together(figures), "seed": options.seed, "seconds": round(time.monotonic() - begun, 1)}
    print(json.dumps({**whole, **figures}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
