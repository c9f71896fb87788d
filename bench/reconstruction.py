"""What VAEs make of pictures by any hand: PSNR of the reconstructions over folders of pictures and over npm icon sets.

    python -m bench.reconstruction --folders emoji/openmoji --packages @iconify-json/fxemoji@1.2.2 \
        --vaes runs/pocket-unet-4/model/vae --vaes src/sfumato/models/pocket/vae

Prints JSON: for each set the mean PSNR in dB of each VAE, in their order, over at most --pictures of its pictures,
evenly spread over their names. Icons are drawn as `bench/pocket_data.py` draws them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor

from bench.pocket_data import Source, fetch, render
from bench.real import check_least, print_report
from bench.style_runs import to_tensors
from sfumato import cli
from sfumato.data import open_image
from sfumato.data.preparation.latents import to_float
from sfumato.errors import ConfigError, DataError
from sfumato.models.folder import load_vae

_ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Reconstruct pictures and measure what is lost."""

    folders: tuple[Path, ...] = ()
    """Folders of pictures, of folders of them, too; each is one set. What is not square is cut to its middle."""
    packages: tuple[str, ...] = ()
    """Icon sets of npm, NAME@VERSION with an icons.json; each is one set."""
    vaes: tuple[Path, ...] = (Path("src/sfumato/models/pocket/vae"),)
    """Folders of AutoencoderKL."""
    pictures: int = 150
    """The most of one set."""
    size: int = 64
    """Width and height, in pixels."""
    npm: Path = Path(".cache/npm")
    """Folder of the fetched packages."""
    out: Path | None = None
    """File that receives the JSON besides."""


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    if not config.folders and not config.packages:
        raise ConfigError("nothing to reconstruct; give --folders or --packages.")
    check_least(config, "size", "pictures")
    names = names_of(config.folders)
    vaes = [read_vae(path) for path in config.vaes]
    for path, vae in zip(config.vaes, vaes, strict=True):
        if config.size % (factor := 2 ** (len(vae.config.block_out_channels) - 1)):
            raise ConfigError(f"--size {config.size}: {path} takes multiples of {factor} px; give one.")
    return {
        "vaes": [str(path) for path in config.vaes],
        "sets": {
            name: {"pictures": len(pixels), "psnr_db": [round(psnr(vae, pixels), 2) for vae in vaes]}
            for name, pixels in sets(config, names)
        },
    }


def read_vae(path: Path) -> AutoencoderKL:
    """A folder's VAE, fp32. Raises BaseModelError for a folder of something else."""
    shell = load_vae(path, torch.float32)
    shell.read()
    vae: AutoencoderKL = shell.model.eval()
    return vae


def names_of(folders: Sequence[Path]) -> list[str]:
    """What each set is called: its folder's name, or where another folder has that name, too, its whole path."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else folder.as_posix() for name, folder in zip(names, folders, strict=True)]


def sets(config: Config, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Each set's name and pictures, (n, 3, size, size) uint8. Raises DataError for an empty folder."""
    for called, folder in zip(names, config.folders, strict=True):
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS)
        if not files:
            raise DataError(f"{folder} holds no picture; give --folders folders of .png, .jpg or .webp.")
        side = (config.size, config.size)
        opened = (open_image(path, any_ratio=True) for path in spread(files, config.pictures))
        yield called, to_tensors(ImageOps.fit(picture, side) for picture in opened)
    for package in config.packages:
        name, _, version = package.rpartition("@")
        if not name:
            raise ConfigError(f"--packages {package}: wanted NAME@VERSION, such as @iconify-json/fxemoji@1.2.2.")
        icons = fetch(Source(name, version, "not asked for"), config.npm)
        chosen = spread(sorted(icons["icons"]), config.pictures)
        drawn = [Image.open(io.BytesIO(render(icons, icon, config.size))) for icon in chosen]
        yield name, to_tensors(drawn)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly."""
    return [items[place * len(items) // most] for place in range(most)] if len(items) > most else list(items)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over the pictures, in dB."""
    each = []
    for chunk in to_float(pixels).split(64):
        drawn = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1)
        each.append(-10 * ((drawn - chunk) / 2).square().mean((1, 2, 3)).log10())
    return float(torch.cat(each).mean())


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.reconstruction")


if __name__ == "__main__":
    cli.run(main)
