"""Draw pictures with any base and any mix of adapters; the settings are inside each picture."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from sfumato.cli import run
from sfumato.compose.adapter import Adapter, Weight, checked_weight
from sfumato.compose.blocks import Blocks
from sfumato.config import parse
from sfumato.errors import AdapterError, ConfigError
from sfumato.prompts import Tagged, split_tags
from sfumato.specs import find_adapter, parse_adapter

if TYPE_CHECKING:
    from sfumato.bases import Base
    from sfumato.compose import Mix
    from sfumato.drawing import Start


@dataclass(frozen=True)
class Config:
    """Draw pictures with any base and any mix of adapters; the settings are inside each PNG.

    Example: sfumato generate "a crab" --lora line.safetensors:0.8 --lora otter.safetensors:0.6 --seed 7 -o crab.png
    """

    prompts: tuple[str, ...] = ()
    """What to draw; several prompts give several pictures. <lora:name:0.8> in one adds an adapter for it alone."""
    _: KW_ONLY
    lora: tuple[str, ...] = ()
    """FILE:0.8, an adapter and its weight; FILE:0.8:0.4 for U-Net and text encoders; LABEL=FILE:0.8. Repeat to mix."""
    blocks: tuple[str, ...] = ()
    """LABEL=down:0,up.1:1.2, factors on an adapter's weight by block; or a preset of B-LoRA (b-lora-style,
    b-lora-content), or a block-weight list of the web interfaces. Repeat for several adapters."""
    lora_folder: Path = Path(".")
    """Where the adapters of <lora:...> tags are, at any depth."""
    base: str = "pocket"
    """`pocket`, a hub id, a diffusers folder or a .safetensors checkpoint."""
    seed: tuple[int, ...] = (0,)
    """Where the noise comes from; every prompt is drawn with every seed. Repeat it for several."""
    count: int = 1
    """Pictures from each seed on: the seeds 7, 8 and 9 for --seed 7 --count 3."""
    output: Annotated[Path, Parameter(alias="-o")] = Path("pictures")
    """A .png (or .jpg, .webp) for one picture or one sheet, a folder for several."""
    overwrite: bool = False
    """Replace pictures that exist; otherwise they are an error before anything is drawn."""
    prompts_file: Path | None = None
    """A text file with a prompt a line; empty lines and lines that begin with # are left out."""
    sweep: str | None = None
    """LABEL=0,0.5,1: a sheet with a row for each weight of that adapter and a column for each prompt and seed."""
    embedding: tuple[str, ...] = ()
    """FILE or TOKEN=FILE, a textual inversion: a new word that prompts may use. Repeat for several."""
    image: Path | None = None
    """A picture to begin from instead of noise (img2img)."""
    strength: float = 0.6
    """How much of --image is drawn anew, above 0 to 1."""
    mask: Path | None = None
    """A picture that is white where --image is to be drawn anew; the rest stays to the pixel (inpainting)."""
    prompt_syntax: Literal["plain", "a1111", "compel"] = "plain"
    """Weighted words and prompts of any length: a1111 reads (words:1.3), compel reads (words)1.3 (extra `prompts`)."""
    negative: str = ""
    """What the pictures should not show."""
    steps: int | None = None
    """Steps of the sampler; the family's default if unset."""
    guidance: float | None = None
    """How strongly the prompt is followed (CFG scale); the family's default if unset."""
    size: str | None = None
    """Pixels, WIDTHxHEIGHT or one number for a square; what the base was trained on if unset."""
    sampler: str | None = None
    """ddim, euler, euler a, dpm++ 2m, dpm++ 2m karras, unipc, heun, lms, pndm, ...; the family's default if unset."""
    partial: bool = False
    """Apply what fits of an adapter of which a part does not fit."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """What the weights are computed in."""
    device: str = "auto"
    """`auto`, `cuda`, `cuda:1`, `mps` or `cpu`."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Which attention computes; xformers is an extra."""
    clip_skip: int | None = None
    """Layers of the text encoder to leave out, from its end (A1111 counts one more)."""
    vae: str | None = None
    """A folder, hub id or file whose VAE replaces the base's."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base predicts, where its file does not say."""


