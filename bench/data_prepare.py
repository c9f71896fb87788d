"""`prepare` of large photographs: from JPEG files to latents, without a cache, filling it, and from it. Prints JSON.

    python -m bench.data_prepare                       # 20 photographs of 12 megapixels, the pocket base
    python -m bench.data_prepare --base PATH --resolution 512

Looking at them, which decodes and crops on all cores, is timed alone, too; and a step's batch, to show that nothing is
decoded in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from bench.real import at_least
from sfumato.errors import SfumatoError


def write_photographs(folder: Path, count: int) -> None:
    """JPEG files of 4000 x 3000, with detail at every scale, each third one lying on its side by its EXIF data."""
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((4000, 3000))
        grain = random.integers(-10, 11, (3000, 4000, 1), dtype=np.int16)
        pixels = np.clip(np.asarray(coarse, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 3 == 2 else 1
        Image.fromarray(pixels).save(folder / f"{number:03}.jpg", quality=92, exif=exif)
        (folder / f"{number:03}.txt").write_text(f"a photograph, number {number}, coarse, grainy", encoding="utf-8")


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """(result, wall and processor seconds)."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, {
        "seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - processor, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=at_least(1), default=20)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--resolution", type=at_least(8))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=at_least(1), default=200)
    options = parser.parse_args()

    from sfumato.data import prepare, read_folder
    from sfumato.data.buckets import bucket_sizes
    from sfumato.data.checks.survey import survey
    from sfumato.data.preparation.planning import bucket_step
    from sfumato.models import load_base
    from sfumato.precision import decide

    try:
        base = load_base(options.base, precision=decide("auto", device=options.device))
    except SfumatoError as error:
        parser.error(str(error))
    resolution = options.resolution or base.resolution
    report: dict[str, Any] = {
        "cores": os.cpu_count(),
        "device": str(base.precision.device),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "torch": torch.__version__,
        "photographs": options.count,
        "base": base.name,
        "resolution": resolution,
    }
    with tempfile.TemporaryDirectory() as root:
        folder, cache = Path(root) / "pictures", Path(root) / "cache"
        folder.mkdir()
        write_photographs(folder, options.count)
        report["mebibytes_of_jpeg"] = round(sum(p.stat().st_size for p in folder.glob("*.jpg")) / 2**20, 1)
        examples = read_folder(folder)
        sizes = bucket_sizes(resolution, bucket_step(base, resolution))
        sized = [replace(each, options=replace(each.options, resolution=resolution)) for each in examples]
        _, report["look_only"] = timed(lambda: list(survey(sized, {resolution: sizes}, base.vae_factor)))
        plain, report["prepare"] = timed(lambda: prepare(examples, base, resolution=resolution))
        _, report["prepare_filling_the_cache"] = timed(
            lambda: prepare(examples, base, resolution=resolution, cache=cache)
        )
        cached, report["prepare_from_the_cache"] = timed(
            lambda: prepare(examples, base, resolution=resolution, cache=cache)
        )
        report["cache_mebibytes"] = round(sum(p.stat().st_size for p in cache.rglob("*.safetensors")) / 2**20, 2)
        report["equal"] = all(
            torch.equal(plain.batch(0, step, 4).latents, cached.batch(0, step, 4).latents) for step in range(20)
        )
        report["random_crops_and_flips"] = timed(
            lambda: prepare(examples, base, resolution=resolution, crop="random", flip=True)
        )[1]
        _, batches = timed(lambda: [plain.batch(0, step, 4) for step in range(options.steps)])
        report["milliseconds_a_batch_of_4"] = round(batches["seconds"] / options.steps * 1000, 3)
    report["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
