"""Images from a pipeline or a base model: in batches, each from its own seed, never black or broken."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from operator import index
from typing import Any

from PIL import Image

from sfumato.adapters.prompt_tags import refuse_tags
from sfumato.errors import ConfigError, is_out_of_memory
from sfumato.generation.image_options import Hires, Start, check_strength, round_side
from sfumato.generation.pipeline_call import PipelineCall
from sfumato.generation.prompt_adapters import TaggedPrompts
from sfumato.models import calls
from sfumato.models.calls import is_inpainting
from sfumato.models.prompts.syntax import Syntax, check_syntax, negative_for
from sfumato.precision.memory import release_freed_memory
from sfumato.utils import schedulers
from sfumato.utils.limits import checked_area, checked_guidance, checked_seed

__all__ = [
    "LATENTS_AT_ONCE",
    "Hires",
    "Start",
    "check_steps",
    "check_strength",
    "draw",
    "draw_against",
    "draw_each",
    "drawn_at_once",
]

LATENTS_AT_ONCE = 16_384
"""Latent pixels in one batch: 64 images of 64 px on pocket, 4 of 512 px on SD 1.x, 1 of 1024 px on SDXL."""


def drawn_at_once(latents: int) -> int:
    """How many images with this many latent pixels are generated at once."""
    return max(1, LATENTS_AT_ONCE // latents)


def draw(
    source: Any,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    *,
    negative: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    sampler: str | None = None,
    batch: int | None = None,
    start: Start | None = None,
    hires: Hires | None = None,
    syntax: Syntax = "plain",
) -> list[Image.Image]:
    """Generate one image for each prompt and its seed, in order. One prompt serves many seeds, one seed many prompts.

    source: a diffusers pipeline (SD 1.x, 2.x, SDXL) or a Base. steps, guidance, width and height (pixels): unset, the
    defaults of the base family or of the pipeline. sampler: a name from `sfumato.utils.schedulers`; unset, a
    pipeline keeps
    its own scheduler, and a Base uses its family's (`base.defaults.sampler`), whatever its folder names. batch: images
    generated at once; unset, chosen by their size; fewer where memory does not hold them. start: an image to start
    from, as `Start(image)` of this module; with a mask, only a part of it changes. hires: `Hires(2)` of this module
    enlarges each image in a second pass; it does not go with a start. syntax: how weighted words are written, see
    `sfumato.models.prompts.syntax`; it needs a Base.

    An image's noise comes from `torch.Generator().manual_seed(seed)` on the CPU, whatever its place and the device. So
    plain diffusers with this generator and scheduler generates the same image. An image that is not finite, or all
    black, is generated once more in fp32; BaseModelError if that does not help. Raises ConfigError for what cannot be
    generated, such as an img2img pipeline without a start image, and for a `<lora:...>` that the source does not read
    as a tag.
    """
    texts, numbers = _pairs(prompts, seeds)
    for text in () if isinstance(source, TaggedPrompts) else (*texts, str(negative)):
        refuse_tags(text, f"the prompt {text[:60]!r}", "compose the adapter, or draw with sfumato generate")
    pictures = draw_each(
        source,
        texts,
        numbers,
        negative=negative,
        steps=steps,
        guidance=guidance,
        width=width,
        height=height,
        sampler=sampler,
        batch=batch,
        start=start,
        hires=hires,
        syntax=syntax,
    )
    return list(pictures)


def draw_each(
    source: Any,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    *,
    negative: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    sampler: str | None = None,
    batch: int | None = None,
    start: Start | None = None,
    hires: Hires | None = None,
    syntax: Syntax = "plain",
) -> Iterator[Image.Image]:
    """The images of `draw` with the same settings, each batch when it is wanted. All of a prompt is text, also a
    `<lora:...>`, as in captions."""
    prompts, seeds = _pairs(prompts, seeds)
    steps, batch = _as_integer("steps", steps), _as_integer("batch", batch)
    width, height = _as_integer("width", width), _as_integer("height", height)
    _check_kinds(guidance, negative, syntax, sampler, start, hires)
    is_base = hasattr(source, "encode_text")
    pipe = source.pipeline() if is_base else source
    _check_pipeline(pipe, start)
    if is_base:
        defaults = source.defaults
        steps = defaults.sampling_steps if steps is None else steps
        guidance = defaults.guidance if guidance is None else guidance
        width = defaults.resolution if width is None else width
        height = defaults.resolution if height is None else height
    elif syntax != "plain":
        raise ConfigError(f"the prompt syntax {syntax} wants a Base of sfumato.load_base, not a pipeline.")
    width, height = _size(pipe, width, height)
    if start is not None:
        start = start.sized(width, height)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "width": width, "height": height}
    given = {name: value for name, value in options.items() if value is not None}
    if batch is not None and batch < 1:
        raise ConfigError(f"batch {batch}: wanted at least 1 image at once.")
    if guidance is not None:
        checked_guidance(guidance)
    other = None if sampler is None else schedulers.make_scheduler(sampler, pipe.scheduler.config)
    given |= {} if sampler is None else schedulers.find_sampler(sampler).options
    check_steps(steps, other or pipe.scheduler)
    call = PipelineCall(
        pipe, source if is_base else None, negative, syntax, given, None if start is None else start.strength
    )
    asked, everything = _DrawRequest(prompts, seeds, other), range(len(prompts))
    own_batch = batch or drawn_at_once(width * height // pipe.vae_scale_factor**2)
    if hires is None:
        starts = {} if start is None else dict.fromkeys(everything, start)
        yield from asked.images(call, everything, starts, own_batch)
        return
    wide, high = hires.size(width, height)
    checked_area(wide, high)
    second = call.enlarging(hires, wide, high)
    check_steps(second.steps, other or pipe.scheduler)
    larger_batch = batch or drawn_at_once(wide * high // pipe.vae_scale_factor**2)

    def in_two_passes(some: range) -> list[Image.Image]:
        small = asked.at_once(call, {}, some)
        starts = {
            place: Start(image, hires.strength).sized(wide, high) for place, image in zip(some, small, strict=True)
        }
        return list(asked.images(second, some, starts, larger_batch))

    yield from _in_fitting_batches(in_two_passes, everything, own_batch)


@dataclass(frozen=True)
class _DrawRequest:
    """The prompts and seeds of all images of a call, by place. scheduler: unset, the pipeline's own."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    scheduler: Any | None

    def images(self, call: PipelineCall, some: range, starts: Mapping[int, Start], batch: int) -> Iterator[Image.Image]:
        """The images of these places, in batches. starts: the images that they start from, by place; empty for none."""
        yield from _in_fitting_batches(partial(self.at_once, call, starts), some, batch)

    def at_once(self, call: PipelineCall, starts: Mapping[int, Start], some: range) -> list[Image.Image]:
        """The images of these places, in one batch where their prompts allow it."""
        drawn: dict[int, Image.Image] = {}
        for places in call.of_one_length(self.prompts, some):
            texts, noises = [self.prompts[place] for place in places], [self.seeds[place] for place in places]
            with _with_scheduler(call.pipe, self.scheduler), calls.drawing_images(places, len(self.prompts)):
                images = call.draw(texts, noises, [starts[place] for place in places if starts])
            drawn |= zip(places, images, strict=True)
        return [drawn[place] for place in some]


