"""The model card of new words: a README.md beside their files, in the form the Hugging Face hub shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cards.adapter import (
    before_after_sheet,
    call_options,
    code,
    example_of,
    generate_line,
    opening,
    pipeline_lines,
    readers,
    training_table,
)
from sfumato.files.atomic import write_text
from sfumato.numerals import pluralize

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.files import Description

_SHOWN = ("vectors", "initial_words", "start", "templates", "steps", "batch", "learning_rate", "schedule", "min_snr")


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

{training_table(about, (*_SHOWN, "seed", "resolution"))}"""
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
