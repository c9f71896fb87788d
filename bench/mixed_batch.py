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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.compose_vs_diffusers import CASES, build, resident_mib, write_adapters
from bench.real import at_least
from sfumato.compose import Adapter, adapter_guidance, compose, current
from sfumato.compose.per_image import per_picture

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


def without_twice(cost: Cost, part: Cost) -> Cost:
    """Without a part that came twice; at least nothing, since clocks are noisy."""
    return max(cost[0] - 2 * part[0], 0.0), max(cost[1] - 2 * part[1], 0.0)


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


@dataclass(frozen=True)
class Batch:
    """A pipeline, and the inputs of a call of its U-Net for pictures with an adapter of its own each. files: these."""

    pipe: Any
    files: list[Path]
    latents: Tensor
    text: Tensor

    def call(self, rows: slice = slice(None)) -> Any:
        return self.pipe.unet(self.latents[rows], 500, self.text[rows], return_dict=False)[0]

    def alone(self, place: int) -> Any:
        return self.call(slice(place, place + 1))

    def all_alone(self) -> None:
        for place in range(len(self.files)):
            self.alone(place)

    def mixed_once(self) -> tuple[Cost, Cost]:
        """(bringing the adapters in and out, a call with them)."""
        whole, calls = Watch(), []
        with per_picture(self.pipe, [[Adapter(file)] for file in self.files]):
            self.call()  # gathers the factors, and is taken off again
            calls.append(costs(self.call))
        return without_twice(whole.cost(), calls[0]), calls[0]

    def one_after_another(self) -> tuple[Cost, Cost]:
        """The same of diffusers, for all pictures; of theirs, too, what only a first call takes is bringing in."""
        whole, calls = Watch(), []
        for place, file in enumerate(self.files):
            self.pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="one")
            self.alone(place)
            calls.append(costs(partial(self.alone, place)))
            self.pipe.unload_lora_weights()
        called = (sum(clock for clock, _ in calls), sum(used for _, used in calls))
        return without_twice(whole.cost(), called), called


def _in_rounds(batch: Batch, rounds: int, steps: int, *, ours_only: bool) -> dict[str, Any]:
    """The calls in turns, and with `steps` of them a drawing."""
    batch.call()
    batch.alone(0)
    plain, plain_alone, mixed, theirs, ours_in_out, theirs_in_out = [], [], [], [], [], []
    for _ in range(rounds):
        plain.append(costs(batch.call))
        plain_alone.append(costs(batch.all_alone))
        in_out, called = batch.mixed_once()
        ours_in_out.append(in_out)
        mixed.append(called)
        if not ours_only:
            in_out, called = batch.one_after_another()
            theirs_in_out.append(in_out)
            theirs.append(called)
    drawn, drawn_alone = ([times(cost, steps) for cost in each] for each in (plain, plain_alone))
    drawn_ours = [plus(a, times(b, steps)) for a, b in zip(ours_in_out, mixed, strict=True)]
    drawn_theirs = [plus(a, times(b, steps)) for a, b in zip(theirs_in_out, theirs, strict=True)]
    found: dict[str, Any] = {
        "call_without_adapters_s": _median(plain),
        "plain_one_after_another_s": _median(plain_alone),
        "plain_one_after_another_ratio_cpu": _ratio(plain_alone, plain, of_cpu=True),
        "call_with_one_adapter_a_picture_s": _median(mixed),
        "in_and_out_s": _median(ours_in_out),
        "ratio": _ratio(mixed, plain),
        "ratio_cpu": _ratio(mixed, plain, of_cpu=True),
        "steps": steps,
        "drawing_ratio_cpu": _ratio(drawn_ours, drawn, of_cpu=True),
    }
    if theirs:
        found |= {
            "diffusers_calls_one_after_another_s": _median(theirs),
            "diffusers_in_and_out_s": _median(theirs_in_out),
            "diffusers_drawing_ratio_cpu": _ratio(drawn_theirs, drawn, of_cpu=True),
            "diffusers_drawing_over_plain_one_after_another_cpu": _ratio(drawn_theirs, drawn_alone, of_cpu=True),
            "diffusers_over_ours_drawing_cpu": _ratio(drawn_theirs, drawn_ours, of_cpu=True),
        }
    return found


@torch.no_grad()
def main() -> None:
    """Measure and print."""
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
    pipe, count = build("sd1", torch.bfloat16), chosen.pictures
    with tempfile.TemporaryDirectory() as folder:
        files = write_adapters(pipe.unet, CASES["sd1-attention"], Path(folder), max(count, chosen.resident))
        latents = torch.randn(count, 4, chosen.size, chosen.size, dtype=torch.bfloat16)
        batch = Batch(pipe, files[:count], latents, torch.randn(count, 77, 768, dtype=torch.bfloat16))
        report = {
            "what": f"SD 1.5 U-Net, bf16, {count} pictures of {chosen.size * 8} px, rank 16 on all attention",
            "rounds": chosen.rounds,
            "threads": chosen.threads,
            **_in_rounds(batch, chosen.rounds, chosen.steps, ours_only=chosen.ours_only),
            **_guided(pipe, files[0], chosen.rounds, batch.call),
            **(_resident(pipe, files[: chosen.resident]) if chosen.resident else {}),
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
