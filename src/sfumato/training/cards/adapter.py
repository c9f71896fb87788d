"""The model card: a README.md beside the adapter, in the form the Hugging Face hub shows.

YAML head, gallery, trigger words, how to use it, and the training in a table; written through huggingface_hub.

What a card says of the kind of an adapter: its name, and which programs read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sfumato.files.keys import KIND_KEYS, kind_named
from sfumato.models.family import FAMILIES
from sfumato.models.prompts.syntax import has_phrase, negative_for
from sfumato.utils.atomic import atomic_path, write_text
from sfumato.utils.formatting import pluralize, quote_argument
from sfumato.utils.schedulers import SAMPLERS

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.files import Description


def is_plain_lora(about: Description) -> bool:
    """Whether it is a LoRA without magnitudes, which all programs read."""
    config = about.config or {}
    return config.get("algo", "lora") == "lora" and not config.get("dora")


def title_of(about: Description) -> str:
    """Its name, as in "A LoKr with weight decomposition (DoRA) for ..."."""
    config = about.config or {}
    title = kind_named(config.get("algo", "lora"))
    return f"{title} with weight decomposition (DoRA)" if config.get("dora") else title


def readers_of(about: Description, file: str) -> str:
    """Which other programs read a file that is no plain LoRA, and what to do for those that do not."""
    config = about.config or {}
    algo, dora = config.get("algo", "lora"), bool(config.get("dora"))
    if KIND_KEYS[kind_named(algo)].module is not None:
        return (
            "It changes no weight, so other programs have no place for it, and no LoRA is equal to it: mix it here, "
            "with `sfumato generate --lora` or `sfumato.compose`."
        )
    diffusers = "draws with the LoRA alone, without its lengths" if algo == "lora" else "refuses it"
    first, invoke = "ComfyUI, AUTOMATIC1111, Forge and InvokeAI", ""
    if dora and algo != "lora":  # InvokeAI takes whatever has lengths for a LoRA
        first, invoke = "ComfyUI, AUTOMATIC1111 and Forge", ", InvokeAI refuses it"
    elif algo == "lokr" and about.family != "sdxl":  # it looks for the text's width in a whole factor
        first, invoke = (
            "ComfyUI, AUTOMATIC1111 and Forge",
            ", InvokeAI recognises it only if its large factors are whole",
        )
    elif algo == "oft":
        first = "ComfyUI (which counts any weight but 1 twice) and AUTOMATIC1111"
        invoke = ", Forge leaves it out, InvokeAI refuses it"
    base = quote_argument(about.base)
    baked = (
        f"sfumato convert {quote_argument(file)} --bake lora --keep-energy 0.99 --base {base} --output NAME.safetensors"
    )
    return (
        f"{first} read the file as it is. diffusers {diffusers}{invoke}, and sd-scripts does not know the kind: for "
        f"these `{baked}` writes a LoRA."
    )


def write_card(
    folder: Path, adapter: Path, about: Description, prompts: Sequence[str], rows: Sequence[Sequence[Image]]
) -> Path:
    """Write README.md and its pictures into `folder`; returns the card's path.

    rows: sample pictures, one row a point in time, one picture a prompt; of several the first is the base, the last
    the finished adapter, and the card shows both.
    """
    strength = about.adapter_guidance
    guided = f", under the adapter guidance {strength:g} that its file asks for" if strength else ""
    if about.over_steps:
        guided += ", in the steps from {:g} to {:g} of the way from noise to image, as its file asks".format(
            *about.over_steps
        )
    if guided:
        guided += ". Diffusers and other programs do not read that from the file: they draw without it"
    shown_with = prompts[most_telling_prompt(about.trigger, prompts)] if prompts else example_of(about)
    example = shown_with or next(iter(about.captions), "")
    words = word_files(about, adapter)
    line = generate_line(example, about.base, about, lora=adapter.name, words=words)
    config = about.config or {}
    of_preferences = "beta" in config
    shown = [
        *("method", "rank", "alpha"),
        # Of a LoRA that was extracted they say nothing: it is of all weights that changed.
        *(["targets"] if config.get("method") != "full" else []),
        *(["conv_rank", "conv_alpha"] if config.get("conv_rank") is not None else []),
        *(["beta"] if of_preferences else []),
        *("steps", "batch", "learning_rate", "schedule", "min_snr", "seed", "resolution"),
    ]
    learned = pluralize(about.images or 0, *(("pair of images", "pairs of images") if of_preferences else ("image",)))
    before_after = ""
    if len(rows) > 1:
        for name, row in (("before", rows[0]), ("after", rows[-1])):
            with atomic_path(folder / "images" / f"{name}.png") as temporary:
                _strip(row).save(temporary)
        before_after = "\n## Before and after\n\n![before](images/before.png)\n\n![after](images/after.png)\n"
    plain = is_plain_lora(about)
    clients = (_BUNDLED if _is_bundled(about) else CLIENTS) if plain else readers_of(about, adapter.name)
    tags = ("lora", "template:sd-lora") if plain else ("lycoris",)
    text = f"""{opening(folder, about, prompts, rows, tags=tags)}
