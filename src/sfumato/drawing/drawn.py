"""The file of a drawn picture: the pixels and how they came about."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sfumato
from sfumato.data.checksums import file_digest
from sfumato.drawing import pnginfo
from sfumato.files.inspect import plain
from sfumato.files.metadata import words_beside
from sfumato.merging.sources import adapter_hash
from sfumato.merging.whole_model import is_whole_model
from sfumato.numerals import exact
from sfumato.precision import NAMES
from sfumato.prompts.syntax import escaped, unescaped
from sfumato.weighting.adapter import Adapter, Weight, is_idle, public_name, without_suffix
from sfumato.weighting.blocks import Blocks
from sfumato.words.placeholders import holds

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.bases import Base
    from sfumato.compose import Mix
    from sfumato.prompts.syntax import Syntax


def used_in(mix: Mix) -> tuple[Adapter, ...]:
    """The adapters of a mix with the weights they have now."""
    return tuple(Adapter(adapter.path, mix.weights[label], label) for label, adapter in mix.adapters.items())


def of_base(base: Base, vae: str | None) -> dict[str, Any]:
    """What a picture's settings say of its base. vae: as it was named; of a path, which is private, its last part."""
    return {
        "base": base.name,
        "clip_skip": base.clip_skip,
        "vae": None if vae is None else re.split(r"[\\/]", vae.rstrip("\\/"))[-1],
        "prediction_type": base.prediction_type,
        "precision": NAMES[base.precision.compute],
    }


def learned_otherwise(told: Mapping[str, Mapping[str, str]], base: Base) -> list[str]:
    """A line on each adapter that was learned on another release of the base or one which predicts otherwise, or with
    another --clip-skip, or beside a word that is not loaded. told: the files' metadata, by label."""
    lines = []
    loaded = {token.lower() for words in getattr(base.tokenizers[0], "_sfumato_words", ()) for token in words.tokens}
    for label, metadata in told.items():
        if base.is_another_release(metadata):
            lines.append(
                f"{label}: learned on another release of {base.name}; on this one it draws something else. Train it "
                "anew."
            )
        kind = {"v": "v_prediction"}.get(found := metadata.get("modelspec.prediction_type", ""), found)
        if kind in ("epsilon", "v_prediction") and kind != base.prediction_type:
            lines.append(
                f"{label}: learned where the base predicts {kind}, and this one predicts {base.prediction_type}; "
                f"--prediction-type {kind} draws as it was learned."
            )
        config = _config_in(metadata)
        skipped = config.get("clip_skip") or 0
        is_trainers = config.keys() & {"clip_skip", "steps"}  # not that of a merge, which knows nothing of it
        if is_trainers and skipped != (base.clip_skip or 0):
            told_skip = plain(str(skipped))
            lines.append(f"{label}: learned with --clip-skip {told_skip}, and drawn with {base.clip_skip or 0}.")
        for word, file in words_beside(metadata).items():
            if word.lower() not in loaded:
                named = f"its file, {plain(file)}," if file else "its file"
                lines.append(f"{label}: its word {plain(word)} is not loaded; name {named} with --embedding.")
    return lines


def unguided(pictures: Iterable[tuple[float, str, bool]]) -> list[str]:
    """A line on what counts for nothing in a picture without guidance. pictures: of each the guidance, the negative
    prompt and whether an adapter guidance is asked for."""
    alone = [each for each in pictures if each[0] <= 1]
    asked = ["the negative prompt"] * any(negative for _, negative, _ in alone)
    asked += ["--adapter-guidance"] * any(is_asked for _, _, is_asked in alone)
    if not asked:
        return []
    counts = "counts" if len(asked) == 1 else "count"
    return [f"guidance {alone[0][0]:g}: {' and '.join(asked)} {counts} for nothing; it takes one above 1."]


def unused_words(files: Sequence[tuple[Path, Iterable[str]]], prompts: Sequence[str], syntax: Syntax) -> list[str]:
    """A line on each word that no prompt holds. files: with the words of each; prompts: negative ones, too."""
    said = [unescaped(text, syntax) for text in prompts]
    return [
        f"{file.name}: its word {plain(token)} is in no prompt."
        for file, tokens in files
        for token in tokens
        if not any(holds(token, text) for text in said)
    ]


