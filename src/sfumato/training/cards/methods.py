"""The model card of an adapter that draws in few steps: a README.md beside its file, in the form the hub shows.

The card of a whole model, or of the difference from its base: as the adapter's, with what loads these instead.

The model card of a slider: a README.md beside its file, in the form the Hugging Face hub shows.

The model card of new words: a README.md beside their files, in the form the Hugging Face hub shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.training.cards.adapter import (
    CLIENTS,
    base_options,
    before_after_sheet,
    call_options,
    code,
    example_of,
    generate_line,
    inputs_line,
    is_plain_lora,
    most_telling_prompt,
    opening,
    pipeline_lines,
    readers,
    readers_of,
    title_of,
    training_table,
    trigger_section,
    with_diffusers,
)
from sfumato.utils.atomic import atomic_path, write_text
from sfumato.utils.formatting import pluralize, quote_argument
from sfumato.utils.image_grid import contact_sheet
from sfumato.utils.schedulers import SAMPLERS

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.files import Description
    from sfumato.files.metadata import Sampling


_SHOWN_OF_FAST = (
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

{training_table(about, _SHOWN_OF_FAST)}"""
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


_SHOWN_OF_MODEL = (
    *("method", "steps", "batch", "learning_rate", "schedule"),
    *("prior", "prior_weight", "min_snr", "seed", "resolution"),
)


def write_model_card(
    folder: Path, made: Path, about: Description, prompts: Sequence[str], rows: Sequence[Sequence[Image]]
) -> Path:
    """Write README.md and its pictures into `folder`; returns the card's path.

    made: the diffusers folder, or the safetensors of the difference. rows: as for
    `sfumato.training.cards.adapter.write_card`.
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
{training_table(about, _SHOWN_OF_MODEL)}"""
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


_SHOWN_OF_SLIDER = (
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
        f"sfumato grid --base {quote_argument(about.base)}{base_options(about)} --lora "
        f"{quote_argument(adapter.name)} "
        f"--x {quote_argument(f'{adapter.stem}=-1,-0.5,0,0.5,1')} --y "
        f"{quote_argument(f'prompt={example}')} --output weights"
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

{training_table(about, _SHOWN_OF_SLIDER)}"""
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


_SHOWN_OF_WORDS = (
    "vectors",
    "initial_words",
    "start",
    "templates",
    "steps",
    "batch",
    "learning_rate",
    "schedule",
    "min_snr",
)


def write_embedding_card(
    folder: Path,
    files: Mapping[str, Path],
    about: Description,
    nearest: Sequence[str],
    prompts: Sequence[str],
    rows: Sequence[Sequence[Image]],
) -> Path:
    """Write README.md and its pictures into `folder`; returns the card's path.

    files: by placeholder. nearest: a line a vector, which words of the base it is like. rows: sample pictures, one row
    a point in time, one picture a prompt; the first row and the last are shown.
    """
    listed = "\n".join(f"- {code(token)} in {code(path.name)}" for token, path in files.items())
    report = "\n".join(f"    {line}" for line in nearest)
    what = f"{len(files)} words" if len(files) > 1 else "A word"
    example = example_of(about, next(iter(files)), prompts)
    line = generate_line(example, about.base, about, words=[path.name for path in files.values()])
    base = code(about.base)
    text = f"""{opening(folder, about, prompts, rows, tags=["textual_inversion"])}
{what} for {base} ({about.family}), learned from {pluralize(about.images or 0, "image")} by Textual Inversion:

{listed}
{before_after_sheet(folder, prompts, rows)}
## Use

With sfumato: {code(line)}

{_use(files, about, pipeline_lines(about))}
## What was learned

The base's own words nearest to each vector, by cosine:

{report}

{training_table(about, (*_SHOWN_OF_WORDS, "seed", "resolution"))}"""
    path = folder / "README.md"
    write_text(path, text)
    return path


def add_words_section(card: Path, files: Mapping[str, Path], about: Description, *, inside: Path | None) -> None:
    """Say in an adapter's card which new words belong to it, and how they are used. inside: the adapter's file, if they
    are bundled with it."""
    listed = "\n".join(
        f"- {code(token)}" + ("" if inside else f" in {code(path.name)}") for token, path in files.items()
    )
    if inside:
        found = readers(
            about,
            "AUTOMATIC1111 finds them there, too. ComfyUI wants a copy of the file among its embeddings: "
            f"{code(f'embedding:{inside.stem}')} in a prompt is all words of the file. Forge draws without them.",
        )
        use = (
            f"They are inside the adapter's file, where `sfumato generate` finds them. {found} "
            "diffusers refuses a file with words in it; train without `--bundle` for that. In Python, with sfumato:\n\n"
            "```python\n"
            "from sfumato import Adapter, compose, embedding\n"
            f"{pipeline_lines(about)}\n"
            f'mix = compose(pipe, Adapter("{inside.name}"))\n'
            "with embedding.bundled(pipe, mix.embeddings):\n"
            f'    image = pipe("a {next(iter(files))}"{call_options(about)}).images[0]\n'
            "```\n"
        )
    else:
        use = _use(files, about, "")  # on the pipeline that has the adapter
    text = card.read_text(encoding="utf-8")
    write_text(card, f"{text}\n## New words\n\nLearned together with the adapter:\n\n{listed}\n\n{use}")


def _use(files: Mapping[str, Path], about: Description, pipeline: str) -> str:
    """pipeline: lines of Python that make `pipe`."""
    token, path = next(iter(files.items()))
    drawn = f'image = pipe("a {token}"{call_options(about)}).images[0]'
    if about.family == "sdxl":
        lines = f"""from safetensors.torch import load_file
{pipeline}
vectors = load_file("{path.name}")
pipe.load_textual_inversion(
    vectors["clip_l"], token="{token}", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
)
pipe.load_textual_inversion(
    vectors["clip_g"], token="{token}", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
)
# SDXL's config names an end of text by which transformers would take the word for it.
pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id"""
    else:
        lines = f'{pipeline}pipe.load_textual_inversion("{path.name}")'
    named = (
        "Other programs know a word by its file's name, which you may change to one that nobody writes: "
        f"{code(path.stem)} in AUTOMATIC1111 and Forge, {code(f'embedding:{path.stem}')} in ComfyUI"
    )
    if about.family == "sdxl":  # in other families' files InvokeAI takes the number of vectors for their width
        named += f", {code(f'<{path.stem}>')} in InvokeAI"
    return f"""With [diffusers](https://github.com/huggingface/diffusers):

```python
{lines}
{drawn}
```

With sfumato in Python, on a pipeline or on its own base, and out again without a trace:

```python
from sfumato import embedding

with embedding.load(pipe, "{path.name}"):
    {drawn}
```

{readers(about, named + ".")}
"""