A {title_of(about)} for {code(about.base)} ({about.family}), learned from {learned}.
{before_after}
## Trigger words

{trigger_section(about, prompts)}
{_negatives(about)}
## Use

{with_diffusers(about, adapter, words, example)}With sfumato: {code(line)}{guided}

{readers(about, clients)}

{training_table(about, shown)}"""
    path = folder / "README.md"
    write_text(path, text)
    return path


def opening(
    folder: Path,
    about: Description,
    prompts: Sequence[str],
    rows: Sequence[Sequence[Image]],
    *,
    tags: Sequence[str],
) -> str:
    """Head, title and gallery of a card, whose pictures, those of the last row, are written into `folder`.

    tags: beside those of all cards.
    """
    from huggingface_hub import ModelCardData

    pictures = []
    for number, (prompt, picture) in enumerate(zip(prompts, rows[-1] if rows else [], strict=False)):
        with atomic_path(folder / "images" / f"image_{number}.png") as temporary:
            picture.save(temporary)
        pictures.append({"text": prompt, "output": {"url": f"images/image_{number}.png"}})
    head = ModelCardData(
        library_name="diffusers",
        base_model=about.base if _is_on_hub(about) else None,  # the hub refuses a card with any other name
        license=about.license or None,
        instance_prompt=instance_prompt(about),
        tags=["text-to-image", "diffusers", *tags, "sfumato"],
        widget=pictures or None,
    )
    return f"---\n{head.to_yaml()}\n---\n\n# {about.title}\n\n<Gallery />\n"


def before_after_sheet(folder: Path, prompts: Sequence[str], rows: Sequence[Sequence[Image]]) -> str:
    """The line that shows the first row above the last, whose sheet is written into `folder`; empty without both."""
    from sfumato.utils.image_grid import contact_sheet

    if len(rows) < 2:
        return ""
    sheet = contact_sheet([rows[0], rows[-1]], row_labels=["before", "after"], column_labels=list(prompts))
    with atomic_path(folder / "images" / "before_after.png") as temporary:
        sheet.save(temporary)
    return "\n![before and after](images/before_after.png)\n"


CLIENTS = "ComfyUI, AUTOMATIC1111, Forge, InvokeAI and sd-scripts read the file as it is."
_BUNDLED = "AUTOMATIC1111 reads the file as it is; what others make of the words in it is told below."


def readers(about: Description, otherwise: str) -> str:
    """The line on other programs: `otherwise`, but for what was learned on pocket."""
    return otherwise if about.family != "pocket" else "Other programs do not know bases of the family pocket."


def _is_on_hub(about: Description) -> bool:
    return "/" in about.base  # of folders and files here it is the last part of the path


def pipeline_lines(about: Description) -> str:
    """Lines of Python that make `pipe` of the base, or say what it is where a card cannot know the place."""
    if about.base == "pocket":
        return 'from sfumato import load_base\n\npipe = load_base("pocket").pipeline()\n'
    if _is_on_hub(about):
        kind = "AutoPipelineForInpainting" if about.inpaints else "DiffusionPipeline"
        made = f'from diffusers import {kind}\n\npipe = {kind}.from_pretrained("{about.base}")\n'
    else:
        made = f"# pipe: a diffusers pipeline of {about.base}\n"
    return made + inputs_line(about)


def inputs_line(about: Description) -> str:
    """A line on what an inpainting model's pipeline is called with."""
    return "# image, mask: PIL images of one size; what is white in the mask is drawn\n" if about.inpaints else ""


def _is_bundled(about: Description) -> bool:
    config = about.config or {}
    return bool(config.get("bundle") and config.get("train_words"))


