"""The file of a drawn picture: the pixels and how they came about."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sfumato
from sfumato.adapters.blocks import Blocks
from sfumato.adapters.embeddings.tokens import contains_placeholder
from sfumato.adapters.weights import Adapter, Weight, is_zero_weight, public_name, without_suffix
from sfumato.data.checksums import file_digest
from sfumato.generation.image_options import UPSCALER
from sfumato.generation.metadata import png_info
from sfumato.merging.sources import adapter_hash
from sfumato.merging.whole_model import is_whole_model
from sfumato.models.prompts.syntax import escape_emphasis, unescape_emphasis
from sfumato.precision import NAMES
from sfumato.utils.formatting import format_number

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.compose import Mix
    from sfumato.models import Base


def adapters_in_use(mix: Mix) -> tuple[Adapter, ...]:
    """The adapters of a mix with the weights they have now."""
    return tuple(Adapter(adapter.path, mix.weights[label], label) for label, adapter in mix.adapters.items())


def base_settings(base: Base, vae: str | None) -> dict[str, Any]:
    """What a picture's settings say of its base. vae: as it was named; of a path, which is private, its last part."""
    return {
        "base": base.name,
        "family": base.family.name,
        "clip_skip": base.clip_skip,
        "vae": None if vae is None else re.split(r"[\\/]", vae.rstrip("\\/"))[-1],
        "prediction_type": base.prediction_type,
        "precision": NAMES[base.precision.compute],
    }


def save_with_settings(
    picture: Image,
    used: Sequence[Adapter],
    settings: Mapping[str, Any],
    file: Path,
    sampler: tuple[str, str | None],
    words: Sequence[tuple[Path, Iterable[str]]] = (),
) -> None:
    """Write the picture with its settings as A1111 has them, and beside them as our own JSON, which loses nothing.

    used: the adapters with their weights; those at 0 are in our JSON alone. settings: prompt, negative, seed, steps,
    guidance, adapter_guidance by label, width, height, base, vae, clip_skip, strength, hires and what else there is.
    sampler: A1111's "Sampler" and "Schedule type". words: files of new words and what they are called, of which the
    hashes are told that the prompts hold.
    """
    # Other programs know whole models as bases alone, and have no tag for a share of one.
    named = [each for each in used if not is_zero_weight(each.weight) and not is_whole_model(each.path)]
    # What is merged by another method than the sum, tags would draw otherwise.
    tagged = named if settings.get("method") in (None, "linear") else ()
    tags = [_tag(_stem(public_name(adapter.path)), adapter.weight) for adapter in tagged]
    read = escape_emphasis if settings.get("prompt_syntax", "plain") == "plain" else str
    pairs = _pairs(settings, sampler, used, named, words)
    parameters = png_info.Parameters(" ".join([read(settings["prompt"]), *tags]), read(settings["negative"]), pairs)
    adapters = [adapter_settings(adapter) for adapter in used]
    own = {**settings, "sampler": " ".join(filter(None, sampler)), "adapters": adapters, "version": sfumato.__version__}
    png_info.save_picture(picture, file, parameters, own)


def _clip_skip(settings: Mapping[str, Any]) -> int | None:
    """As A1111 counts it: the last layer is 1, and SDXL's own 2."""
    skipped = settings["clip_skip"]
    return skipped + (2 if settings.get("family") == "sdxl" else 1) if skipped else None


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
    held = _used_word_files(words, [unescape_emphasis(text, syntax) for text in texts])
    idle = {adapter.label for adapter in used if is_zero_weight(adapter.weight)}
    strengths = ", ".join(
        f"{label}: {format_number(strength)}"
        for label, strength in settings["adapter_guidance"].items()
        if label not in idle
    )
    return {
        "Steps": settings["steps"],
        "Sampler": sampler[0],
        "Schedule type": sampler[1] or ("Uniform" if sampler[0] in png_info.A1111_KEYS else None),
        "CFG scale": float(settings["guidance"]),
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["base"],
        "VAE": settings["vae"],
        "Denoising strength": settings.get("strength"),
        **_hires_pairs(settings.get("hires")),
        "Clip skip": _clip_skip(settings),
        "Merge method": settings.get("method"),
        "Adapter guidance": strengths or None,
        "Lora hashes": _hashes(
            (_stem(each["file"]), each["hash"]) for each in [*map(adapter_settings, named), *inside]
        ),
        "TI hashes": _hashes((_stem(public_name(path)), file_digest(path)) for path in held),
        "RNG": "CPU",  # where our noise comes from; A1111 takes a GPU's where a picture names none
        "Prompt syntax": syntax if syntax == "compel" else None,  # which A1111 has no way to write
        "Version": f"sfumato-{sfumato.__version__}",
    }


def _hires_pairs(hires: Mapping[str, Any] | None) -> dict[str, Any]:
    """A second pass, as A1111 tells it."""
    if hires is None:
        return {}
    return {
        "Denoising strength": hires["strength"],
        "Hires upscale": hires["scale"],
        "Hires steps": hires["steps"],
        "Hires upscaler": UPSCALER,
    }


def adapter_settings(adapter: Adapter) -> dict[str, Any]:
    """An adapter as JSON has it."""
    name, digest = public_name(adapter.path), adapter_hash(Path(adapter.path))
    return {"label": adapter.label, "file": name, "hash": digest, "weight": _plain(adapter.weight)}


def _used_word_files(words: Sequence[tuple[Path, Iterable[str]]], texts: Sequence[str]) -> list[Path]:
    """The files with a word that any of the texts holds."""
    return [
        path for path, tokens in words if any(contains_placeholder(token, text) for token in tokens for text in texts)
    ]


def _hashes(named: Iterable[tuple[str, str]]) -> str | None:
    """The value of "Lora hashes" and "TI hashes"; of two files of one name, which one is not told."""
    found: dict[str, str | None] = {}
    for name, digest in named:
        found[name] = digest if found.get(name, digest) == digest else None
    return png_info.short_hashes({name: digest for name, digest in found.items() if digest}) or None


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
        return png_info.lora_tag(name, weight)
    return f"<lora:{png_info.infotext_name(name)}:{format_number(weight[1])}:{format_number(weight[0])}>"


def _plain(weight: Weight) -> Any:
    """The weight as JSON has it."""
    if not isinstance(weight, Blocks):
        return weight
    return {"weight": weight.weight, "blocks": dict(weight.factors), "rest": weight.rest}


def sampler_label(name: str | None, base: Base) -> tuple[str, str | None]:
    """A1111's "Sampler" and "Schedule type" of the sampler of this name, the base's own for None."""
    from sfumato.utils import schedulers

    if name is None:
        return schedulers.scheduler_label(base.pipeline().scheduler)
    sampler = schedulers.find_sampler(name)
    return sampler.label, sampler.schedule
