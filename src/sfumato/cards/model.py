"""The card of a whole model, or of the difference from its base: as the adapter's, with what loads these instead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cards.adapter import (
    before_after_sheet,
    call_options,
    code,
    example_of,
    generate_line,
    inputs_line,
    most_telling_prompt,
    opening,
    readers,
    training_table,
    trigger_section,
)
from sfumato.files.atomic import write_text
from sfumato.numerals import pluralize

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.files import Description

_SHOWN = (
    *("method", "steps", "batch", "learning_rate", "schedule"),
    *("prior", "prior_weight", "min_snr", "seed", "resolution"),
)


def write_model_card(
    folder: Path, made: Path, about: Description, prompts: Sequence[str], rows: Sequence[Sequence[Image]]
) -> Path:
    """Write README.md and its pictures into `folder`; returns the card's path.

    made: the diffusers folder, or the safetensors of the difference. rows: as for `sfumato.cards.adapter.write_card`.
    """
    example = prompts[most_telling_prompt(about.trigger, prompts)] if prompts else example_of(about)
    whole = made.suffix != ".safetensors"
    what = (
        f"{code(about.base)} ({about.family}) fine-tuned"
        if whole
        else f"The change of a fine-tune of {code(about.base)}"
    )
    sheet = before_after_sheet(folder, prompts, rows)
    before_after = f"\n## Before and after\n{sheet}" if sheet else ""
    # Of the trainers of whole models one alone binds a subject, to the name of its class.
    is_subject = "class_name" in (about.config or {})
    how = " with DreamBooth" if is_subject else ""
    images = pluralize(about.images or 0, "image") + ("" if is_subject else " and their captions")
    text = f"""{opening(folder, about, prompts, rows, tags=["dreambooth"] if is_subject else [])}
{what}{how} on {images}.
{before_after}
## Trigger words

{trigger_section(about, prompts)}

## Use

{_use_folder(made, example, about) if whole else _use_difference(made, example, about)}
{training_table(about, _SHOWN)}"""
    path = folder / "README.md"
    write_text(path, text)
    return path


def _use_folder(made: Path, example: str, about: Description) -> str:
    # Unasked, transformers reads text encoders in the dtype of their files and diffusers the U-Net in fp32, and the two
    # do not go together.
    half = {"fp16": "float16", "bf16": "bfloat16"}.get(str((about.config or {}).get("save_precision")))
    before, dtype = ("import torch\n", f", torch_dtype=torch.{half}") if half else ("", "")
    before += "from diffusers import DiffusionPipeline\n\n"
    return f"""With [diffusers](https://github.com/huggingface/diffusers):

```python
{before}pipe = DiffusionPipeline.from_pretrained("{made.name}"{dtype})
{inputs_line(about)}image = pipe({example!r}{call_options(about)}).images[0]
```

With sfumato: {code(generate_line(example, made.name, about, "clip_skip", "max_tokens"))}
"""


def _use_difference(made: Path, example: str, about: Description) -> str:
    read = (
        "ComfyUI, AUTOMATIC1111, Forge and InvokeAI read the file as it is, AUTOMATIC1111 without the U-Net's last "
        "norm; diffusers and sd-scripts read none of it."
    )
    if (about.config or {}).get("train_text_encoder"):
        read += " Of the text encoders' norms InvokeAI alone reads all."
    return f"""With sfumato, at any weight and beside other adapters:
{code(generate_line(example, about.base, about, lora=made.name))}

{readers(about, read)}
"""