def word_files(about: Description, adapter: Path) -> list[str]:
    """The files of the new words that were learned beside the adapter; none where they are within it."""
    from sfumato.adapters.embeddings.tokens import embedding_files

    tokens = (about.config or {}).get("train_words") or ()
    found = {} if _is_bundled(about) else embedding_files(Path(), adapter.stem, tokens, alone=False)
    return [file.name for file in found.values()]


def with_diffusers(about: Description, adapter: Path, words: Sequence[str], example: str) -> str:
    """How diffusers draws with it; nothing for a file with words in it or of another kind, which diffusers refuses."""
    if _is_bundled(about) or not is_plain_lora(about):
        return ""
    loading = [f'pipe.load_lora_weights("{adapter.name}")']
    if about.sampling is not None:
        kind = SAMPLERS[about.sampling.sampler].class_name
        loading += [f"from diffusers import {kind}", f"pipe.scheduler = {kind}.from_config(pipe.scheduler.config)"]
    if about.family == "sdxl" and words:
        loading.append("# and the words, as told below")
    else:
        loading += [f'pipe.load_textual_inversion("{name}")' for name in words]
    code = pipeline_lines(about) + "\n".join(
        [*loading, f"image = pipe({example!r}{call_options(about, example)}).images[0]"]
    )
    return f"With [diffusers](https://github.com/huggingface/diffusers):\n\n```python\n{code}\n```\n\n"


def call_options(about: Description, prompt: str = "") -> str:
    """What a call of diffusers must be told: the negative prompt that the file asks for beside this one, the size that
    was learned, where it is not the base's, the layers of the text encoder that were skipped while it was learned, and
    on pocket the steps and the guidance, of which diffusers takes too much by itself."""
    negative, skipped = negative_for(prompt, about.negatives), (about.config or {}).get("clip_skip")
    given: dict[str, Any] = {"negative_prompt": repr(negative)} if negative else {}
    given |= {"image": "image", "mask_image": "mask"} if about.inpaints else {}
    given |= dict(zip(("width", "height"), about.drawn_at or (), strict=False))
    given |= {"clip_skip": skipped} if skipped else {}
    if about.sampling is not None:
        given |= {"num_inference_steps": about.sampling.steps, "guidance_scale": about.sampling.guidance}
    elif about.family == "pocket":
        usual = FAMILIES["pocket"].defaults
        given |= {"num_inference_steps": usual.sampling_steps, "guidance_scale": usual.guidance}
    return "".join(f", {name}={value}" for name, value in given.items())


def instance_prompt(about: Description) -> str | None:
    """What the hub tells everybody to write: the trigger, where there is one alone."""
    return about.trigger[0] if len(about.trigger) == 1 else None


def most_telling_prompt(triggers: Sequence[str], prompts: Sequence[str]) -> int:
    """The place of the sample prompt that tells most of what was learned: the last that holds a trigger, since
    the prompts after the captions ask for things that were not shown; the last of all where none does."""
    with_trigger = (place for place, text in enumerate(prompts) if any(has_phrase(each, text) for each in triggers))
    return max(with_trigger, default=len(prompts) - 1)


def example_of(about: Description, trigger: str | None = None, prompts: Sequence[str] = ()) -> str:
    """A prompt or caption with the trigger, the first if unset; the trigger alone where none has it."""
    trigger = trigger or next(iter(about.trigger), "")
    return next((text for text in (*prompts, *about.captions) if has_phrase(trigger, text)), trigger)


def code(text: str) -> str:
    """The text as code within a line of Markdown, whatever stands in it: between more backticks than follow each other
    there."""
    text = " ".join(text.split("\n"))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def trigger_section(about: Description, prompts: Sequence[str]) -> str:
    """What the card says of them. Several are of several sources or words, so each has a line and an example."""
    if not about.trigger:
        if not (said := next(iter(about.captions), "")):
            return "None was named."
        if set(about.captions) == {said}:
            return f"None was named; all captions were {code(said)}, so write that in the prompt."
        return f"None was named; the captions are such as {code(said)}."
    if len(about.trigger) == 1:
        return f"Write {code(about.trigger[0])} in the prompt."
    lines = (f"- {code(each)}, as in {code(example_of(about, each, prompts))}" for each in about.trigger)
    return "\n".join(["Each calls up what its own images showed:\n", *lines])


