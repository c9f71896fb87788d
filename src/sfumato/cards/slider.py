"""The model card of a slider: a README.md beside its file, in the form the Hugging Face hub shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato import shell
from sfumato.cards.adapter import (
    CLIENTS,
    base_options,
    call_options,
    code,
    generate_line,
    opening,
    pipeline_lines,
    readers,
    training_table,
)
from sfumato.cards.kind import is_plain_lora, readers_of, title_of
from sfumato.drawing.sheet import contact_sheet
from sfumato.files.atomic import atomic_path, write_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.files import Description

_SHOWN = (
    *("concept", "more", "less", "strength", "caption", "drawn", "rank", "alpha", "targets"),
    *("steps", "batch", "learning_rate", "schedule", "min_snr", "seed", "resolution"),
)


def write_slider_card(
    folder: Path,
    adapter: Path,
    about: Description,
    prompts: Sequence[str],
    rows: Sequence[tuple[float, Sequence[Image]]],
) -> Path:
    """Write README.md and its images into `folder`; returns the card's path.

    prompts: of the sample images, each once. rows: (weight, an image for each prompt), in the order of the weights;
    none where no samples were generated.
    """
    sheet = ""
    if rows:
        labels = [f"weight {weight:g}" for weight, _ in rows]
        picture = contact_sheet([row for _, row in rows], row_labels=labels, column_labels=list(prompts))
        with atomic_path(folder / "images" / "weights.png") as temporary:
            picture.save(temporary)
        sheet = "\n![the same prompts at several weights](images/weights.png)\n"
    plain = is_plain_lora(about)
    example = prompts[0] if prompts else "a dog"
    gallery = [
        (f"{prompt} ({weight:+g})", image) for weight, row in rows for prompt, image in zip(prompts, row, strict=True)
    ]
    asked = ""
    if about.over_steps:
        asked = (
            ", in the steps from {:g} to {:g} of the way from noise to image, as its file asks. Other programs do not "
            "read that from the file: they use it in all steps"
        ).format(*about.over_steps)
    grid = (
        f"sfumato grid --base {shell.quote(about.base)}{base_options(about)} --lora {shell.quote(adapter.name)} "
        f"--x {shell.quote(f'{adapter.stem}=-1,-0.5,0,0.5,1')} --y {shell.quote(f'prompt={example}')} --output weights"
    )
    tags = ("lora", "template:sd-lora", "slider") if plain else ("lycoris", "slider")
    line = generate_line(example, about.base, about, lora=adapter.name)
    diffusers = _with_diffusers(about, adapter, example) if plain else ""
    text = f"""{opening(folder, about, [text for text, _ in gallery], [[image for _, image in gallery]], tags=tags)}
A {title_of(about)} slider for {code(about.base)} ({about.family}). {_ends(about)}
{sheet}
## Use

No trigger word is needed. Weights from -1 to 1 are usual; larger ones move images further, until they break.

{diffusers}With sfumato: {code(line)}{asked}. At several weights: {code(grid)}

{readers(about, CLIENTS if plain else readers_of(about, adapter.name))}

{training_table(about, _SHOWN)}"""
    path = folder / "README.md"
    write_text(path, text)
    return path


def _ends(about: Description) -> str:
    """What its weight does, in a sentence."""
    config = about.config or {}
    if not config.get("concept"):
        return f"Learned from {about.images} pairs of images: weight 1 moves towards the one, weight -1 to the other."
    less = config.get("less") or ["{concept}"]
    concepts, *ends = (
        ", ".join(code(text) if text else empty for text in texts)
        for texts, empty in ((config["concept"], "everything"), (config["more"], "nothing"), (less, "nothing"))
    )
    where = (
        ", where {concept} is each of these" if any("{concept}" in text for text in (*config["more"], *less)) else ""
    )
    learned = f"Learned on {about.images} images" if about.images else "No image was learned from"
    return f"Weight 1 moves {concepts} towards {ends[0]}, weight -1 towards {ends[1]}{where}. {learned}."


def _with_diffusers(about: Description, adapter: Path, example: str) -> str:
    lines = (
        f'{pipeline_lines(about)}pipe.load_lora_weights("{adapter.name}", adapter_name="slider")\n'
        'pipe.set_adapters("slider", 1.0)  # or any other weight\n'
        f"image = pipe({example!r}{call_options(about, example)}).images[0]"
    )
    return f"With [diffusers](https://github.com/huggingface/diffusers):\n\n```python\n{lines}\n```\n\n"
