"""Different adapters for every picture of one batch: what it costs, and against diffusers loading one after another.

    python -m bench.mixed_batch [--pictures 8] [--rounds 3] [--size 64] [--resident 100] [--ours-only]

SD 1.5's U-Net at full size with random weights in bf16, rank-16 adapters on all attention. Prints JSON: seconds of a
U-Net call for a batch without adapters, with one set for each picture (ours), and for diffusers loading, calling and
unloading for each picture; with one adapter in all rows, and under adapter guidance in half of them; and of many
adapters that one mix holds, the seconds to load and to switch to each, and the memory. Ratios are medians over the
rounds, of the clock and of CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.compose_vs_diffusers import CASES, anonymous_mib, build, write_adapters
from sfumato.compose import Adapter, adapter_guidance, compose, current
from sfumato.compose.per_picture import per_picture


def seconds(work: Callable[[], Any]) -> float:
    return costs(work)[0]


def costs(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock and of the CPU, all threads; the latter are those that other programs hardly disturb."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - used


def _resident(pipe: Any, files: list[Path], count: int) -> dict[str, Any]:
    """Many adapters held by one mix, each in turn the only one with a weight."""
    adapters = [Adapter(files[n % len(files)], 0.0, f"adapter {n}") for n in range(count)]
    before = anonymous_mib()
    loading_s = seconds(lambda: compose(pipe, *adapters))
    mix = current(pipe)
    assert mix is not None
    held_mib = anonymous_mib() - before
    switching = []
    for label in list(mix.weights)[:5]:
        switching.append(seconds(lambda label=label: mix.set_weights({label: 1.0})))  # type: ignore[misc]
        mix.set_weights({label: 0.0})
    mix.undo()
    return {
        "resident_adapters": count,
        "loading_each_s": round(loading_s / count, 4),
        "memory_each_mib": round(held_mib / count, 2),
        "switching_to_one_s": round(median(switching), 3),
    }


def _guided(pipe: Any, file: Path, rounds: int, call: Callable[[], Any]) -> dict[str, Any]:
    """A call with the adapter in all rows, and with it in the second half of them."""
    everywhere, guided = [], []
    with compose(pipe, Adapter(file)) as mix:
        for _ in range(rounds):
            everywhere.append(costs(call))
            with adapter_guidance(mix, 2.0, guidance=7.5):
                call()  # reads the originals
                guided.append(costs(call))
    return {
        "call_with_one_adapter_s": _median(everywhere),
        "call_under_adapter_guidance_s": _median(guided),
        "guided_ratio": _ratio(guided, everywhere),
        "guided_ratio_cpu": _ratio(guided, everywhere, of_cpu=True),
    }


def _median(costs: list[tuple[float, float]]) -> float:
    return round(median(clock for clock, _ in costs), 3)


def _ratio(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], *, of_cpu: bool = False) -> float:
    return round(median(a[of_cpu] / b[of_cpu] for a, b in zip(ours, theirs, strict=True)), 3)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8, help="an even number")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=32, help="latent pixels on a side; 64 is a picture of 512 px")
    parser.add_argument("--resident", type=int, default=100)
    parser.add_argument("--ours-only", action="store_true", help="without diffusers, which takes the longest")
    chosen = parser.parse_args()

    case = CASES["sd1-attention"]
    pipe = build("sd1", torch.bfloat16)
    unet, count = pipe.unet, chosen.pictures
    with tempfile.TemporaryDirectory() as folder:
        files = write_adapters(unet, case, Path(folder), count)
        latents = torch.randn(count, 4, chosen.size, chosen.size, dtype=torch.bfloat16)
        text = torch.randn(count, 77, 768, dtype=torch.bfloat16)

        def call(rows: slice = slice(None)) -> Any:
            return unet(latents[rows], 500, text[rows], return_dict=False)[0]

        def one_after_another() -> None:
            for place, file in enumerate(files):
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="one")
                call(slice(place, place + 1))
                pipe.unload_lora_weights()

        call()
        plain, mixed, theirs = [], [], []
        for _ in range(chosen.rounds):
            plain.append(costs(call))
            with per_picture(pipe, [[Adapter(file)] for file in files]):
                call()  # gathers the factors
                mixed.append(costs(call))
            if not chosen.ours_only:
                theirs.append(costs(one_after_another))

        guided = _guided(pipe, files[0], chosen.rounds, call)
        resident = _resident(pipe, files, chosen.resident) if chosen.resident else {}
    peer = {}
    if theirs:
        peer = {
            "diffusers_one_after_another_s": _median(theirs),
            "diffusers_over_ours": _ratio(theirs, mixed),
            "diffusers_over_ours_cpu": _ratio(theirs, mixed, of_cpu=True),
        }
    print(
        json.dumps(
            {
                "what": f"SD 1.5 U-Net, bf16, {count} pictures of {chosen.size * 8} px, rank 16 on all attention",
                "rounds": chosen.rounds,
                "call_without_adapters_s": _median(plain),
                "call_with_one_adapter_a_picture_s": _median(mixed),
                "ratio": _ratio(mixed, plain),
                "ratio_cpu": _ratio(mixed, plain, of_cpu=True),
                **peer,
                **guided,
                **resident,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