def _negatives(about: Description) -> str:
    """What the file asks for as the negative prompt, as people read it."""
    if not about.negatives:
        return ""
    shown = " or ".join(map(code, about.negatives))
    return (
        f"\nWhere a prompt says more than that, give {shown} as the negative prompt, as `sfumato generate` does by "
        "itself: guidance then multiplies what is said beside the subject, such as a style.\n"
    )


def generate_line(
    prompt: str, base: str, about: Description, *options: str, lora: str = "", words: Sequence[str] = ()
) -> str:
    """`sfumato generate`, as a shell reads it. options: as for `base_options`. words: files of new words."""
    size = " --size {}x{}".format(*about.drawn_at) if about.drawn_at else ""
    drawn = f"{quote_argument(prompt)} --base {quote_argument(base)}{base_options(about, *options)}"
    adapter = f" --lora {quote_argument(f'{lora}:1.0')}" if lora else ""
    adapter += "".join(f" --embedding {quote_argument(name)}" for name in words)
    return f"sfumato generate {drawn}{size}{adapter}"


def base_options(about: Description, *names: str) -> str:
    """What `sfumato generate` must be told, to draw with the base as it was while it was learned on. names: by default
    all that a base may be loaded with."""
    config = about.config or {}
    given = {name: config.get(name) for name in names or ("prediction_type", "clip_skip", "max_tokens", "vae")}
    shown = {name.replace("_", "-"): quote_argument(str(value)) for name, value in given.items() if value is not None}
    ends = " --zero-terminal-snr" if not names and config.get("zero_terminal_snr") else ""
    return "".join(f" --{name} {value}" for name, value in shown.items()) + ends


_USUAL: Mapping[str, Any] = MappingProxyType(
    {
        "learn": "plain", "optimizer": "adamw", "optimizer_args": [], "accumulate": 1, "dropout": 0.0,
        "rank_dropout": 0.0, "module_dropout": 0.0, "rank_stabilised": False, "rank_of": [], "rate_of": [],
        "train_text_encoder": False, "text_learning_rate": None, "noise_offset": 0.0, "pyramid_noise": 0.0,
        "input_perturbation": 0.0, "huber": 0.0, "min_timestep": 0, "max_timestep": None, "crossed_share": 0.0,
        "ema": 0.0, "clip_skip": None, "max_tokens": None, "algo": "lora", "dora": False, "factor": None,
        "max_norm": 0.0, "conv": False, "weight_decay": 0.01, "schedule": "cosine", "cycles": 1, "warmup": 0,
        "clip": 1.0, "debiased": False, "prior_prompts": [], "loraplus_ratio": 1.0,
        "zero_terminal_snr": False, "caption_dropout": 0.0, "shuffle_tags": False, "keep_tags": 0, "tag_dropout": 0.0,
        "caption_lines": False, "wildcards": False, "flip": False, "crop": "center", "mask": "none",
        "validation_split": 0.0, "prior_weight": 1.0, "init_from": None, "train_words": [], "initial_words": [],
        "word_vectors": None, "word_learning_rate": None, "words_first": 0, "keep_scale": True, "drift_limit": None,
        "keep_energy": None, "quantize": None, "inpaint_whole_share": None, "inpainting": False,
    }
)  # fmt: skip
"""Settings that a card tells only where they are not so."""


def training_table(about: Description, shown: Sequence[str]) -> str:
    """The section of a card that says what it was trained with: `shown`, the settings that the config has of these, and
    then what of `_USUAL` is not so."""
    config = dict(about.config or {})
    shown = [*shown, *(name for name, usual in _USUAL.items() if config.get(name, usual) != usual)]
    if about.steps is not None and "steps" in config:
        config["steps"] = about.steps  # those that were made, of a run that stopped before its end
    values = {name: str(config[name]).replace("|", r"\|") for name in shown if name in config}
    table = "\n".join(f"| {name} | {value} |" for name, value in values.items())
    images = "" if about.images is None else f"| images | {about.images} |\n"
    images += f"| data set sha256 | `{about.dataset_sha256}` |\n" if about.dataset_sha256 else ""
    return f"""## Training

| setting | value |
|---|---|
{table}
{images}"""


def _strip(row: Sequence[Image]) -> Image:
    from PIL import Image as Images

    strip = Images.new("RGB", (sum(p.width for p in row), max(p.height for p in row)), "white")
    left = 0
    for picture in row:
        strip.paste(picture, (left, 0))
        left += picture.width
    return strip
