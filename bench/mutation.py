"""How many wrong versions of `sfumato.runs` and `sfumato.files` do their tests notice? By mutmut, on a random sample.

    pip install -e '.[test,mutation]'
    python bench/mutation.py --sample 120 --seed 1 [--packages runs,files]

mutmut writes the mutants. This program draws the sample and tries each mutant in a forked process, where the function's
code is replaced by the mutant's and the tests of the package that ever call the function are run, quickest first, until
one fails: torch is imported once, and nothing is slower than it is without mutants. A mutant that no test calls has
survived; one that does not end in several times its tests' time is killed, as mutmut counts it. Processes that tests
start run the code as it is, so that what only they would notice counts as survived. A mutant that cannot take the
function's place is counted apart: no test has judged it.

Prints JSON: the score of each package with its 95 % Wilson interval, both together weighted by their numbers of
mutants, and the survivors.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import json
import math
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("runs", "files")
LOOK_S = 0.05
NOT_PLACED = "not put in place"


@dataclass(frozen=True)
class Mutant:
    """function: what is changed. original, changed: its definition before and after."""

    name: str
    function: FunctionType
    original: ast.FunctionDef
    changed: ast.FunctionDef

    def put_in_place(self) -> None:
        """Make the function the mutant, wherever it has been imported already."""
        self.changed.decorator_list = []
        future = ast.parse("from __future__ import annotations").body
        scope = dict(self.function.__globals__)
        exec(compile(ast.Module([*future, self.changed], []), self.function.__code__.co_filename, "exec"), scope)
        made = scope[self.changed.name]
        self.function.__code__ = made.__code__
        self.function.__defaults__, self.function.__kwdefaults__ = made.__defaults__, made.__kwdefaults__

    def lines(self) -> list[str]:
        """What the mutant says instead of the original, as `ast` prints both."""
        before, after = (
            [ast.unparse(node.args), *ast.unparse(ast.Module(node.body, [])).splitlines()]
            for node in (self.original, self.changed)
        )
        lines = difflib.unified_diff(before, after, n=0, lineterm="")
        return [line for line in lines if line[:1] in "+-" and line[:3] not in ("---", "+++")]


def mutants_of(package: str) -> list[Mutant]:
    """Every mutant that mutmut makes of the package, by file and place."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name, orig_function_and_class_names_from_key

    found = []
    for path in sorted((ROOT / "src/sfumato" / package).rglob("*.py")):
        place = path.relative_to(ROOT)
        mutated = mutate_file_contents(str(place), path.read_text(encoding="utf-8"))
        module = importlib.import_module(".".join(place.with_suffix("").parts[1:]).removesuffix(".__init__"))
        versions = {node.name: node for node in ast.walk(ast.parse(mutated.code)) if isinstance(node, ast.FunctionDef)}
        for version in mutated.mutant_names:
            name = get_mutant_name(place, version)
            function_name, class_name = orig_function_and_class_names_from_key(name)
            held = vars(getattr(module, class_name) if class_name else module)[function_name]
            function = getattr(held, "__func__", None) or getattr(held, "fget", None) or held
            original = versions[f"{version.partition('__mutmut_')[0]}__mutmut_orig"]
            found.append(Mutant(name, function, original, versions[version]))
    return found


