"""Mixing beside diffusers: K rank-16 adapters on all attention of a full-size SD 1.5 U-Net, random weights, bf16.

    python bench/mixing.py [--counts 1 4 8] [--threads 1]

Prints JSON: CPU seconds of this process (minimum of the rounds, both sides in turns) to load and merge K files, to give
them new weights, to take them out again; what is left in the base afterwards; the error of a merged weight against
float64, over that of rounding the exact sum once.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sfumato.compose import Adapter, compose
from sfumato.files.lora_file import LoraModule
from sfumato.files.write import write_lora

RANK = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
CHECKED = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def build() -> Any:
    """A pipeline-like object around SD 1.5's U-Net (859.5 M weights), std 1/sqrt(fan in)."""
    import diffusers
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    from sfumato.bases.single_file import shipped

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(shipped("sd1", "unet/config.json"))
    unet = unet.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in unet.parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 else 1
        weight.normal_(generator=generator).mul_(fan_in**-0.5)

    class Pipe(StableDiffusionLoraLoaderMixin):
        hf_device_map = None
        components = property(lambda self: {"unet": self.unet, "text_encoder": None})
        text_encoder = None

    pipe = Pipe()
    pipe.unet = unet
    return pipe


def write_adapters(unet: Any, folder: Path, count: int) -> list[Path]:
    """fp16 files with kohya's names, |change| about 8 % of |weight|."""
    layers = {path: module for path, module in unet.named_modules() if path.endswith(TARGETS)}
    files = []
    for index in range(count):
        generator = torch.Generator().manual_seed(100 + index)
        modules = {}
        for path, layer in layers.items():
            out, inner = layer.weight.shape
            down = torch.randn(RANK, inner, generator=generator) / inner**0.5
            up = torch.randn(out, RANK, generator=generator) * 0.08 / RANK**0.5
            modules["unet", path] = LoraModule(down, up, float(RANK))
        files.append(write_lora(folder / f"file{index}.safetensors", modules, family="sd1", dtype=torch.float16))
    return files


class Clock:
    """The least CPU seconds of each thing done."""

    def __init__(self) -> None:
        self.least: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        spent = time.process_time() - start
        self.least[name] = min(spent, self.least.get(name, spent))
        return result


def ours(pipe: Any, files: list[Path], clock: Clock) -> Any:
    """Load and merge, new weights, undo; returns a merged weight."""
    target = SimpleNamespace(unet=pipe.unet)
    adapters = [Adapter(file, 0.6, name=file.stem) for file in files]
    mix = clock("load + merge", lambda: compose(target, *adapters))
    merged = pipe.unet.get_submodule(CHECKED).weight.clone()
    clock("new weights", lambda: mix.set_weights({file.stem: 0.5 - 0.01 * i for i, file in enumerate(files)}))
    clock("remove", mix.undo)
    return merged


def diffusers_way(pipe: Any, files: list[Path], clock: Clock) -> Any:
    """The same through load_lora_weights, set_adapters, fuse_lora and back."""
    names = [file.stem for file in files]

    def load() -> None:
        for file in files:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
        pipe.set_adapters(names, [0.6] * len(files))
        pipe.fuse_lora(components=["unet"])

    def change() -> None:
        pipe.unfuse_lora(components=["unet"])
        pipe.set_adapters(names, [0.5 - 0.01 * i for i in range(len(files))])
        pipe.fuse_lora(components=["unet"])

    def remove() -> None:
        pipe.unfuse_lora(components=["unet"])
        pipe.unload_lora_weights()

    clock("load + merge", load)
    merged = pipe.unet.get_submodule(CHECKED).base_layer.weight.clone()
    clock("new weights", change)
    clock("remove", remove)
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    pipe = build()
    pristine = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items() if ".to_" in name}

    def residue() -> float:
        now = pipe.unet.state_dict()
        changed = sum(int((now[name] != tensor).sum()) for name, tensor in pristine.items())
        for name, tensor in pristine.items():
            now[name].copy_(tensor)
        return changed / sum(tensor.numel() for tensor in pristine.values())

    report: dict[str, Any] = {"threads": options.threads, "rank": RANK, "dtype": "bfloat16", "counts": {}}
    with tempfile.TemporaryDirectory() as folder:
        files = write_adapters(pipe.unet, Path(folder), max(options.counts))
        for count in options.counts:
            clocks, merged, left = {"sfumato": Clock(), "diffusers": Clock()}, {}, {}
            for _ in range(options.rounds):
                for name, way in (("sfumato", ours), ("diffusers", diffusers_way)):
                    merged[name] = way(pipe, files[:count], clocks[name])
                    left[name] = residue()
            report["counts"][count] = {
                "cpu_seconds": {
                    name: {step: round(seconds, 3) for step, seconds in clock.least.items()}
                    for name, clock in clocks.items()
                },
                "ratio": {
                    step: round(clocks["diffusers"].least[step] / clocks["sfumato"].least[step], 1)
                    for step in clocks["sfumato"].least
                },
                "weights_changed_after_removal": left,
                "error_over_one_rounding": errors(pristine[f"{CHECKED}.weight"], files[:count], merged),
            }
    print(json.dumps(report, indent=2))


def errors(base: torch.Tensor, files: list[Path], merged: dict[str, torch.Tensor]) -> dict[str, float]:
    """Each way's distance from the exact sum, over the distance of that sum rounded once."""
    from sfumato.files.lora_file import read_lora

    exact = base.double()
    for file in files:
        module = read_lora(file).modules["unet", CHECKED]
        exact = exact + 0.6 * module.scale * module.up.double() @ module.down.double()
    best = (exact.bfloat16().double() - exact).norm()
    return {name: round(float((weight.double() - exact).norm() / best), 3) for name, weight in merged.items()}


if __name__ == "__main__":
    main()
