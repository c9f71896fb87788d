"""Generated names and paths: writes outside the run's folder, and overwrites.

    python bench/runs_names.py --names 20000

The laws of tests/runs/test_names.py with more examples: names of runs are written for real, prompts and new words are
followed to the path of their file. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Print the figures; exit code 1 if a law was broken."""
    from tests.runs import test_names as laws

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", type=int, default=20_000)
    options = parser.parse_args()
    began = time.monotonic()
    count = {"run": 0, "taken": 0, "prompt": 0, "word": 0}
    broken: list[str] = []

    def quiet(examples: int) -> settings:
        return settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))

    with tempfile.TemporaryDirectory() as temporary:
        root = laws.make_root(Path(temporary))

        @quiet(options.names // 2)
        @given(name=laws.names)
        def of_runs(name: str) -> None:
            count["run"] += 1
            count["taken"] += laws.a_run_writes_its_file_into_its_folder(name, root)

        @quiet(options.names // 8)
        @given(prompts=st.lists(laws.names, min_size=1, max_size=4))
        def of_prompts(prompts: list[str]) -> None:
            count["prompt"] += len(prompts)
            laws.pictures_of_prompts_lie_in_their_folder(prompts, root)

        @quiet(options.names // 8)
        @given(tokens=st.lists(laws.words, min_size=1, max_size=4, unique=True))
        def of_words(tokens: list[str]) -> None:
            count["word"] += len(tokens)
            laws.words_have_files_of_their_own(tokens, root)

        for law in (of_runs, of_prompts, of_words):
            try:
                law()
            except AssertionError as error:
                broken.append(f"{law.__name__}: {' '.join(str(error).split())[:300]}")
    total = count["run"] + count["prompt"] + count["word"]
    print(json.dumps({"names": total, **count, "broken": broken, "seconds": round(time.monotonic() - began, 1)}))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
