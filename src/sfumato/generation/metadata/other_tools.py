"""The graph that ComfyUI writes into its pictures, as the settings that A1111 would have written: of a plain chain of
checkpoint, LoRAs, texts and one sampler. Imports no torch.

The text `invokeai_metadata` that InvokeAI writes into its pictures, before version 3 `sd-metadata`, as the settings
that A1111 would have written. Imports no torch.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.generation.metadata.png_info import Parameters, Value, infotext_name, lora_tag
from sfumato.models.prompts.syntax import comfy_to_a1111
from sfumato.utils.formatting import format_number
from sfumato.utils.text_files import parse_json_object

Graph = Mapping[str, Any]
_SAMPLERS = {"dpm_2": "DPM2", "dpm_2_ancestral": "DPM2 a", "uni_pc": "UniPC"}
"""ComfyUI's names that differ by more than their spelling."""
_TAKEN = ("steps", "sampler_name", "scheduler", "cfg", "seed", "noise_seed", "denoise")
"""A sampler's inputs that are settings, which other nodes may give."""
_EMBEDDING = re.compile(r"\bembedding:((?:[\w.-]+[\\/])*[\w.-]+)")
"""A new word by its file, which may be in folders."""
_SCHEDULES = {"karras": "Karras", "normal": "Uniform"}


def read_graph(text: str) -> Parameters | None:
    """The settings; None where the text is no graph with a sampler and a text that is asked for.

    Adapters are tags in the prompt; "embedding:NAME" is NAME, named in "TI hashes" without a hash.
    """
    graph = parse_json_object(text)
    samplers = [inputs for inputs in map(_inputs, graph.values()) if "sampler_name" in inputs and "positive" in inputs]
    if not samplers:
        return None
    first = next((each for each in samplers if each.get("denoise", 1) == 1), samplers[0])
    first = {name: _value(graph, name, value) if name in _TAKEN else value for name, value in first.items()}
    prompt, negative = (_nearest_text(graph, first.get(side), side) for side in ("positive", "negative"))
    if not isinstance(prompt, str):
        return None
    loras = [each for each in _upstream(graph, first.get("model")) if "lora_name" in each]
    tags = [_tag(each) for each in reversed(loras)]
    words = _EMBEDDING.findall(f"{prompt} {negative}")
    width, height = (_first(graph, first.get("latent_image"), (side,)) for side in ("width", "height"))
    model = _first(graph, first.get("model"), ("ckpt_name",))
    skipped = _first(graph, first.get("positive"), ("stop_at_clip_layer",))
    control = _first(graph, first.get("positive"), ("control_net_name",))
    name = str(first["sampler_name"])
    settings: dict[str, Value | None] = {
        "Steps": first.get("steps"),
        "Sampler": _SAMPLERS.get(name, name),
        "Schedule type": _SCHEDULES.get(str(first.get("scheduler")), str(first.get("scheduler"))),
        "CFG scale": first.get("cfg"),
        "Seed": first.get("seed", first.get("noise_seed")),
        "Size": f"{width}x{height}" if width and height else None,
        "Model": _stem(model) if isinstance(model, str) else None,
        "Clip skip": -skipped if isinstance(skipped, int) and skipped < -1 else None,
        "Denoising strength": first["denoise"] if first.get("denoise", 1) != 1 else None,
        "TI hashes": ", ".join(f"{_stem(word)}:" for word in dict.fromkeys(words)) or None,
        "ControlNet": _stem(control) if control else None,
        "Further samplers": len(samplers) - 1 or None,
        "RNG": "CPU",
    }
    told = {key: value for key, value in settings.items() if isinstance(value, str | int | float)}
    return Parameters(" ".join([_text(prompt), *tags]), _text(negative or ""), told)


def _text(text: str) -> str:
    """A text as A1111 reads it, in which square brackets, AND and BREAK mean something."""
    text = _EMBEDDING.sub(lambda word: _stem(word[1]), text)
    text = re.sub(r"(?<!\\)[\[\]]", r"\\\g<0>", text)
    return comfy_to_a1111(re.sub(r"\b(?:AND|BREAK)\b", lambda word: word[0].lower(), text))


