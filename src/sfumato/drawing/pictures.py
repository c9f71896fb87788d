"""Pictures from a pipeline or a base: batched, each from its own seed, never a black or broken one."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral, Real
from operator import index
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image
from torch import Tensor

from sfumato import schedulers
from sfumato.command_line.axes import checked_guidance, checked_seed
from sfumato.drawing.tagged import TaggedPrompts, reading_tags
from sfumato.errors import BaseModelError, ConfigError
from sfumato.numerals import so_many
from sfumato.prompts.encoding import encode, encode_stages
from sfumato.prompts.negative import negative_for
from sfumato.prompts.steps import Stage, beside, counted, told_by_stages
from sfumato.prompts.syntax import Syntax
from sfumato.prompts.tags import refuse_tags

if TYPE_CHECKING:
    from sfumato.bases.base import Base

LATENTS_AT_ONCE = 16_384
"""Latent pixels in one batch: 64 pictures of 64 px on pocket, 4 of 512 px on SD 1.x, 1 of 1024 px on SDXL."""

_STEPS = 50
"""What diffusers' pipelines take where no number is given."""


@dataclass(frozen=True)
class Start:
    """A picture to begin from instead of noise (SDEdit, Meng et al. 2022).

    strength: in (0, 1], the share of the steps that is drawn; 1 keeps nothing of the picture. mask: white is drawn
    anew, black keeps the picture's very pixels. Both are resized to the drawing's size.
    """

    picture: Image.Image
    strength: float = 0.6
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        for what, picture in {"picture": self.picture, "mask": self.mask}.items():
            if not isinstance(picture, Image.Image) and (picture is not None or what == "picture"):
                kind = type(picture).__name__
                raise ConfigError(f"a start's {what} that is a {kind}; wanted a PIL picture, as Image.open gives it.")
        if not isinstance(self.strength, Real) or not 0 < self.strength <= 1:
            raise ConfigError(f"strength {self.strength!r:.40}: wanted above 0 and at most 1; 0.6 is usual.")

    def sized(self, width: int, height: int) -> Start:
        """The same at this size."""
        picture = self.picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        # Lanczos rings: black beside a white edge would be grey.
        mask = None if self.mask is None else self.mask.convert("L").resize((width, height), Image.Resampling.BILINEAR)
        return Start(picture, self.strength, mask)