def _in_fitting_batches(draw: Callable[[range], list[Image.Image]], wanted: range, batch: int) -> Iterator[Image.Image]:
    """The images of these places, so many at once, or half as many from where memory does not hold them."""
    first = wanted.start
    while first < wanted.stop:
        some = range(first, min(first + batch, wanted.stop))
        try:
            images = draw(some)
        except (RuntimeError, MemoryError) as error:
            if len(some) == 1 or not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # which hold what filled the memory
            batch = len(some) // 2
        else:
            yield from images
            first = some.stop
            continue
        release_freed_memory()


def draw_against(
    source: Any, prompts: Sequence[str], seeds: Sequence[int], asked: Iterable[str], **settings: Any
) -> list[Image.Image]:
    """As `draw_each` with these settings; images with the same negative prompt are generated together. asked: negative
    prompts that files ask for."""
    texts = list(asked)
    together: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        together.setdefault(negative_for(prompt, texts), []).append(place)
    found: dict[int, Image.Image] = {}
    for negative, places in together.items():
        some = [prompts[place] for place in places], [seeds[place] for place in places]
        found |= dict(zip(places, draw_each(source, *some, negative=negative, **settings), strict=True))
    return [found[place] for place in range(len(prompts))]


def _check_kinds(guidance: Any, negative: Any, syntax: Any, sampler: Any, start: Any, hires: Any) -> None:
    """Raises ConfigError for a setting of another type."""
    if guidance is not None and not isinstance(guidance, Real):
        raise ConfigError(f"guidance {guidance!r:.40}: wanted a number; 3 to 9 is usual.")
    if not isinstance(negative, str):
        raise ConfigError(f"a negative prompt that is a {type(negative).__name__}; wanted one text for all images.")
    check_syntax(syntax)
    if sampler is not None and not isinstance(sampler, str):
        kind = getattr(sampler, "__name__", type(sampler).__name__)
        raise ConfigError(f"a sampler that is a {kind}; wanted a name such as ddim. Your own goes into pipe.scheduler.")
    if start is not None and not isinstance(start, Start):
        kind = type(start).__name__
        raise ConfigError(f"a start that is a {kind}; wanted sfumato.generation.draw.Start(image).")
    if hires is not None and not isinstance(hires, Hires):
        raise ConfigError(f"hires {hires!r:.40}: wanted sfumato.generation.draw.Hires(2).")
    if hires is not None and start is not None:
        raise ConfigError(
            "start and hires do not go together; an image that is there is enlarged by a start of its own size."
        )


