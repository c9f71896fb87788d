"""Different adapters for every picture of one batch: what it costs, and against diffusers loading one after another.

    python -m bench.mixed_batch [--pictures 8] [--rounds 3] [--size 64] [--resident 100] [--threads 1] [--ours-only]

SD 1.5's U-Net at full size with random weights in bf16, rank-16 adapters on all attention. Prints JSON: seconds of a
U-Net call for a batch without adapters, and with one set for each picture (ours), and what bringing these in and out
takes; the same of diffusers, one picture after another, and of the plain U-Net so, since part of what diffusers takes
is that its batches are of one; and all over a drawing of 25 steps. Then with one adapter in all rows, and under adapter
guidance in half of them; and of many adapters, each of a file of its own, that one mix holds, the seconds to load and
to switch to each, and the memory. Ratios are medians over the rounds, of the clock and of CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.compose_vs_diffusers import CASES, build, resident_mib, write_adapters
from bench.real import at_least
from sfumato.compose import Adapter, adapter_guidance, compose, current
from sfumato.compose.per_picture import per_picture

Cost = tuple[float, float]
"""Seconds of the clock and of the CPU, all threads; the latter are those that other programs hardly disturb."""


def seconds(work: Callable[[], Any]) -> float:
    return costs(work)[0]


def costs(work: Callable[[], Any]) -> Cost:
    watch = Watch()
    work()
    return watch.cost()


class Watch:
    """The costs since it was made."""

    def __init__(self) -> None:
        self._began, self._used = time.perf_counter(), time.process_time()

    def cost(self) -> Cost:
        return time.perf_counter() - self._began, time.process_time() - self._used


def plus(one: Cost, other: Cost) -> Cost:
    return one[0] + other[0], one[1] + other[1]


def times(cost: Cost, number: int) -> Cost:
    return cost[0] * number, cost[1] * number


def less(cost: Cost, part: Cost, *, times: int = 1) -> Cost:
    """Without a part that came so often; at least nothing, since clocks are noisy."""
    return max(cost[0] - times * part[0], 0.0), max(cost[1] - times * part[1], 0.0)


def _resident(pipe: Any, files: list[Path]) -> dict[str, Any]:
    """An adapter of each file held by one mix, each in turn the only one with a weight."""
    count = len(files)
    adapters = [Adapter(file, 0.0, f"adapter {n}") for n, file in enumerate(files)]
    kinds = ("RssAnon", "RssFile")
    before = [resident_mib(kind) for kind in kinds]
    loading_s = seconds(lambda: compose(pipe, *adapters))
    mix = current(pipe)
    assert mix is not None
    anonymous, of_files = (resident_mib(kind) - was for kind, was in zip(kinds, before, strict=True))
    switching = []
    for label in list(mix.weights)[:5]:
        switching.append(seconds(lambda label=label: mix.set_weights({label: 1.0})))  # type: ignore[misc]
        mix.set_weights({label: 0.0})
    mix.undo()
    return {
        "resident_adapters": count,
        "loading_each_s": round(loading_s / count, 4),
        "anonymous_memory_each_mib": round(anonymous / count, 2),
        "file_backed_memory_each_mib": round(of_files / count, 2),
        "file_each_mib": round(sum(file.stat().st_size for file in files) / count / 2**20, 2),
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


def _median(costs: list[Cost]) -> float:
    return round(median(clock for clock, _ in costs), 3)


def _ratio(ours: list[Cost], theirs: list[Cost], *, of_cpu: bool = False) -> float:
    return round(median(a[of_cpu] / b[of_cpu] for a, b in zip(ours, theirs, strict=True)), 3)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=at_least(2), default=8, help="an even number")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--steps", type=at_least(1), default=25, help="calls of the U-Net in a drawing")
    parser.add_argument("--size", type=at_least(8), default=32, help="latent pixels on a side, 64 for 512 px")
    parser.add_argument("--resident", type=at_least(0), default=100)
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--ours-only", action="store_true", help="without diffusers, which takes the longest")
    chosen = parser.parse_args()
    if chosen.pictures % 2:
        parser.error(f"--pictures {chosen.pictures}: wanted an even number, half of which is drawn under guidance")

    torch.set_num_threads(chosen.threads)
    case = CASES["sd1-attention"]
    pipe = build("sd1", torch.bfloat16)
    unet, count = pipe.unet, chosen.pictures
    with tempfile.TemporaryDirectory() as folder:
        all_files = write_adapters(unet, case, Path(folder), max(count, chosen.resident))
        files = all_files[:count]
        latents = torch.randn(count, 4, chosen.size, chosen.size, dtype=torch.bfloat16)
        text = torch.randn(count, 77, 768, dtype=torch.bfloat16)

        def call(rows: slice = slice(None)) -> Any:
            return unet(latents[rows], 500, text[rows], return_dict=False)[0]

        def mixed_once() -> tuple[Cost, Cost]:
            """(bringing the adapters in and out, a call with them)."""
            whole, calls = Watch(), []
            with per_picture(pipe, [[Adapter(file)] for file in files]):
                call()  # gathers the factors, and is taken off again
                calls.append(costs(call))
            return less(whole.cost(), calls[0], times=2), calls[0]

        def alone(place: int) -> Any:
            return call(slice(place, place + 1))

        def one_after_another() -> tuple[Cost, Cost]:
            """The same of diffusers, for all pictures; of theirs, too, what only a first call takes is bringing in."""
            whole, calls = Watch(), []
            for place, file in enumerate(files):
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="one")
                alone(place)
                calls.append(costs(partial(alone, place)))
                pipe.unload_lora_weights()
            called = (sum(clock for clock, _ in calls), sum(used for _, used in calls))
            return less(whole.cost(), called, times=2), called

        call()
        alone(0)
        plain, plain_alone, mixed, theirs, ours_in_out, theirs_in_out = [], [], [], [], [], []
        for _ in range(chosen.rounds):
            plain.append(costs(call))
            plain_alone.append(costs(lambda: [alone(place) for place in range(count)]))
            in_out, called = mixed_once()
            ours_in_out.append(in_out)
            mixed.append(called)
            if not chosen.ours_only:
                in_out, called = one_after_another()
                theirs_in_out.append(in_out)
                theirs.append(called)

        guided = _guided(pipe, files[0], chosen.rounds, call)
        resident = _resident(pipe, all_files[: chosen.resident]) if chosen.resident else {}
    drawn = {
        "plain": [times(cost, chosen.steps) for cost in plain],
        "plain alone": [times(cost, chosen.steps) for cost in plain_alone],
        "ours": [plus(a, times(b, chosen.steps)) for a, b in zip(ours_in_out, mixed, strict=True)],
        "theirs": [plus(a, times(b, chosen.steps)) for a, b in zip(theirs_in_out, theirs, strict=True)],
    }
    peer = {}
    if theirs:
        peer = {
            "diffusers_calls_one_after_another_s": _median(theirs),
            "diffusers_in_and_out_s": _median(theirs_in_out),
            "diffusers_drawing_ratio_cpu": _ratio(drawn["theirs"], drawn["plain"], of_cpu=True),
            "diffusers_drawing_over_plain_one_after_another_cpu": _ratio(
                drawn["theirs"], drawn["plain alone"], of_cpu=True
            ),
            "diffusers_over_ours_drawing_cpu": _ratio(drawn["theirs"], drawn["ours"], of_cpu=True),
        }
    print(
        json.dumps(
            {
                "what": f"SD 1.5 U-Net, bf16, {count} pictures of {chosen.size * 8} px, rank 16 on all attention",
                "rounds": chosen.rounds,
                "threads": chosen.threads,
                "call_without_adapters_s": _median(plain),
                "plain_one_after_another_s": _median(plain_alone),
                "plain_one_after_another_ratio_cpu": _ratio(plain_alone, plain, of_cpu=True),
                "call_with_one_adapter_a_picture_s": _median(mixed),
                "in_and_out_s": _median(ours_in_out),
                "ratio": _ratio(mixed, plain),
                "ratio_cpu": _ratio(mixed, plain, of_cpu=True),
                "steps": chosen.steps,
                "drawing_ratio_cpu": _ratio(drawn["ours"], drawn["plain"], of_cpu=True),
                **peer,
                **guided,
                **resident,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