def wilson(noticed: int, of: int) -> list[float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if of == 0:
        return [0.0, 1.0]
    z, share = 1.96, noticed / of
    middle, width = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return [round((middle + sign * width) / (1 + z * z / of), 3) for sign in (-1, 1)]


class Loop:
    """pytest's plugin that runs the tests once as they are, to learn what each one calls, and then for each mutant."""

    def __init__(self, package: str, sample: int, seed: int):
        self.mutants = mutants_of(package)
        self.sample = random.Random(f"{seed} {package}").sample(self.mutants, min(sample, len(self.mutants)))
        self.results: dict[str, str] = {}
        self.broken: list[str] = []
        self._calls: dict[CodeType, list[tuple[float, Any]]] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of pytest's own loop."""
        self._run_clean(session.items)
        for number, mutant in enumerate(self.sample if not self.broken else ()):
            self.results[mutant.name] = self._try(mutant)
            _say(f"{number + 1}/{len(self.sample)} {self.results[mutant.name]}: {mutant.name}")
        return True

    def _run_clean(self, items: Sequence[Any]) -> None:
        watched = {mutant.function.__code__ for mutant in self.sample}
        called: set[CodeType] = set()

        def watch(frame: FrameType, *_: Any) -> None:
            if frame.f_code in watched:
                called.add(frame.f_code)

        for number, (item, following) in enumerate(_in_turn(items)):
            begun = time.perf_counter()
            sys.settrace(watch)
            passed = _passes(item, following)
            sys.settrace(None)
            if not passed:
                self.broken.append(item.nodeid)
            for code in called:
                self._calls.setdefault(code, []).append((time.perf_counter() - begun, item))
            called.clear()
            if number % 50 == 49:
                _say(f"{number + 1} of {len(items)} tests are run as they are")

    def _try(self, mutant: Mutant) -> str:
        calls = sorted(self._calls.get(mutant.function.__code__, []), key=lambda call: call[0])
        if not calls:
            return "not tested"
        seconds = sum(spent for spent, _ in calls)
        child = os.fork()
        if child == 0:
            _run_mutant(mutant, [item for _, item in calls], int(10 + 5 * seconds))
        # Counted in looks and not by the clock: a machine that sleeps between two of them is no endless loop.
        for _ in range(int((30 + 10 * seconds) / LOOK_S)):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(LOOK_S)
        else:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        with suppress(ProcessLookupError):  # what its tests have started and left
            os.killpg(child, signal.SIGKILL)
        return {0: "survived", 1: "killed", 2: NOT_PLACED}.get(os.waitstatus_to_exitcode(status), "timeout")


def _run_mutant(mutant: Mutant, items: Sequence[Any], seconds: int) -> None:
    """Never returns: exit code 1 as soon as a test fails, 0 if none does, 2 if the mutant cannot be put in place."""
    code = 2
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(silent, stream)
        mutant.put_in_place()
        code = 1
        if all(_passes(item, following) for item, following in _in_turn(items)):
            code = 0
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
    """The figures of one package."""
    loop = Loop(package, sample, seed)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "tmp_path_retention_policy=none"]
    pytest.main([*options, f"tests/{package}"], plugins=[loop])
    if loop.broken:
        raise SystemExit(f"{len(loop.broken)} tests fail without any mutant, first {loop.broken[0]}; mend them.")
    left = [mutant for mutant in loop.sample if loop.results[mutant.name] in ("survived", "not tested")]
    return {
        "mutants": len(loop.mutants),
        **scored(list(loop.results.values())),
        "survivors": {mutant.name: [loop.results[mutant.name], *mutant.lines()] for mutant in left},
        "never_in_place": [name for name, result in loop.results.items() if result == NOT_PLACED],
    }


def scored(results: Sequence[str]) -> dict[str, Any]:
    """How many mutants came to what, and the share that was noticed of those that took their function's place."""
    noticed = results.count("killed") + results.count("timeout")
    judged = len(results) - results.count(NOT_PLACED)
    return {
        "sampled": len(results),
        **{result: results.count(result) for result in sorted(set(results))},
        "score": round(noticed / max(1, judged), 3),
        "interval": wilson(noticed, judged),
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
    if options.sample < 1:
        parser.error(f"--sample {options.sample}: wanted at least 1")
    if unknown := {*options.packages.split(",")} - {*PACKAGES}:
        parser.error(f"--packages {','.join(sorted(unknown))}: wanted of {','.join(PACKAGES)}")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    begun, figures = time.monotonic(), {}
    for package in options.packages.split(","):
        receiver, sender = os.pipe()
        child = os.fork()  # what is imported for one package is no part of the other's measurement
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