@dataclass(frozen=True)
class Plan:
    """What a config asks for, checked before anything heavy is loaded.

    pictures: (prompt, seed) of each, prompts without their tags. tagged: the adapters' weights for each picture whose
    prompt has tags, by label, else None. embeddings: (token, file) of new words. size: (width, height) in pixels or
    unset. files: one for each picture, or the sheet's alone. sweep: (label, weights).
    """

    pictures: tuple[tuple[str, int], ...]
    tagged: tuple[dict[str, Weight] | None, ...]
    adapters: tuple[Adapter, ...]
    embeddings: tuple[tuple[str | None, Path], ...]
    size: tuple[int, int] | None
    files: tuple[Path, ...]
    sweep: tuple[str, tuple[float, ...]] | None


def plan(config: Config) -> Plan:
    """The pictures, adapters and files that the config asks for. Raises ConfigError, one line, for what cannot be."""
    prompts = [*config.prompts, *_prompts_in(config.prompts_file)]
    if not prompts:
        raise ConfigError('there is no prompt; say what to draw: sfumato generate "a crab" -o crab.png')
    for name in ("count", "steps"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value}: wanted at least 1.")
    if config.guidance is not None and not 0 <= config.guidance <= 100:
        raise ConfigError(f"--guidance {config.guidance:g}: wanted 0 to 100; 3 to 9 is usual.")
    if config.sampler is not None:
        from sfumato import schedulers

        schedulers.find(config.sampler)
    seeds = [seed + i for seed in config.seed for i in range(config.count)]
    split = [split_tags(prompt) for prompt in prompts]
    pictures = tuple((found.prompt, seed) for found in split for seed in seeds)
    adapters = _in_blocks([parse_adapter(spec) for spec in config.lora], config.blocks)
    adapters, weights = _with_tags(adapters, split, config.lora_folder)
    tagged = tuple(weight for weight in weights for _ in seeds)
    sweep = None if config.sweep is None else _sweep(config.sweep, [adapter.label for adapter in adapters])
    if sweep and any(tagged):
        raise ConfigError("--sweep and <lora:...> in a prompt do not go together; name the adapter with --lora.")
    if config.mask and not config.image:
        raise ConfigError(f"--mask {config.mask}: a mask wants the picture that it is for; give --image, too.")
    if not 0 < config.strength <= 1:
        raise ConfigError(f"--strength {config.strength:g}: wanted above 0 and at most 1; 0.6 is usual.")
    for file in (config.image, config.mask):
        if file is not None and not file.is_file():
            raise ConfigError(f"{file}: there is no such picture.")
    embeddings = tuple(_embedding(spec) for spec in config.embedding)
    return Plan(
        pictures, tagged, adapters, embeddings, _size(config.size), _files(config, pictures, sweep is not None), sweep
    )


def _embedding(spec: str) -> tuple[str | None, Path]:
    """The token, if it is given, and the file of an `--embedding`."""
    from sfumato.files.header import read_header

    token, equals, path = spec.partition("=")
    if not equals or Path(spec).is_file():
        token, path = "", spec
    read_header(path)
    return token or None, Path(path)


def _in_blocks(adapters: Sequence[Adapter], blocks: Sequence[str]) -> tuple[Adapter, ...]:
    """The adapters with the weights by block that `--blocks` gives them."""
    found = {each.label: each for each in adapters}
    for text in blocks:
        label, equals, factors = text.partition("=")
        if not equals or label not in found:
            known = ", ".join(found) or "none are given"
            raise ConfigError(f"--blocks {text}: wanted LABEL=BLOCKS, with the label of a --lora ({known}).")
        weight = found[label].weight
        if isinstance(weight, Blocks):
            raise ConfigError(f"--blocks {text}: {label} has blocks already; name them in one.")
        found[label] = Adapter(found[label].path, Blocks.parse(weight, factors), found[label].name)
    return tuple(found.get(each.label, each) for each in adapters)


def _with_tags(
    adapters: tuple[Adapter, ...], prompts: Sequence[Tagged], folder: Path
) -> tuple[tuple[Adapter, ...], list[dict[str, Weight] | None]]:
    """All adapters, those of the tags included, and each prompt's weights where it has tags."""
    labels = [each.label for each in adapters]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"two adapters are called {repeated[0]!r}; tell them apart with --lora NAME=FILE:0.8.")
    named = {each.label: each for each in adapters}
    always = {each.label: each.weight for each in adapters}
    for tagged in prompts:
        for name, _ in tagged.adapters:
            if name not in named:
                named[name] = Adapter(find_adapter(name, folder), 0.0, name)
    return tuple(named.values()), [
        {label: 0.0 for label in named} | always | dict(tagged.adapters) if tagged.adapters else None
        for tagged in prompts
    ]


