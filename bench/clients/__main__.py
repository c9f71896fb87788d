"""What other tools make of our files, by their own functions, from a checkout of each.

    python -m bench.clients a1111|comfyui|forge|invokeai|sd-scripts CHECKOUT [--families sd1 sd2 sdxl]

Models have each family's real structure and few channels, so that every key is a real one. The files: LoRA of every
layer and of attention alone, each other kind baked into a LoRA, each kind as differences of weights (not for
sd-scripts, which has none), and differences of norms and biases. Prints JSON: modules in the file, modules that the
client applied, the largest relative error of a module's delta, and what was left out. Exits with 1 where a module is
missing that is not named in EXPECTED, or an error is above 1e-5 (fp32) or 1e-3 (fp16).
Nothing of a client is imported by the package or kept; their modules for drawing and memory are stood in for.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from bench.clients.a1111 import a1111
from bench.clients.client import Client, stand_in
from bench.clients.comfyui import comfyui
from bench.clients.files import LIMITS, files
from bench.clients.forge import forge
from bench.clients.invokeai import invokeai
from bench.clients.models import CHANNELS, build
from bench.clients.sd_scripts import sd_scripts
from sfumato.files.module_names import kohya_name

CLIENTS = {"a1111": a1111, "comfyui": comfyui, "forge": forge, "invokeai": invokeai, "sd-scripts": sd_scripts}
EXPECTED = {
    "a1111": ("unet conv_norm_out", "text_encoder*layer_norm*"),
    "comfyui": ("text_encoder*layer_norm*",),
    "forge": ("text_encoder*layer_norm*",),
    "sd-scripts": ("unet conv_in", "unet conv_out", "unet time_embedding*", "unet add_embedding*"),
}
"""Modules that a client has no place for, whoever wrote the file, as patterns of "part path"."""


def report(name: str, client: Client, family: str) -> Iterator[dict[str, Any]]:
    """The figures of each file."""
    parts = build(family)
    known = {
        kohya_name(family, part, path)
        for part, model in parts.items()
        for path, layer in model.named_modules()
        if getattr(layer, "weight", None) is not None
        and any(fnmatch(f"{part} {path}", pattern) for pattern in EXPECTED.get(name, ()))
    }
    for what, dtype, write, error in files(name, family, parts):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            file = Path(folder) / "a.safetensors"
            wanted = write(file)
            found = client(family, parts, file)
        errors = {
            key: float((found[key].float().reshape(delta.shape) - delta).norm() / delta.norm())
            for key, delta in wanted.items()
            if key in found
        }
        missing = sorted(wanted.keys() - found.keys())
        largest = max(errors.values(), default=None)
        yield {
            "family": family,
            "file": what,
            "dtype": str(dtype).removeprefix("torch."),
            "modules": len(wanted),
            "applied": len(errors),
            "largest_relative_error": largest,
            "error_of_baking": round(error, 6),
            "left_out": missing,
            "extra": sorted(found.keys() - wanted.keys()),
            "holds": not ({key.removesuffix(".bias") for key in missing} - known)
            and not found.keys() - wanted.keys()
            and largest is not None
            and largest <= LIMITS[dtype],
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.clients", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--families", nargs="+", default=["sd1", "sd2", "sdxl"], choices=list(CHANNELS))
    options = parser.parse_args()
    stand_in("einops")  # which they import, and none of what is called here uses
    try:
        client = CLIENTS[options.client](options.checkout.resolve())
    except (ImportError, OSError) as error:
        parser.error(f"{options.checkout} cannot be read as a checkout of {options.client}: {error}")
    rows = [row for family in options.families for row in report(options.client, client, family)]
    print(json.dumps({"client": options.client, "files": rows}, indent=2))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