def misread_words(known: Iterable[str], prompts: Sequence[str], syntax: Syntax) -> list[str]:
    """A line on each of the new words in use of which A1111's syntax takes the brackets in a prompt for its own."""
    return [
        f"{plain(token)}: --prompt-syntax a1111 takes its brackets for emphasis; write {plain(escaped(token))} for the "
        "word."
        for token in known
        if syntax == "a1111" and escaped(token) != token and any(holds(token, text) for text in prompts)
    ]


# Numbers and {red|blue} fit in one way alone: fitting in several, a long prompt would take minutes.
_NUMBER = r":\s*(?:\d+(?:\.\d+)?|\.\d+)\s*"
_MARKS = re.compile(rf"\([^()]*[^()\d]{_NUMBER}\)|\[[^\[\]]*{_NUMBER}\]|\(\([^()]*\)\)|\\[()\[\]]|\bBREAK\b", re.DOTALL)
"""What A1111 and ComfyUI do not take for words: weights, times, brackets by which they are marked, BREAK."""
_WILDCARDS = re.compile(r"\{[^{}|]*\|[^{}]*\}|__[\w/*-]+?__")
"""Of A1111's dynamic prompts, InvokeAI's and ComfyUI's: {red|blue}, __animals__."""


def unread_marks(prompts: Sequence[str], syntax: Syntax) -> list[str]:
    """A line on the first of what other programs would not draw as words, where prompts are plain; one on ComfyUI's
    `embedding:NAME` in any syntax."""
    lines = []
    marks = [found[0] for text in prompts if (found := _MARKS.search(text))] if syntax == "plain" else []
    if marks:
        lines.append(f"{marks[0]} is drawn as letters: prompts are plain unless --prompt-syntax a1111 is given.")
    if wild := [found[0] for text in prompts if (found := _WILDCARDS.search(text))]:
        lines.append(
            f"{wild[0]} is drawn as letters: there are no wildcards. Give each prompt by itself, or draw them with "
            "sfumato grid --x 'prompt=red crab|blue crab'."
        )
    if named := [found[0] for text in prompts if (found := re.search(r"\bembedding:[\w.-]+", text))]:
        lines.append(
            f"{named[0]} is drawn as letters: write the new word itself, such as <otter>, and name its file with "
            "--embedding."
        )
    return lines


def changes_nothing(mix: Mix) -> list[str]:
    """A line on each adapter that draws as the base does, whatever its weight."""
    return [
        f"{label}: all of its changes are zero, so it draws as the base does; it was not trained, or saved in a format "
        "that is too coarse for it."
        for label in mix.without_effect
    ]


def unknown_words(prompts: Sequence[str], known: Iterable[str], base: Base) -> list[str]:
    """A line on each "<word>" of the prompts, as textual inversions are spelt, that no file brings.

    known: the new words in use. Those of the base's own vocabulary are no new ones.
    """
    found = dict.fromkeys(word for text in prompts for word in re.findall(r"<[^\s<>:|]+>", text))
    spelt = [word for word in found if re.search(r"\w", word)]
    own = base.tokenizers[0].get_vocab() if spelt else {}  # a large table, for which the tokenizer takes its time
    return [
        f"{plain(word)}: no file brings this word, so its letters are read one by one; name its file with --embedding."
        for word in spelt
        if word not in own and not any(holds(token, word) for token in known)
    ]


