"""The text `invokeai_metadata` that InvokeAI writes into its pictures, before version 3 `sd-metadata`, as the settings
that A1111 would have written. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.drawing.pnginfo import Parameters, Value, lora_tag
from sfumato.json_text import object_of

_SAMPLERS = {"kdpm_2": "DPM2", "kdpm_2_a": "DPM2 a"}
"""InvokeAI's names that differ by more than their spelling; with "_k" behind them the schedule is Karras'."""
_OLD_SAMPLERS = {"k_dpmpp_2": "dpmpp_2m", "dpmpp_2": "dpmpp_2s"}
"""Names before version 3, where they say something else than ours; as InvokeAI's import_images.py has them."""
_FAMILIES = ("sd-1", "sd-2", "sdxl")
_PLAIN_MODES = ("txt2img", "img2img")
_FURTHER = {
    "positive_style_prompt": "Style prompt",
    "negative_style_prompt": "Negative style prompt",
    "cfg_rescale_multiplier": "CFG rescale",
    "seamless_x": "Seamless x",
    "seamless_y": "Seamless y",
    "hrf_enabled": "High resolution fix",
    "refiner_model": "Refiner",
    "controlnets": "ControlNets",
    "t2iAdapters": "T2I adapters",
    "ipAdapters": "IP adapters",
    "ref_images": "Reference images",
    "regions": "Regions",
    "further_prompts": "Further prompts",
    "perlin": "Perlin noise",
    "threshold": "Threshold",
    "hires_fix": "High resolution fix",
    "seamless": "Seamless",
    "variations": "Variations",
    "upscale": "Upscale",
    "facetool_strength": "Face restoration",
    "postprocessing": "Postprocessing",
}
"""What changes the picture and has no option here, where it is set."""


def read_invoke(text: str) -> Parameters | None:
    """The settings; None where the text is no object with a prompt.

    Adapters are tags behind the prompt, whose syntax is compel's; new words are named in "TI hashes" without a hash.
    """
    found = object_of(text)
    if isinstance(image := found.get("image"), dict):
        found = _as_of_today(found, image)
    prompt = found.get("positive_prompt")
    if not isinstance(prompt, str):
        return None
    negative = found.get("negative_prompt") or ""
    loras = found.get("loras")
    tags = [tag for each in (loras if isinstance(loras, list) else ()) if (tag := _tag(each))]
    words = re.findall(r"<([\w.-]+)>", f"{prompt} {negative}")
    scheduler = str(found.get("scheduler") or "")
    sampler = scheduler.removesuffix("_k")
    width, height, skipped = (found.get(name) for name in ("width", "height", "clip_skip"))
    mode, model = str(found.get("generation_mode") or "txt2img"), found.get("model")
    family = (model.get("base") or model.get("base_model")) if isinstance(model, dict) else None
    is_listed = isinstance(found.get("cfg_scale"), list)
    settings: dict[str, Value | None] = {
        "Steps": found.get("steps"),
        "Sampler": _SAMPLERS.get(sampler, sampler) or None,
        "Schedule type": ("Karras" if sampler != scheduler else "Uniform") if sampler else None,
        "CFG scale": found.get("cfg_scale"),
        "CFG scale by step": str(found["cfg_scale"]) if is_listed else None,
        "Seed": found.get("seed"),
        "Size": f"{width}x{height}" if width and height else None,
        "Model": _name(model),
        "Model family": None if family in _FAMILIES else family,
        "VAE": _name(found.get("vae")),
        # A1111 counts the last layer as 1.
        "Clip skip": skipped + 1 if isinstance(skipped, int) and skipped > 0 else None,
        "Denoising strength": None if mode.endswith("txt2img") else found.get("strength"),
        "Mode": None if mode.removeprefix("sdxl_") in _PLAIN_MODES else mode,
        "TI hashes": ", ".join(f"<{word}>:" for word in dict.fromkeys(words)) or None,
        "RNG": "CPU" if found.get("rand_device", "cpu") == "cpu" else "GPU",
        "Prompt syntax": "compel",
        **dict(_further(found)),
    }
    told = {key: value for key, value in settings.items() if isinstance(value, str | int | float)}
    return Parameters(" ".join([prompt, *tags]), negative if isinstance(negative, str) else "", told)


def _as_of_today(found: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, Any]:
    """What versions before 3 wrote, under the names of today. What a prompt has in brackets is its negative, and the
    noise was the GPU's."""
    said = image.get("prompt")
    each = [part.get("prompt") for part in said if isinstance(part, dict)] if isinstance(said, list) else [said]
    texts = [text for text in each if isinstance(text, str)]
    first = texts[0] if texts else ""
    sampler = str(image.get("sampler") or "")
    return {
        **image,
        "positive_prompt": re.sub(r"\[[^\[\]]+\]", "", first).strip() if texts else None,
        "negative_prompt": " ".join(re.findall(r"\[([^\[\]]+)\]", first)),
        "further_prompts": texts[1:],
        "scheduler": _OLD_SAMPLERS.get(sampler, sampler),
        "generation_mode": image.get("type"),
        "strength": image.get("strength") or image.get("strength_steps"),
        "rand_device": "cuda",
        "model": {"name": found.get("model_weights") or found.get("model_id")},
    }


def _further(found: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    same = (found.get("positive_prompt"), found.get("negative_prompt"))
    for key, label in _FURTHER.items():
        value = found.get(key)
        if not value or (isinstance(value, str) and value in same):
            continue
        if isinstance(value, list):
            yield label, len(value)
        else:
            yield label, value if isinstance(value, str | int | float) else _name(value) or "yes"


def _tag(lora: Any) -> str:
    """The tag of an adapter; empty for what is none."""
    if not isinstance(lora, dict) or not isinstance(weight := lora.get("weight", 1), int | float):
        return ""
    name = _name(lora.get("model") or lora.get("lora"))
    return lora_tag(name, float(weight)) if name else ""


def _name(model: Any) -> str | None:
    """A model's name, in the spelling of today or of versions before 4."""
    name = (model.get("name") or model.get("model_name")) if isinstance(model, dict) else None
    return name if isinstance(name, str) else None
