"""The file of a drawn picture: the pixels and how they came about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sfumato
from sfumato import pnginfo
from sfumato.compose.adapter import Weight
from sfumato.compose.blocks import Blocks
from sfumato.files.metadata import short_hash

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.bases import Base
    from sfumato.compose import Mix


def save_drawn(
    picture: Image, file: Path, mix: Mix, settings: Mapping[str, Any], sampler: tuple[str, str | None]
) -> None:
    """Write the picture with its settings as A1111 has them, and beside them as our own JSON, which loses nothing.

    settings: prompt, negative, seed, steps, guidance, width, height, base, vae, clip_skip, strength and what else there
    is. sampler: A1111's "Sampler" and "Schedule type".
    """
    hashes = {Path(adapter.path).stem: short_hash(adapter.path) for adapter in mix.adapters.values()}
    tags = [_tag(Path(adapter.path).stem, mix.weights[label]) for label, adapter in mix.adapters.items()]
    pairs = {
        "Steps": settings["steps"],
        "Sampler": sampler[0],
        "Schedule type": sampler[1],
        "CFG scale": f"{settings['guidance']:g}",
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["base"],
        "VAE": settings["vae"],
        "Denoising strength": settings.get("strength"),
        "Clip skip": settings["clip_skip"] + 1 if settings["clip_skip"] else None,  # A1111 counts the last layer as 1
        "Lora hashes": pnginfo.lora_hashes(hashes) if hashes else None,
        "Version": f"sfumato-{sfumato.__version__}",
    }
    adapters = [
        {"label": label, "file": path.name, "hash": hashes[path.stem], "weight": _plain(mix.weights[label])}
        for label, path in ((label, Path(adapter.path)) for label, adapter in mix.adapters.items())
    ]
    parameters = pnginfo.Parameters(" ".join([settings["prompt"], *tags]), settings["negative"], pairs)
    own = {**settings, "sampler": " ".join(filter(None, sampler)), "adapters": adapters, "version": sfumato.__version__}
    pnginfo.save_picture(picture, file, parameters, own)


def _tag(name: str, weight: Weight) -> str:
    """<lora:name:0.8>, or with two weights <lora:name:text:unet>, the order A1111 reads."""
    if isinstance(weight, Blocks):
        weight = weight.weight  # the tag has no form for blocks that all its readers know
    if not isinstance(weight, tuple):
        return pnginfo.lora_tag(name, weight)
    return f"<lora:{pnginfo.plain_name(name)}:{weight[1]:g}:{weight[0]:g}>"


def _plain(weight: Weight) -> Any:
    """The weight as JSON has it."""
    if not isinstance(weight, Blocks):
        return weight
    return {"weight": weight.weight, "blocks": dict(weight.factors), "rest": weight.rest}


def sampler_label(name: str | None, base: Base) -> tuple[str, str | None]:
    """A1111's "Sampler" and "Schedule type" of the sampler of this name, the base's own for None."""
    from sfumato import schedulers

    if name is None:
        return schedulers.label(base.pipeline().scheduler)
    sampler = schedulers.find(name)
    return sampler.label, sampler.schedule
