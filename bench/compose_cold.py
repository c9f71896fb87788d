"""The first mix of a process, which compose_vs_diffusers.py runs for each way; prints its CPU and wall seconds.

    python bench/compose_cold.py '{"way": "sfumato", "config": {...}, "dtype": "bfloat16", "threads": 1,
        "base": "unet/diffusion_pytorch_model.safetensors", "files": ["a.safetensors", ...]}'

Before the clock torch, diffusers and its loaders are imported and the U-Net is in memory, as they are for whoever has a
pipeline; what a way imports besides is within its time. "floor" reads each file once and adds each product once, in the
base's type: less is not possible without leaving work out.
"""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from safetensors.torch import load_file

WEIGHT = 0.6


def unet_of(asked: dict[str, Any]) -> Any:
    """The U-Net with the base file's weights, copied; of those that it lacks, which no file changes, any values."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(asked["config"])
    unet = unet.to(getattr(torch, asked["dtype"])).to_empty(device="cpu").eval().requires_grad_(False)
    for name, weight in load_file(asked["base"]).items():
        unet.get_parameter(name).copy_(weight)
    return unet


def sfumato(unet: Any, files: list[Path], base: tuple[Path, ...]) -> None:
    from sfumato.compose import Adapter, compose

    compose(SimpleNamespace(unet=unet, files=base), *(Adapter(file, WEIGHT, name=file.stem) for file in files))


def load(unet: Any, files: list[Path]) -> Any:
    """diffusers' loading and weighing of the files, beside the layers."""
    is_xl = unet.config.addition_embed_type == "text_time"
    mixin: Any = StableDiffusionXLLoraLoaderMixin if is_xl else StableDiffusionLoraLoaderMixin

    class Pipe(mixin):
        hf_device_map = None
        components = property(lambda self: {"unet": self.unet, "text_encoder": None, "text_encoder_2": None})
        text_encoder = text_encoder_2 = None

    pipe = Pipe()
    pipe.unet = unet
    for file in files:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
    pipe.set_adapters([file.stem for file in files], [WEIGHT] * len(files))
    return pipe


def floor(unet: Any, files: list[Path]) -> None:
    by_name = {f"lora_unet_{path.replace('.', '_')}": module.weight for path, module in _with_weights(unet)}
    by_name |= {f"unet.{path}": module.weight for path, module in _with_weights(unet)}
    for file in files:
        tensors = load_file(file)
        for key, down in tensors.items():
            name, _, role = key.partition(".lora_down") if ".lora_down" in key else key.partition(".lora_A")
            if role:
                up = tensors[key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")]
                alpha = float(tensors.get(f"{name}.alpha", len(down)))
                weight = by_name[name]
                weight.addmm_(up.to(weight.dtype), down.to(weight.dtype), alpha=WEIGHT * alpha / len(down))


def _with_weights(unet: Any) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in unet.named_modules() if isinstance(module, torch.nn.Linear))


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    torch.set_grad_enabled(False)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    unet, files = unet_of(asked), [Path(file) for file in asked["files"]]
    ways: dict[str, Callable[[], Any]] = {
        "sfumato": lambda: sfumato(unet, files, (Path(asked["base"]),)),
        "sfumato copy": lambda: sfumato(unet, files, ()),
        "diffusers": lambda: load(unet, files).fuse_lora(components=["unet"]),
        "diffusers, loading alone": lambda: load(unet, files),
        "floor": lambda: floor(unet, files),
    }
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        start = time.process_time(), time.perf_counter()
        ways[asked["way"]]()
        spent = time.process_time() - start[0], time.perf_counter() - start[1]
    print(json.dumps(spent))


if __name__ == "__main__":
    main()