def draw(source: Any, prompts: str | Sequence[str], seeds: int | Sequence[int], **settings: Any) -> list[Image.Image]:
    """One picture for each prompt and its seed, as `draw_each` with the same settings.

    Raises ConfigError for a `<lora:...>` that the source does not read as a tag; `draw_each` takes all for text, as
    captions are.
    """
    texts, numbers = _pairs(prompts, seeds)
    for text in () if isinstance(source, TaggedPrompts) else (*texts, str(settings.get("negative", ""))):
        refuse_tags(text, f"the prompt {text[:60]!r}", "compose the adapter, or draw with sfumato generate")
    return list(draw_each(source, texts, numbers, **settings))


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
    syntax: Syntax = "plain",
) -> Iterator[Image.Image]:
    """One picture for each prompt and its seed, in order; one prompt serves many seeds, one seed many prompts.

    source: a diffusers pipeline (SD 1.x, 2.x, SDXL) or a Base. Unset steps, guidance and size (pixels) are the base's
    family's, or the pipeline's own defaults. sampler: a name from `sfumato.schedulers`; unset, a pipeline's own
    scheduler, but of a Base its family's (`base.defaults.sampler`), whatever its folder names. batch: pictures drawn at
    once, chosen by their size if unset. start: a picture to begin from, by a mask only a part of it. syntax: how
    weighted words are written, see `sfumato.prompts.syntax`; it wants a Base.

    The noise of a picture is that of `torch.Generator().manual_seed(seed)` on the CPU, whatever its place and the
    device, so that plain diffusers with this generator and scheduler draws the same one. What is not finite, or black
    all over, is tried once more in fp32; BaseModelError if that does not help. Raises ConfigError for what cannot be
    drawn, such as a pipeline that begins from a picture where there is no start.
    """
    prompts, seeds = _pairs(prompts, seeds)
    steps, batch = _whole("steps", steps), _whole("batch", batch)
    width, height = _whole("width", width), _whole("height", height)
    _check_kinds(guidance, negative, syntax, sampler, start)
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
    if batch is None:
        batch = max(1, LATENTS_AT_ONCE // (width * height // pipe.vae_scale_factor**2))
    elif batch < 1:
        raise ConfigError(f"batch {batch}: wanted at least 1 picture at once.")
    if guidance is not None:
        checked_guidance(guidance)
    other = None if sampler is None else schedulers.scheduler(sampler, pipe.scheduler.config)
    check_steps(steps, other or pipe.scheduler)
    way = _Way(pipe, source if is_base else None, negative, syntax, given, start)
    for first in range(0, len(prompts), batch):
        drawn: dict[int, Image.Image] = {}
        for places in way.of_one_length(prompts, range(len(prompts))[first : first + batch]):
            texts, noises = [prompts[place] for place in places], [seeds[place] for place in places]
            with _as_asked(pipe, other), schedulers.at_once(places, len(prompts)):
                pictures = way.draw(texts, noises)
            drawn |= zip(places, pictures, strict=True)
        yield from (drawn[place] for place in sorted(drawn))


def draw_against(
    source: Any, prompts: Sequence[str], seeds: Sequence[int], asked: Iterable[str], **settings: Any
) -> list[Image.Image]:
    """As `draw_each` with these settings, those of one negative prompt together. asked: negative prompts of files."""
    texts = list(asked)
    together: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        together.setdefault(negative_for(prompt, texts), []).append(place)
    found: dict[int, Image.Image] = {}
    for negative, places in together.items():
        some = [prompts[place] for place in places], [seeds[place] for place in places]
        found |= dict(zip(places, draw_each(source, *some, negative=negative, **settings), strict=True))
    return [found[place] for place in range(len(prompts))]


def _check_kinds(guidance: Any, negative: Any, syntax: Any, sampler: Any, start: Any) -> None:
    """Raises ConfigError for a setting of another type."""
    if guidance is not None and not isinstance(guidance, Real):
        raise ConfigError(f"guidance {guidance!r:.40}: wanted a number; 3 to 9 is usual.")
    if not isinstance(negative, str):
        raise ConfigError(f"a negative prompt that is a {type(negative).__name__}; wanted one text for all pictures.")
    if syntax not in get_args(Syntax):
        raise ConfigError(f"the prompt syntax {syntax!r}: wanted one of {', '.join(get_args(Syntax))}.")
    if sampler is not None and not isinstance(sampler, str):
        kind = getattr(sampler, "__name__", type(sampler).__name__)
        raise ConfigError(f"a sampler that is a {kind}; wanted a name such as ddim. Your own goes into pipe.scheduler.")
    if start is not None and not isinstance(start, Start):
        kind = type(start).__name__
        raise ConfigError(f"a start that is a {kind}; wanted sfumato.drawing.pictures.Start(picture).")


def check_steps(steps: int | None, scheduler: Any) -> None:
    """Raises ConfigError for more steps, or fewer, than a scheduler can take; unset ones are right."""
    most = int(scheduler.config.num_train_timesteps)
    if steps is not None and not 1 <= steps <= most:
        raise ConfigError(f"{steps} steps; wanted 1 to {most}, the timesteps that the base was trained on.")


def check_strength(steps: int, start: Start) -> None:
    """Raises ConfigError where the start's share of the steps is none."""
    if int(steps * start.strength) < 1:
        raise ConfigError(f"strength {start.strength:g} of {so_many(steps, 'step')} is no step; give more of either.")


def _check_pipeline(pipe: Any, start: Start | None) -> None:
    """Raises ConfigError for what draw cannot call as it should be called."""
    if not (hasattr(pipe, "unet") and hasattr(pipe, "components")):
        raise ConfigError(f"draw wants a Base or a diffusers pipeline with a U-Net, got a {type(pipe).__name__}.")
    if "controlnet" in pipe.components:
        raise ConfigError(
            f"a {type(pipe).__name__} follows a picture that draw does not hand on; call it yourself, or draw with a "
            "pipeline that has no controlnet."
        )
    if start is None and "image" in inspect.signature(type(pipe).__call__).parameters:
        raise ConfigError(
            f"a {type(pipe).__name__} draws from a picture; give start=Start(picture), or a pipeline that needs none."
        )


def _pairs(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> tuple[list[str], list[int]]:
    texts = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ConfigError(f"a prompt that is a {type(wrong[0]).__name__}; wanted a text, or texts.")
    several = seeds if isinstance(seeds, Iterable) and not isinstance(seeds, Integral) else [seeds]
    numbers = [number for seed in several if (number := _whole("seed", seed)) is not None]
    if len(texts) == 1:
        texts = texts * len(numbers)
    if len(numbers) == 1:
        numbers = numbers * len(texts)
    if len(texts) != len(numbers) or not texts:
        raise ConfigError(f"{len(texts)} prompts and {len(numbers)} seeds; wanted as many of both, or one of either.")
    return texts, [checked_seed(number) for number in numbers]


def _whole(name: str, value: Any) -> int | None:
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
            raise ConfigError(f"{name} {side}: wanted a multiple of 8 pixels, such as {max(8, round(side / 8) * 8)}.")
    return width, height


@dataclass(frozen=True)
class _Way:
    """How all pictures of a call are drawn. base: None for a pipeline that encodes its prompts itself. options: of the
    pipeline's call, those that are given. start: at the drawing's size."""

    pipe: Any
    base: Base | None
    negative: str
    syntax: Syntax
    options: Mapping[str, Any]
    start: Start | None

    @property
    def steps(self) -> int:
        """As they are asked for, of which a start leaves out some."""
        return int(self.options.get("num_inference_steps", _STEPS))

    @property
    def drawn_steps(self) -> int:
        """How many of them are drawn."""
        return self.steps if self.start is None else max(1, int(self.steps * self.start.strength))

    def draw(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        """The pictures of one batch; what is not finite or black is tried once more in fp32."""
        pipe, base, start = self.pipe, self.base, self.start
        with base.precision.autocast() if base else nullcontext(), counted(self.drawn_steps):
            latents = self._latents(prompts, seeds)
        in_half = pipe.unet.dtype != torch.float32 or (base is not None and base.precision.compute != torch.float32)
        if not torch.isfinite(latents).all() and in_half:
            parts = (pipe.unet, getattr(pipe, "text_encoder", None), getattr(pipe, "text_encoder_2", None))
            with _in_fp32(*parts), counted(self.drawn_steps):
                latents = self._latents(prompts, seeds)
        _check(latents.isfinite(), seeds, "not finite, even in fp32. Draw without adapters to see what is broken.")
        pictures = [_image(picture) for picture in _pixels(pipe, latents, seeds)]
        if start is not None and start.mask is not None:
            # The VAE's reconstruction of what was to stay is not what was to stay.
            pictures = [Image.composite(picture, start.picture, start.mask) for picture in pictures]
        return _safe(pictures, pipe, seeds)

    def _latents(self, prompts: list[str], seeds: list[int]) -> Tensor:
        if self.base is None:
            return self._denoise(_as_arguments(prompts, self.negative), seeds)
        told = self._stages_of(self.base, prompts, self.drawn_steps)
        with told_by_stages(self.pipe.unet, told, self.pipe.scheduler) if len(told) > 1 else nullcontext():
            return self._denoise(_embedded(told[0]), seeds)

    @torch.no_grad()
    def _denoise(self, text: dict[str, Any], seeds: list[int]) -> Tensor:
        """Scaled latents, (batch, channels, height/f, width/f)."""
        pipe, start = self.pipe, self.start
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {**text, **self.options, "generator": generators, "output_type": "latent"}
        if start is not None:
            count = len(seeds)
            options |= {"image": [start.picture] * count, "strength": start.strength}
            if start.mask is None:
                pipe = _variant(pipe, "AutoPipelineForImage2Image")
                del options["width"], options["height"]  # the picture's own
            else:
                pipe = _variant(pipe, "AutoPipelineForInpainting")
                options |= {"mask_image": [start.mask] * count}
            check_strength(options.setdefault("num_inference_steps", _STEPS), start)
        with _itself(pipe.vae):
            latents: Tensor = pipe(**options).images
        return latents

    def _stages_of(self, base: Base, prompts: list[str], steps: int) -> list[Stage]:
        """The prompts as the base's `encode_text` has them, which training saw and which knows of clip_skip."""
        from sfumato.compose.per_picture import texts_by_picture

        syntax, negative, told = self.syntax, self.negative, schedulers.PICTURES.get()
        if syntax != "plain" and len(prompts) > 1 and told is not None and texts_by_picture(base):
            each = []
            for place, prompt in zip(told[0], prompts, strict=True):  # as compel reads them: one after another
                with schedulers.at_once([place], told[1]):
                    each.append(self._stages_of(base, [prompt], steps))
            return beside(each)
        if syntax == "a1111":
            return encode_stages(base, prompts, negative, steps)
        if syntax == "plain":
            text = base.encode_text(prompts)
            other = base.encode_text([negative] * len(prompts)) if negative else base.unconditional(len(prompts))
        else:
            text, other = encode(base, prompts, negative, syntax)
        return [Stage(steps, text, other)]

    def of_one_length(self, prompts: list[str], places: Sequence[int]) -> Iterable[Sequence[int]]:
        """The places, of a batch of the prompts, together those whose embeddings, each by itself, have as many tokens.

        In one batch a shorter one is filled up with empty prompts, which draw another picture than none.
        """
        base, distinct = self.base, {prompts[place]: place for place in places}
        if base is None or self.syntax == "plain" or len(distinct) == 1:
            return [places]
        lengths = {}
        for prompt, place in distinct.items():
            with base.precision.autocast(), schedulers.at_once([place], len(prompts)):
                lengths[prompt] = self._stages_of(base, [prompt], self.steps)[0].text.hidden.shape[1]
        together: dict[int, list[int]] = {}
        for place in places:
            together.setdefault(lengths[prompts[place]], []).append(place)
        return together.values()


@contextmanager
def _itself(vae: Any) -> Iterator[None]:
    """The VAE encodes in its own dtype, and is itself after the block.

    Pipelines that begin with a picture hand it on in the U-Net's dtype, and SDXL's leave an fp32 VAE in half precision.
    """
    held = {tensor: tensor.data for tensor in (*vae.parameters(), *vae.buffers())}
    encode = vae.encode

    def in_own_dtype(pixels: Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(pixels.device.type, enabled=False):
            return encode(pixels.to(vae.dtype), *args, **options)

    vae.encode = in_own_dtype
    try:
        yield
    finally:
        del vae.encode
        for tensor, data in held.items():
            if tensor.dtype != data.dtype:
                tensor.data = data


def _variant(pipe: Any, name: str) -> Any:
    """The pipeline's parts in diffusers' pipeline for another task; where the one reads tags, the other does."""
    import diffusers

    try:
        variant = getattr(diffusers, name).from_pipe(pipe)
    except ValueError:
        raise ConfigError(
            f"diffusers has no {name.removeprefix('AutoPipelineFor')} pipeline for a {type(pipe).__name__}, which a "
            "start wants. Draw with a StableDiffusionPipeline or StableDiffusionXLPipeline."
        ) from None
    if isinstance(pipe, TaggedPrompts):
        variant = reading_tags(variant, pipe)
    variant.set_progress_bar_config(disable=True)
    return variant


def _as_arguments(prompts: list[str], negative: str) -> dict[str, Any]:
    """The prompts for a pipeline that encodes them itself."""
    if not negative:  # without one, SDXL takes zeros instead of an empty prompt
        return {"prompt": prompts}
    return {"prompt": prompts, "negative_prompt": [negative] * len(prompts)}


def _embedded(stage: Stage) -> dict[str, Any]:
    """A stage for a pipeline's call."""
    text, other = stage.text, stage.other
    embedded: dict[str, Any] = {"prompt_embeds": text.hidden, "negative_prompt_embeds": other.hidden}
    if text.pooled is not None and other.pooled is not None:
        embedded |= {"pooled_prompt_embeds": text.pooled, "negative_pooled_prompt_embeds": other.pooled}
    return embedded


def _pixels(pipe: Any, latents: Tensor, seeds: list[int]) -> Tensor:
    """Of the pictures, as `_decode`. Raises BaseModelError for one that is black or not finite in fp32, too."""
    pixels = _decode(pipe, latents)
    if not is_picture(pixels).all() and pipe.vae.dtype != torch.float32:
        with _in_fp32(pipe.vae):
            pixels = _decode(pipe, latents)
    _check(is_picture(pixels), seeds, "black or not finite, even in fp32. The VAE is broken; name another with --vae.")
    return pixels


@torch.no_grad()
def _decode(pipe: Any, latents: Tensor) -> Tensor:
    """Pixels, fp32, (batch, 3, height, width); -1 is black, 1 is white."""
    from sfumato.bases.base import latent_scale

    shift, scale = latent_scale(pipe.vae, latents.device)
    encoded = latents.float() / scale + shift
    pixels: Tensor = pipe.vae.decode(encoded.to(pipe.vae.device, pipe.vae.dtype), return_dict=False)[0]
    return pixels.float()


def is_picture(pixels: Tensor) -> Tensor:
    """(batch, 1), of pixels in [-1, 1]: finite, and not black in every pixel."""
    flat = pixels.flatten(1)
    return (flat.isfinite().all(1) & (flat.amax(1) > -1 + 1 / 255)).unsqueeze(1)


def _check(good: Tensor, seeds: list[int], complaint: str) -> None:
    bad = [seed for seed, fine in zip(seeds, good.flatten(1).all(1).tolist(), strict=True) if not fine]
    if bad:
        raise BaseModelError(f"{len(bad)} of {len(seeds)} pictures (seed {bad[0]}) came out {complaint}")


def _image(pixels: Tensor) -> Image.Image:
    values = (pixels.clamp(-1, 1) / 2 + 0.5).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def _safe(pictures: list[Image.Image], pipe: Any, seeds: list[int]) -> list[Image.Image]:
    """The pictures, if the pipeline's safety checker, where it has one, has nothing against them."""
    if getattr(pipe, "safety_checker", None) is None:
        return pictures
    inputs = pipe.feature_extractor(pictures, return_tensors="pt").pixel_values
    device, dtype = pipe.safety_checker.device, pipe.safety_checker.dtype
    blank = [torch.zeros(1) for _ in pictures]
    _, flagged = pipe.safety_checker(images=blank, clip_input=inputs.to(device, dtype))
    _check(~torch.tensor(flagged), seeds, "flagged by the pipeline's safety checker. Try another prompt or seed.")
    return pictures


@contextmanager
def _in_fp32(*modules: Any) -> Iterator[None]:
    """The modules in fp32, and back in their own dtypes, which loses nothing."""
    before = [(module, module.dtype) for module in modules if module is not None]
    try:
        for module, _ in before:
            module.float()
        yield
    finally:
        for module, dtype in before:
            module.to(dtype)


@contextmanager
def _as_asked(pipe: Any, scheduler: Any | None) -> Iterator[None]:
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
