"""A picture's settings as the command that draws it again: of A1111, Forge and whoever writes as they do, ComfyUI's
plain graphs, InvokeAI, and our own.

Importing this loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from sfumato.adapters.blocks import Blocks
from sfumato.adapters.weights import without_suffix
from sfumato.errors import AdapterError, ConfigError, DataError
from sfumato.generation.image_options import UPSCALER, Hires
from sfumato.generation.metadata import png_info
from sfumato.generation.metadata.other_tools import read_graph, read_invoke
from sfumato.generation.metadata.png_info import Parameters, read_picture_info
from sfumato.models.prompts.syntax import Syntax
from sfumato.utils import schedulers
from sfumato.utils.formatting import format_number, join_command, option_flag

_WHOLE = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:e[+-]?[0-9]{1,3})?")
_NUMBERS = {"Steps": ("--steps", _WHOLE), "CFG scale": ("--guidance", _NUMBER), "Seed": ("--seed", _WHOLE)}
_TOLD = ("Model hash", "VAE hash", "Lora hashes", "TI hashes", "Version", "Prompt syntax")
"""What says which files were meant, or by whom the picture is, and sets nothing."""
_LEAST_SDXL = 600_000
"""Pixels of a picture from which on it is of SDXL, of which A1111's clip skips 1 and 2 are the same. SD 1.x and 2.x are
drawn smaller, and "Size" is that before the high-resolution fix."""
_LEFT = ("regions", "sweep", "before_after", "density", "rank")
"""What our own pictures hold and the command does not."""
_OPTIONS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "precision": ("fp32", "fp16", "bf16"),
        "quantize": ("int8", "nf4"),
        "prediction_type": ("epsilon", "v_prediction"),
        "zero_terminal_snr": (True,),
        "max_tokens": (75, 150, 225),
        "partial": (True,),
    }
)
"""Options that our own pictures tell of where they were given, with the values that they may have."""
_SHOWN = "\u00a0\u00ad\u200c\u200d"
"""Not printable by Unicode's letter, harmless to a terminal, and part of what people write: blanks and hyphens that
keep a line together, and what joins letters and emoji or keeps them apart."""
_OF_GRID = (
    *("x", "y", "lora", "method", "density", "rank", "embedding", "adapter_weight", "prompt", "prompt_syntax"),
    *("seed", "base", "negative", "steps", "guidance", "adapter_guidance", "sampler", "partial", "clip_skip", "vae"),
    *("prediction_type", "zero_terminal_snr", "max_tokens", "precision", "quantize"),
    *("attention", "size"),
)
"""Settings of a sheet that may come from a picture: where files are written to is not for a stranger to say."""
_NOT_UNDERSTOOD = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
    AdapterError,
)
"""What reading JSON by another hand may raise."""


@dataclass(frozen=True)
class Redraw:
    """words: of the command; the names of files are those that the picture has. left_out: settings without an option
    here, or whose value none has, as (name, value)."""

    file: str
    parameters: Parameters
    words: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """For other programs."""
        about = self.parameters
        return {
            "file": self.file,
            "prompt": about.prompt,
            "negative": about.negative,
            "settings": dict(about.settings),
            "command": list(self.words),
            "left_out": dict(self.left_out),
        }


def redraw(path: Path) -> Redraw:
    """What the picture at `path` says of itself. Raises DataError for one without settings that are read here."""
    info = read_picture_info(path)
    said = info.parameters if info.parameters and info.parameters.settings else None
    for own in (info.own or {}, {}):  # without our JSON where it is by another hand
        with suppress(*_NOT_UNDERSTOOD):
            if about := said or read_graph(info.graph) or read_invoke(info.invoke):
                return _redraw(path.name, about, own)
    raise DataError(
        f"{path.name}: an image without settings as A1111, Forge, InvokeAI and sfumato write them, or a graph of "
        "ComfyUI's with a sampler and a text; others are read in their own programs alone."
    )


def _redraw(file: str, about: Parameters, own: Mapping[str, Any]) -> Redraw:
    left: dict[str, str] = {}
    grid = own.get("grid")
    said = ["sfumato", *(("grid", *_grid_words(grid, left)) if grid else ("generate", *_words(about, own, left)))]
    words = tuple(map(_line, said))
    if any(word != as_said for word, as_said in zip(words, said, strict=True)):
        left["characters"] = "(some that no terminal shows; they are blanks in the command)"
    return Redraw(file, about, words, tuple(left.items()))


def render(found: Redraw) -> str:
    """The settings in lines, and the command."""
    about = found.parameters
    rows = [("file", f"{_line(found.file)}, an image"), ("prompt", _line(about.prompt))]
    rows += [("negative", _line(about.negative))] * bool(about.negative)
    rows += [(_line(name), _line(str(value))) for name, value in about.settings.items()]
    width = max(10, *(len(name) for name, _ in rows))
    lines = [f"{name:<{width}} {value}" for name, value in rows]
    if found.left_out:
        lines += ["", f"not in the command: {', '.join(f'{_line(n)} {_line(v)}' for n, v in found.left_out)}"]
    return "\n".join([*lines, "", "as a command, where its files have these names:", f"  {join_command(found.words)}"])


def _line(text: str) -> str:
    """The text on one line, without what would reach a terminal."""
    return "".join(letter if letter.isprintable() or letter in _SHOWN else " " for letter in text)


def _words(about: Parameters, own: Mapping[str, Any], left: dict[str, str]) -> Iterator[str]:
    """The words after `sfumato generate`. left: what has no option is put there."""
    settings = {name: str(value) for name, value in about.settings.items() if name not in _TOLD}
    is_ours = bool(own) or str(about.settings.get("Version", "")).startswith("sfumato-")
    prompt = own.get("prompt", about.prompt)  # ours is without the adapters' tags and A1111's backslashes
    yield f"--prompts={prompt}" if prompt.startswith("-") else prompt  # which would be read as an option
    negative = own.get("negative", about.negative)
    if negative or own.get("adapters"):  # whose files might ask for another
        yield f"--negative={negative}"
    syntax = own.get("prompt_syntax") or str(about.settings.get("Prompt syntax", "a1111"))
    if syntax not in get_args(Syntax):
        left["Prompt syntax"] = str(syntax)
    elif syntax != "plain":
        yield from ("--prompt-syntax", syntax)
    if model := settings.pop("Model", ""):
        yield from _option("--base", model if is_ours else f"{model.removesuffix('.safetensors')}.safetensors")
    yield from _sampler(settings.pop("Sampler", ""), settings.pop("Schedule type", "Uniform"), left)
    for name, (option, number) in _NUMBERS.items():
        if number.fullmatch(settings.get(name, "")):
            yield from _option(option, settings.pop(name))
    if "VAE" in settings:
        yield from _option("--vae", settings.pop("VAE"))
    size = settings.pop("Size") if re.fullmatch(r"[0-9]{1,5}x[0-9]{1,5}", settings.get("Size", "")) else ""
    if size:
        yield from ("--size", size)
    is_known = is_ours or prod(map(int, size.split("x") if size else ())) < _LEAST_SDXL
    yield from _clip_skip(settings, own.get("clip_skip"), left, is_known=is_known)
    yield from _hires(settings)
    yield from _start(settings, own)
    if (source := settings.pop("RNG", "GPU")) != "CPU":  # a web interface that names none takes a GPU's noise
        left["RNG"] = source
    if own:
        yield from _own_words(own)
        settings.pop("Adapter guidance", None)
    else:
        if is_ours:
            yield from _guidance_of_tags(prompt, settings)
            if "Lora hashes" in about.settings:
                left["Regions, weights by step and turns"] = "(this file does not tell of any)"
        for name, _ in _pairs(str(about.settings.get("TI hashes", ""))):
            file = f"{name.strip('<>')}.safetensors"
            # Where a web interface finds the word by the file's name, our files' own names for it are in the prompt.
            yield from _option("--embedding", file if is_ours else f"{name}={file}")
    left |= settings | {name: str(own[name]) for name in _LEFT if own.get(name)}


def _clip_skip(settings: dict[str, str], told: object, left: dict[str, str], *, is_known: bool) -> Iterator[str]:
    """--clip-skip. told: what our own picture says, as the option counts; A1111 counts the last layer as 1. is_known:
    whether it is not SDXL, or a picture of ours."""
    if not re.fullmatch("[0-9]{1,3}", settings.get("Clip skip", "")):
        return
    layer = settings.pop("Clip skip")
    if int(layer) <= 1:
        return
    skip = str(told if type(told) is int and 0 < told < 100 else int(layer) - 1)
    if is_known:
        yield from ("--clip-skip", skip)
    else:
        left["Clip skip"] = f"{layer} (SDXL has its own layer; for SD 1.x add --clip-skip {skip})"


def _hires(settings: dict[str, str]) -> Iterator[str]:
    """A second pass that enlarges by a factor; one to a size of its own has no option."""
    factor = settings.get("Hires upscale", "")
    try:
        Hires(float(factor) if _NUMBER.fullmatch(factor) else 0)
    except ConfigError:
        return
    yield from _option("--hires", settings.pop("Hires upscale"))
    if _NUMBER.fullmatch(settings.get("Denoising strength", "")):
        yield from _option("--hires-strength", settings.pop("Denoising strength"))
    if _WHOLE.fullmatch(settings.get("Hires steps", "")):
        yield from _option("--hires-steps", settings.pop("Hires steps"))
    if settings.get("Hires upscaler") == UPSCALER:
        settings.pop("Hires upscaler")


def _start(settings: dict[str, str], own: Mapping[str, Any]) -> Iterator[str]:
    """The image that a picture was drawn from; the strength of a high-resolution fix is another."""
    if _NUMBER.fullmatch(settings.get("Denoising strength", "")) and not any(n.startswith("Hires") for n in settings):
        yield from _option("--image", str(own.get("image") or "PICTURE"))
        yield from _option("--mask", str(own["mask"])) if own.get("mask") else ()
        yield from _option("--strength", settings.pop("Denoising strength"))


def _guidance_of_tags(prompt: str, settings: dict[str, str]) -> Iterator[str]:
    """--adapter-guidance of each tag of the prompt, whose file might ask for another. One of an adapter with another
    label stays in the settings."""
    said = dict(_pairs(settings.get("Adapter guidance", "")))
    tags = dict.fromkeys(re.findall(r"<lora:([^:>]+)", prompt))
    if not said.keys() <= tags.keys() or not all(map(_NUMBER.fullmatch, said.values())):
        return
    settings.pop("Adapter guidance", None)
    for label in tags:
        yield from _option("--adapter-guidance", f"{label}={said.get(label, '0')}")


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """The names and values of "a: x, b: y"; names do not hold a comma or colon. Not by a regex, which would read a long
    text without a colon in the square of its length."""
    for part in text.split(","):
        name, colon, value = part.partition(":")
        if colon and name.strip():
            yield name.strip(), value.strip()


def _option(name: str, value: str) -> tuple[str, ...]:
    """The option with its value: as one word where that begins with a dash and would be read as an option itself."""
    return (f"{name}={value}",) if value.startswith("-") else (name, value)


def _grid_words(asked: Mapping[str, Any], left: dict[str, str]) -> Iterator[str]:
    """The options of a sheet, as our own files have them."""
    for name, value in asked.items():
        if name not in _OF_GRID:
            left[name] = str(value)
            continue
        option = option_flag(name)
        if value is True:
            yield option
        for each in () if value is True else value if isinstance(value, list) else [value]:
            yield f"{option}={format_number(each) if isinstance(each, float) else each}"


def _sampler(name: str, schedule: str, left: dict[str, str]) -> Iterator[str]:
    """--sampler, where there is one of that name and schedule."""
    if not name:
        return
    if schedule == "Automatic":
        said = f"{name} {png_info.A1111_KEYS[name]}" if name in png_info.A1111_KEYS else name
    else:
        said = name if schedule == "Uniform" else f"{name} {schedule}"
    try:
        schedulers.find_sampler(said)
    except ConfigError:
        left["Sampler"] = f"{name}, {schedule}"
        return
    yield from ("--sampler", said.lower())


def _own_words(own: Mapping[str, Any]) -> Iterator[str]:
    """Adapters and words as our own pictures have them: each adapter with its label, and what its file might ask for
    otherwise."""
    strengths, ways, switch = own.get("adapter_guidance") or {}, own.get("over_steps") or {}, own.get("switch")
    for adapter in own.get("adapters") or ():
        label, weight = adapter["label"], adapter["weight"]
        blocks = weight if isinstance(weight, dict) else None
        numbers = weight["weight"] if blocks else weight
        said = ":".join(format_number(number) for number in (numbers if isinstance(numbers, list) else [numbers]))
        file = adapter["file"]
        named = file if label == without_suffix(file) else f"{label}={file}"  # of which a = may be a part
        yield from _option("--lora", f"{named}:{said}")
        if blocks:
            yield from _option("--blocks", f"{label}={Blocks(1.0, blocks['blocks'], blocks['rest']).factors_text()}")
        if not own.get("regions"):
            yield from _option("--adapter-guidance", f"{label}={format_number(strengths.get(label, 0.0))}")
        if way := ways.get(label):
            span, points = way.get("span"), way.get("points")
            text = (
                "-".join(map(format_number, span))
                if span
                else ",".join(":".join(map(format_number, point)) for point in points)
            )
            yield from _option("--over-steps", f"{label}={text}")
        elif switch and label not in switch.get("labels", [label]):  # named by a tag, which takes no turn
            yield from _option("--over-steps", f"{label}=0-1")
    if switch:
        yield from _option("--switch", str(int(switch["every"])))
    for name, value in (own.get("options") or {}).items():
        if value in _OPTIONS.get(name, ()):
            yield from (option_flag(name), *([] if value is True else [str(value)]))
    for file in own.get("embeddings") or ():
        yield from _option("--embedding", file)
