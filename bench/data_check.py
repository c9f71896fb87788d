"""`sfumato check` on a folder of made-up pictures: seconds, and how memory grows with their number. Prints JSON.

    python -m bench.data_check --count 10000

Makes the pictures in a temporary folder, then checks a tenth of them and all of them, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from bench.real import at_least
from sfumato.errors import SfumatoError

SIDES = ((512, 512), (640, 427), (427, 640))


def write_pictures(folder: Path, first: int, last: int) -> None:
    """JPEG files with captions, every one different; each hundredth is a copy of the one before it, one is broken."""
    folder.mkdir(exist_ok=True)
    for number in range(first, last):
        random = np.random.default_rng(number - (number % 100 == 99))
        tiles = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        picture = Image.fromarray(tiles).resize(SIDES[number % 3 if number % 100 != 99 else (number - 1) % 3])
        picture.save(folder / f"{number:05}.jpg", quality=88)
        (folder / f"{number:05}.txt").write_text(f"tiles number {number}, coarse", encoding="utf-8")
    (folder / f"{first:05}-cut.jpg").write_bytes((folder / f"{first:05}.jpg").read_bytes()[:2000])


def measure(folder: Path, base: str) -> dict[str, Any]:
    """One check in this process."""
    from sfumato.data.checks.report import check
    from sfumato.models.family import read_requirements

    began, processor = time.perf_counter(), time.process_time()
    report = check(folder, read_requirements(base))
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    kinds = [line.kind for line in report.lines]
    return {
        "pictures": len(report.looks),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(processor, 2),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "bad_found": kinds.count("bad"),
        "duplicate_groups": kinds.count("duplicate"),
        "torch_loaded": "torch" in sys.modules,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=at_least(20), default=10_000)
    parser.add_argument("--base", default="sd1")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        try:
            print(json.dumps(measure(options.folder, options.base)))
        except SfumatoError as error:
            parser.error(str(error))
        return
    runs = []
    with tempfile.TemporaryDirectory() as root:
        made = 0
        for count in (options.count // 10, options.count):
            write_pictures(Path(root) / "pictures", made, count)
            made = count
            command = [sys.executable, "-m", "bench.data_check", "--folder", f"{root}/pictures", "--base", options.base]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"the check of {count} pictures has failed; the lines above say why.")
            runs.append(json.loads(done.stdout))
    growth = (runs[1]["peak_mib"] - runs[0]["peak_mib"]) * 1024 / (runs[1]["pictures"] - runs[0]["pictures"])
    report = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "base": options.base,
        "runs": runs,
        "kib_per_further_picture": round(growth, 2),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