def check_steps(steps: int | None, scheduler: Any) -> None:
    """Raise ConfigError for a number of steps that a scheduler cannot take; unset is fine."""
    most = int(scheduler.config.num_train_timesteps)
    if steps is not None and not 1 <= steps <= most:
        raise ConfigError(f"{steps} steps; wanted 1 to {most}, the timesteps that the base was trained on.")
    few = scheduler.config.get("original_inference_steps")
    if steps is not None and few is not None and steps > few:
        raise ConfigError(f"{steps} steps; this sampler takes at most {few}, and 4 to 8 are usual.")


def _check_pipeline(pipe: Any, start: Start | None) -> None:
    """Raises ConfigError for what draw cannot call as it should be called."""
    if not (hasattr(pipe, "unet") and hasattr(pipe, "components")):
        raise ConfigError(f"draw wants a Base or a diffusers pipeline with a U-Net, got a {type(pipe).__name__}.")
    if "controlnet" in pipe.components:
        raise ConfigError(
            f"a {type(pipe).__name__} follows an image that draw does not hand on; call it yourself, or draw with a "
            "pipeline that has no controlnet."
        )
    needs_image = "image" in inspect.signature(type(pipe).__call__).parameters
    if start is None and needs_image and not is_inpainting(pipe.unet, pipe.vae):
        raise ConfigError(
            f"a {type(pipe).__name__} draws from an image; give start=Start(image), or a pipeline that needs none."
        )


def _pairs(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> tuple[list[str], list[int]]:
    texts = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ConfigError(f"a prompt that is a {type(wrong[0]).__name__}; wanted a text, or texts.")
    is_one = isinstance(seeds, Integral) or getattr(seeds, "ndim", 1) == 0  # a scalar of numpy's or torch's
    several = [seeds] if is_one or not isinstance(seeds, Iterable) else seeds
    numbers = [number for seed in several if (number := _as_integer("seed", seed)) is not None]
    if len(texts) == 1:
        texts = texts * len(numbers)
    if len(numbers) == 1:
        numbers = numbers * len(texts)
    if len(texts) != len(numbers) or not texts:
        raise ConfigError(f"{len(texts)} prompts and {len(numbers)} seeds; wanted as many of both, or one of either.")
    return texts, [checked_seed(number) for number in numbers]


def _as_integer(name: str, value: Any) -> int | None:
    """A whole number, numpy's and torch's as well, or None. Raises ConfigError for anything else."""
    try:
        return None if value is None else index(value)
    except TypeError:
        raise ConfigError(f"{name} {value!r:.40}: wanted a whole number.") from None


def _size(pipe: Any, width: int | None, height: int | None) -> tuple[int, int]:
    """The size in pixels; a U-Net's own where none is given."""
    own = pipe.unet.config.sample_size
    if width is None or height is None:
        sides = (own, own) if isinstance(own, int) else (own[0], own[1])
        height = sides[0] * pipe.vae_scale_factor if height is None else height
        width = sides[1] * pipe.vae_scale_factor if width is None else width
    for name, side in (("width", width), ("height", height)):
        if side <= 0 or side % 8:  # what diffusers' pipelines ask for, whatever the VAE's factor
            raise ConfigError(f"{name} {side}: wanted a multiple of 8 pixels, such as {round_side(side)}.")
    checked_area(width, height)
    return width, height


@contextmanager
def _with_scheduler(pipe: Any, scheduler: Any | None) -> Iterator[None]:
    """The pipeline with this scheduler and no progress bar of its own, and afterwards as it was."""
    own, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    pipe.scheduler = scheduler or own
    pipe.set_progress_bar_config(disable=True)
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addFilter(_tells_of_modules)
    try:
        yield
    finally:
        logger.removeFilter(_tells_of_modules)
        pipe.scheduler, pipe._progress_bar_config = own, bar


def _tells_of_modules(record: logging.LogRecord) -> bool:
    """False for diffusers' warning of modules that should have stayed in fp32 where there are none, which it gives of
    its own casts of SDXL's VAE."""
    return "should be kept in float32: []" not in record.getMessage()
