"""Different adapters for every picture of one batch: what it costs, and against diffusers loading one after another.

    python -m bench.mixed_batch [--pictures 8] [--rounds 3] [--size 64] [--resident 100]

SD 1.5's U-Net at full size with random weights in bf16, rank-16 adapters on all attention. Prints JSON: seconds of a
U-Net call for a batch without adapters, with one set for each picture (ours), and for diffusers loading, calling and
unloading for each picture; and of many adapters that one mix holds, the seconds to load and to switch to each, and the
memory.
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
from sfumato.compose import Adapter, current
from sfumato.compose.per_picture import per_picture


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _resident(pipe: Any, files: list[Path], count: int, call: Callable[[slice], Any]) -> dict[str, Any]:
    """Many adapters held by one mix, each in turn the only one with a weight."""
    from sfumato.compose import compose

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


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=32, help="latent pixels on a side; 64 is a picture of 512 px")
    parser.add_argument("--resident", type=int, default=100)
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
            plain.append(seconds(call))
            with per_picture(pipe, [[Adapter(file)] for file in files]):
                call()  # gathers the factors
                mixed.append(seconds(call))
            theirs.append(seconds(one_after_another))

        resident = _resident(pipe, files, chosen.resident, call)
    print(
        json.dumps(
            {
                "what": f"SD 1.5 U-Net, bf16, {count} pictures of {chosen.size * 8} px, rank 16 on all attention",
                "call_without_adapters_s": round(median(plain), 3),
                "call_with_one_adapter_a_picture_s": round(median(mixed), 3),
                "ratio": round(median(m / p for m, p in zip(mixed, plain, strict=True)), 3),
                "diffusers_one_after_another_s": round(median(theirs), 3),
                "diffusers_over_ours": round(median(t / m for t, m in zip(theirs, mixed, strict=True)), 2),
                **resident,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
