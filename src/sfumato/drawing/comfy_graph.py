"""The graph that ComfyUI writes into its pictures, as the settings that A1111 would have written: of a plain chain of
checkpoint, LoRAs, texts and one sampler. Imports no torch."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.drawing.pnginfo import Parameters, Value, plain_name
from sfumato.json_text import object_of
from sfumato.numerals import exact
from sfumato.prompts.comfy_weights import in_a1111

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
    graph = object_of(text)
    samplers = [inputs for inputs in map(_inputs, graph.values()) if "sampler_name" in inputs and "positive" in inputs]
    if not samplers:
        return None
    first = next((each for each in samplers if each.get("denoise", 1) == 1), samplers[0])
    first = {name: _value(graph, name, value) if name in _TAKEN else value for name, value in first.items()}
    prompt, negative = (_said(graph, first.get(side), side) for side in ("positive", "negative"))
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
    return in_a1111(re.sub(r"\b(?:AND|BREAK)\b", lambda word: word[0].lower(), text))


def _tag(inputs: Mapping[str, Any]) -> str:
    name = plain_name(_stem(inputs["lora_name"]))
    unet = inputs.get("strength_model", 1)
    numbers = [number for number in (inputs.get("strength_clip", unet), unet) if isinstance(number, int | float)]
    return f"<lora:{':'.join([name, *map(exact, numbers)])}>"


def _stem(name: str) -> str:
    return re.sub(r"\.(safetensors|pt|bin|ckpt)$", "", re.split(r"[\\/]", str(name))[-1])


def _inputs(node: Any) -> Mapping[str, Any]:
    found = node.get("inputs") if isinstance(node, dict) else None
    return found if isinstance(found, dict) else {}


def _value(graph: Graph, name: str, value: Any) -> Any:
    """The value, that of the node which gives it where it is a link."""
    return _first(graph, value, (name, "value", "seed", "number")) if isinstance(value, list) else value


def _said(graph: Graph, link: Any, side: str) -> Any:
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