def _prompts_in(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"--prompts-file {file}: not readable as text ({reason}).") from None
    return [line for line in lines if line and not line.startswith("#")]


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:[xX*](\d{1,5}))?", text)
    if not found:
        raise ConfigError(f"--size {text}: wanted WIDTHxHEIGHT in pixels, such as 512x768.")
    width, height = int(found[1]), int(found[2] or found[1])
    if width % 8 or height % 8 or not width or not height:
        near = "x".join(str(max(8, round(side / 8) * 8)) for side in (width, height))
        raise ConfigError(f"--size {text}: both sides are multiples of 8; the nearest is {near}.")
    return width, height


def _sweep(text: str, labels: Sequence[str]) -> tuple[str, tuple[float, ...]]:
    label, equals, weights = text.rpartition("=")
    if not equals or not label:
        raise ConfigError(f"--sweep {text}: wanted LABEL=WEIGHTS, such as line=0,0.5,1.")
    if label not in labels:
        known = ", ".join(labels) or "none are given"
        raise ConfigError(f"--sweep {text}: no --lora is called {label!r} ({known}).")
    try:
        numbers = tuple(float(number) for number in weights.split(","))
        for number in numbers:
            checked_weight(label, number)
    except (ValueError, AdapterError) as error:
        raise ConfigError(f"--sweep {text}: {error}; wanted numbers such as 0,0.5,1.") from None
    return label, numbers


