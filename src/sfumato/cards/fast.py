"""The model card of an adapter that draws in few steps: a README.md beside its file, in the form the hub shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cards.adapter import (
    CLIENTS,
    before_after_sheet,
    code,
    generate_line,
    opening,
    readers,
    training_table,
    with_diffusers,
)
from sfumato.cards.kind import is_plain_lora, readers_of, title_of
from sfumato.files.atomic import write_text
from sfumato.numerals import pluralize
from sfumato.schedulers import SAMPLERS

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.files import Description
    from sfumato.files.metadata import Sampling

_SHOWN = (
    *("guidance", "solver_steps", "drawn", "caption", "rank", "alpha", "targets"),
    *("steps", "batch", "learning_rate", "schedule", "seed", "resolution"),
)


def write_fast_card(
    folder: Path, adapter: Path, about: Description, prompts: Sequence[str], rows: Sequence[Sequence[Image]]
) -> Path:
    """Write README.md and its images into `folder`; returns the card's path.

    about: with a `sampling`. rows: sample images, one row a point in time, one image a prompt; of several the first is
    the base's in as few steps, the last the finished adapter's.
    """
    assert about.sampling is not None
    plain = is_plain_lora(about)
    example = prompts[-1] if prompts else next(iter(about.captions), "a dog")
    tags = ("lora", "template:sd-lora", "lcm") if plain else ("lycoris", "lcm")
    learned = pluralize(about.images, "image") if about.images else "images that the base model drew"
    line = generate_line(example, about.base, about, lora=adapter.name)
    mixed = line.replace(" --lora ", " --lora style.safetensors:1 --lora ", 1)
    of_base = f"{code(about.base)} ({about.family})"
    text = f"""{opening(folder, about, prompts, rows, tags=tags)}
A {title_of(about)} with which {of_base} draws in few steps (latent consistency, LCM).
It was learned from {learned}, and brings no style or subject of its own.
{before_after_sheet(folder, prompts, rows)}
## Use

No trigger word is needed. Draw in {about.sampling}: guidance is learned, and more of it counts twice.

{with_diffusers(about, adapter, [], example)}With sfumato, which follows the file where no option does: {code(line)}

With a style of the same base model: {code(mixed)}

{readers(about, _clients(about.sampling, CLIENTS if plain else readers_of(about, adapter.name)))}

{training_table(about, _SHOWN)}"""
    path = folder / "README.md"
    write_text(path, text)
    return path


def _clients(sampling: Sampling, readers: str) -> str:
    """Which other programs read the file, and what to set there."""
    label, steps = SAMPLERS[sampling.sampler].label, pluralize(sampling.steps, "step")
    return (
        f"{readers} They do not read from it how it is drawn with. In ComfyUI set the KSampler to sampler "
        f"{code(sampling.sampler)}, scheduler `sgm_uniform`, {steps} and cfg {sampling.guidance:g}; in AUTOMATIC1111 "
        f"and Forge choose the sampling method {label}, {steps} and a CFG scale of {sampling.guidance:g}."
    )