def _tag(inputs: Mapping[str, Any]) -> str:
    name = infotext_name(_stem(inputs["lora_name"]))
    unet = inputs.get("strength_model", 1)
    numbers = [number for number in (inputs.get("strength_clip", unet), unet) if isinstance(number, int | float)]
    return f"<lora:{':'.join([name, *map(format_number, numbers)])}>"


def _stem(name: str) -> str:
    return re.sub(r"\.(safetensors|pt|bin|ckpt)$", "", re.split(r"[\\/]", str(name))[-1])


def _inputs(node: Any) -> Mapping[str, Any]:
    found = node.get("inputs") if isinstance(node, dict) else None
    return found if isinstance(found, dict) else {}


def _value(graph: Graph, name: str, value: Any) -> Any:
    """The value, that of the node which gives it where it is a link."""
    return _first(graph, value, (name, "value", "seed", "number")) if isinstance(value, list) else value


def _nearest_text(graph: Graph, link: Any, side: str) -> Any:
    """The text nearest to the link. side: as of `_upstream`."""
    names = ("text", "text_g", "string", "value")  # the last of PrimitiveString, and of other nodes a number
    inputs = ((name, each[name]) for each in _upstream(graph, link, side) for name in names if name in each)
    found = (value for name, value in inputs if name != "value" or isinstance(value, str))
    return next((value for value in found if not isinstance(value, list)), None)


def _first(graph: Graph, link: Any, names: tuple[str, ...]) -> Any:
    """The value of the first of these inputs that is no link, from the node at the link on upwards."""
    values = (each[name] for each in _upstream(graph, link) for name in names if name in each)
    return next((value for value in values if not isinstance(value, list)), None)


def _upstream(graph: Graph, link: Any, side: str = "") -> Iterator[Mapping[str, Any]]:
    """The inputs of the node at the link, then those of the nodes that feed it, the nearest first.

    side: the input, "positive" or "negative", that is followed alone where a node passes on both texts, as those for
    ControlNets and inpainting models do. Nothing is followed through a node that makes zeros of a text.
    """
    waiting, seen = deque([link]), set()
    while waiting:
        link = waiting.popleft()
        if not isinstance(link, list) or not link or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        node = graph.get(str(link[0]))
        inputs = _inputs(node)
        yield inputs
        if isinstance(inputs.get(side), list):
            waiting.append(inputs[side])
        elif not (side and isinstance(node, dict) and node.get("class_type") == "ConditioningZeroOut"):
            waiting += inputs.values()


_INVOKE_SAMPLERS = {"kdpm_2": "DPM2", "kdpm_2_a": "DPM2 a"}
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
    found = parse_json_object(text)
    if isinstance(image := found.get("image"), dict):
        found = _as_of_today(found, image)
    prompt = found.get("positive_prompt")
    if not isinstance(prompt, str):
        return None
    negative = found.get("negative_prompt") or ""
    loras = found.get("loras")
    tags = [tag for each in (loras if isinstance(loras, list) else ()) if (tag := _invoke_tag(each))]
    words = re.findall(r"<([\w.-]+)>", f"{prompt} {negative}")
    scheduler = str(found.get("scheduler") or "")
    sampler = scheduler.removesuffix("_k")
    width, height, skipped = (found.get(name) for name in ("width", "height", "clip_skip"))
    mode, model = str(found.get("generation_mode") or "txt2img"), found.get("model")
    family = (model.get("base") or model.get("base_model")) if isinstance(model, dict) else None
    is_listed = isinstance(found.get("cfg_scale"), list)
    settings: dict[str, Value | None] = {
        "Steps": found.get("steps"),
        "Sampler": _INVOKE_SAMPLERS.get(sampler, sampler) or None,
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


def _invoke_tag(lora: Any) -> str:
    """The tag of an adapter; empty for what is none."""
    if not isinstance(lora, dict) or not isinstance(weight := lora.get("weight", 1), int | float):
        return ""
    name = _name(lora.get("model") or lora.get("lora"))
    return lora_tag(name, float(weight)) if name else ""


def _name(model: Any) -> str | None:
    """A model's name, in the spelling of today or of versions before 4."""
    name = (model.get("name") or model.get("model_name")) if isinstance(model, dict) else None
    return name if isinstance(name, str) else None