def _files(config: Config, pictures: Sequence[tuple[str, int]], is_sheet: bool) -> tuple[Path, ...]:
    output, count = config.output, 1 if is_sheet else len(pictures)
    suffix = "" if output.is_dir() else output.suffix.lower()
    is_file = suffix in (".png", ".jpg", ".jpeg", ".webp")
    if suffix in (".gif", ".bmp", ".tif", ".tiff", ".avif"):
        raise ConfigError(f"--output {output}: pictures are written as .png, .jpg or .webp; .png keeps every setting.")
    if is_file and count > 1:
        raise ConfigError(f"--output {output}: {count} pictures do not fit into one file; name a folder.")
    if is_file:
        files = (output,)
    else:
        names = [f"{i:03}-{_slug(prompt)}-{seed}" for i, (prompt, seed) in enumerate(pictures, start=1)]
        files = tuple(output / f"{name}.png" for name in (["sheet"] if is_sheet else names))
    for folder in (output.parent if is_file else output, *output.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output {output}: {folder} is a file, not a folder; name another place.")
    there = [file for file in files if file.exists()]
    if there and not config.overwrite:
        raise ConfigError(f"--output {output}: {there[0]} exists already; name another place, or say --overwrite.")
    return files


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"


def generate(config: Config) -> tuple[Path, ...]:
    """Draw what the config asks for; returns the files, each whole and with its settings inside."""
    wanted = plan(config)

    from contextlib import ExitStack

    from sfumato import embedding
    from sfumato.bases import load_base
    from sfumato.compose import compose
    from sfumato.drawn import sampler_label, save_drawn
    from sfumato.precision import decide

    base = load_base(
        config.base,
        precision=decide(config.precision, device=config.device, attention=config.attention),
        clip_skip=config.clip_skip,
        vae=config.vae,
        prediction_type=config.prediction_type,
    )
    settings = _settings(config, wanted, base)
    sampler = sampler_label(config.sampler, base)
    print(_summary(settings, sampler, base), file=sys.stderr)
    with ExitStack() as stack:
        for token, file in wanted.embeddings:
            stack.enter_context(embedding.load(base, file, token)).check([prompt for prompt, _ in wanted.pictures])
        mix = stack.enter_context(compose(base, *wanted.adapters, partial=config.partial))
        for label, vectors in mix.embeddings.items():  # the weight of a bundle is the LoRA's; its words are there
            words = embedding.Words(base, embedding.fitting(base, vectors, label)).requires_grad_(False)
            stack.enter_context(words).check([prompt for prompt, _ in wanted.pictures])
        for label, count in mix.skipped.items():
            print(f"{label}: {count} modules left out (--partial).", file=sys.stderr)
        if wanted.sweep:
            _draw_sheet(config, base, mix, wanted, settings, sampler)
        else:
            start = _start(config)
            for same in _runs_of_equal(wanted.tagged):
                if weights := wanted.tagged[same.start]:
                    mix.set_weights(weights)
                elif any(wanted.tagged):
                    mix.set_weights({each.label: each.weight for each in wanted.adapters})
                some = wanted.pictures[same.start : same.stop]
                drawn = _draw(base, some, settings, start)
                for picture, file, (prompt, seed) in zip(drawn, wanted.files[same.start :], some, strict=False):
                    save_drawn(picture, file, mix, settings | {"prompt": prompt, "seed": seed}, sampler)
                    print(file)
    return wanted.files


def _settings(config: Config, wanted: Plan, base: Base) -> dict[str, Any]:
    """What every picture of this call shares, defaults filled in."""
    defaults = base.defaults
    width, height = wanted.size or (defaults.resolution, defaults.resolution)
    return {
        "negative": config.negative,
        "steps": config.steps or defaults.sampling_steps,
        "guidance": defaults.guidance if config.guidance is None else config.guidance,
        "width": width,
        "height": height,
        "sampler": config.sampler,
        "prompt_syntax": config.prompt_syntax,
        "embeddings": [Path(spec).name for spec in config.embedding],
        "image": config.image and config.image.name,
        "mask": config.mask and config.mask.name,
        "strength": config.strength if config.image else None,
        "base": base.name,
        "clip_skip": config.clip_skip,
        "vae": None if config.vae is None else re.split(r"[\\/]", config.vae.rstrip("\\/"))[-1],
        "prediction_type": base.prediction_type,
    }


def _summary(settings: Mapping[str, Any], sampler: tuple[str, str | None], base: Base) -> str:
    return (
        f"{base.name} ({base.family.title}): {settings['steps']} steps of {' '.join(filter(None, sampler))}, "
        f"guidance {settings['guidance']:g}, {settings['width']}x{settings['height']}, on {base.precision.device}"
    )


def _draw(
    base: Base, pictures: Sequence[tuple[str, int]], settings: Mapping[str, Any], start: Start | None
) -> Iterator[Any]:
    from sfumato.drawing import draw_each

    names = ("negative", "steps", "guidance", "width", "height")
    prompts, seeds = ([picture[i] for picture in pictures] for i in (0, 1))
    chosen = {name: settings[name] for name in names} | {"scheduler": settings["sampler"]}
    return draw_each(base, prompts, seeds, start=start, syntax=settings["prompt_syntax"], **chosen)


def _runs_of_equal(weights: Sequence[dict[str, Weight] | None]) -> Iterator[range]:
    """Neighbours with the same weights, which are drawn in one batch."""
    first = 0
    for place in range(1, len(weights) + 1):
        if place == len(weights) or weights[place] != weights[first]:
            yield range(first, place)
            first = place


def _start(config: Config) -> Start | None:
    """The picture to begin from, read as training would read it."""
    if config.image is None:
        return None
    from sfumato.data import open_image
    from sfumato.drawing import Start

    mask = None if config.mask is None else open_image(config.mask)
    return Start(open_image(config.image), config.strength, mask)


def _draw_sheet(
    config: Config, base: Base, mix: Mix, wanted: Plan, settings: dict[str, Any], sampler: tuple[str, str | None]
) -> None:
    """The sheet of a sweep: the base stays loaded, and each weight recomputes only what that adapter changes."""
    from sfumato.drawn import save_drawn
    from sfumato.sheet import contact_sheet

    assert wanted.sweep is not None
    label, weights = wanted.sweep
    start = _start(config)
    rows = []
    for weight in weights:
        mix.set_weights({label: weight})
        rows.append(list(_draw(base, wanted.pictures, settings, start)))
        print(f"{label} {weight:g}", file=sys.stderr)
    prompts, seeds = ([picture[i] for picture in wanted.pictures] for i in (0, 1))
    sheet = contact_sheet(
        rows,
        row_labels=[f"{label} {weight:g}" for weight in weights],
        column_labels=[f"{p} ({seed})" if len(set(seeds)) > 1 else p for p, seed in wanted.pictures],
    )
    grid = {"sweep": {label: list(weights)}, "prompts": prompts, "seeds": seeds}
    save_drawn(sheet, wanted.files[0], mix, settings | {"prompt": prompts[0], "seed": seeds[0]} | grid, sampler)
    print(wanted.files[0])


def main(argv: Sequence[str]) -> int:
    """Draw, print the files, return 0."""
    generate(parse(Config, argv, program="generate"))
    return 0


if __name__ == "__main__":
    run(main)