def _config_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The program's config in our own file's metadata; nothing in a file that has none."""
    try:
        found = json.loads(metadata.get("sfumato.config", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def save_drawn(
    picture: Image,
    used: Sequence[Adapter],
    settings: Mapping[str, Any],
    file: Path,
    sampler: tuple[str, str | None],
    words: Sequence[tuple[Path, Iterable[str]]] = (),
) -> None:
    """Write the picture with its settings as A1111 has them, and beside them as our own JSON, which loses nothing.

    used: the adapters with their weights; those at 0 are in our JSON alone. settings: prompt, negative, seed, steps,
    guidance, adapter_guidance by label, width, height, base, vae, clip_skip, strength and what else there is. sampler:
    A1111's "Sampler" and "Schedule type". words: files of new words and what they are called, of which the hashes are
    told that the prompts hold.
    """
    # Other programs know whole models as bases alone, and have no tag for a share of one.
    named = [each for each in used if not is_idle(each.weight) and not is_whole_model(each.path)]
    # What is merged by another method than the sum, tags would draw otherwise.
    tagged = named if settings.get("method") in (None, "linear") else ()
    tags = [_tag(_stem(public_name(adapter.path)), adapter.weight) for adapter in tagged]
    read = escaped if settings.get("prompt_syntax", "plain") == "plain" else str
    pairs = _pairs(settings, sampler, used, named, words)
    parameters = pnginfo.Parameters(" ".join([read(settings["prompt"]), *tags]), read(settings["negative"]), pairs)
    adapters = [described(adapter) for adapter in used]
    own = {**settings, "sampler": " ".join(filter(None, sampler)), "adapters": adapters, "version": sfumato.__version__}
    pnginfo.save_picture(picture, file, parameters, own)


def _pairs(
    settings: Mapping[str, Any],
    sampler: tuple[str, str | None],
    used: Sequence[Adapter],
    named: Sequence[Adapter],
    words: Sequence[tuple[Path, Iterable[str]]],
) -> dict[str, Any]:
    """The settings under A1111's names. named: the adapters that other programs know; the rest as of `save_drawn`."""
    syntax, regions = settings.get("prompt_syntax", "plain"), settings.get("regions", ())
    inside = [each for region in regions for each in region["adapters"] if each["weight"]]
    texts = [settings["prompt"], settings["negative"], *settings.get("prompts", ())]
    texts += [region["prompt"] or "" for region in regions]
    held = _held(words, [unescaped(text, syntax) for text in texts])
    idle = {adapter.label for adapter in used if is_idle(adapter.weight)}
    strengths = ", ".join(
        f"{label}: {exact(strength)}" for label, strength in settings["adapter_guidance"].items() if label not in idle
    )
    return {
        "Steps": settings["steps"],
        "Sampler": sampler[0],
        "Schedule type": sampler[1] or ("Uniform" if sampler[0] in pnginfo.AUTOMATIC else None),
        "CFG scale": float(settings["guidance"]),
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["base"],
        "VAE": settings["vae"],
        "Denoising strength": settings.get("strength"),
        "Clip skip": settings["clip_skip"] + 1 if settings["clip_skip"] else None,  # A1111 counts the last layer as 1
        "Merge method": settings.get("method"),
        "Adapter guidance": strengths or None,
        "Lora hashes": _hashes((_stem(each["file"]), each["hash"]) for each in [*map(described, named), *inside]),
        "TI hashes": _hashes((_stem(public_name(path)), file_digest(path)) for path in held),
        "RNG": "CPU",  # where our noise comes from; A1111 takes a GPU's where a picture names none
        "Prompt syntax": syntax if syntax == "compel" else None,  # which A1111 has no way to write
        "Version": f"sfumato-{sfumato.__version__}",
    }


def described(adapter: Adapter) -> dict[str, Any]:
    """An adapter as JSON has it."""
    name, digest = public_name(adapter.path), adapter_hash(Path(adapter.path))
    return {"label": adapter.label, "file": name, "hash": digest, "weight": _plain(adapter.weight)}


def _held(words: Sequence[tuple[Path, Iterable[str]]], texts: Sequence[str]) -> list[Path]:
    """The files with a word that any of the texts holds."""
    return [path for path, tokens in words if any(holds(token, text) for token in tokens for text in texts)]


def _hashes(named: Iterable[tuple[str, str]]) -> str | None:
    """The value of "Lora hashes" and "TI hashes"; of two files of one name, which one is not told."""
    found: dict[str, str | None] = {}
    for name, digest in named:
        found[name] = digest if found.get(name, digest) == digest else None
    return pnginfo.short_hashes({name: digest for name, digest in found.items() if digest}) or None


def _stem(public: str) -> str:
    """The public name of a file or folder as other programs call an adapter or word: without the suffix; the
    repository's where the file has the name that diffusers' trainers give to all of theirs."""
    parts = public.split("/")
    is_usual = len(parts) == 3 and parts[2] in ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors")
    return parts[1] if is_usual else without_suffix(parts[-1])


def _tag(name: str, weight: Weight) -> str:
    """<lora:name:0.8>, with two weights <lora:name:text:unet>, the order A1111 reads, by block <lora:name:0.8:lbw=...>,
    as its extension for them reads it."""
    if isinstance(weight, Blocks):
        return f"{_tag(name, weight.weight)[:-1]}:lbw={weight.factors_text()}>"
    if not isinstance(weight, tuple):
        return pnginfo.lora_tag(name, weight)
    return f"<lora:{pnginfo.plain_name(name)}:{exact(weight[1])}:{exact(weight[0])}>"


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
