"""One call for pictures: batches of prompts and seeds through a pipeline, with all that the call has settled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from sfumato.adapters.weights import is_zero_weight
from sfumato.errors import ConfigError
from sfumato.generation.decoding import (
    check_images,
    check_safety,
    decode_latents,
    may_fit_tiled,
    pixels_per_latent,
    tiled_vae,
    to_pil,
    upcast_to_fp32,
)
from sfumato.generation.image_options import Hires, Start, check_strength
from sfumato.generation.prompt_adapters import TaggedPrompts, with_prompt_tags
from sfumato.models import calls
from sfumato.models.calls import is_inpainting
from sfumato.models.prompts.editing import Stage, concat_stages, staged_prompts
from sfumato.models.prompts.encoding import encode_prompts, encode_stages
from sfumato.models.prompts.syntax import Syntax
from sfumato.precision.fast_unet import fast_inference

if TYPE_CHECKING:
    from sfumato.models.base import Base

_STEPS = 50
"""What diffusers' pipelines take where no number is given."""


@dataclass(frozen=True)
class PipelineCall:
    """How all pictures of a call of `draw_each` are drawn.

    base: None for a pipeline that encodes its prompts itself. options: those of the pipeline's own call that are given.
    strength: of the images that `draw` starts from; None where it starts from noise.
    """

    pipe: Any
    base: Base | None
    negative: str
    syntax: Syntax
    options: Mapping[str, Any]
    strength: float | None

    @property
    def steps(self) -> int:
        """As they are asked for, of which a strength leaves out some."""
        return int(self.options.get("num_inference_steps", _STEPS))

    def enlarging(self, hires: Hires, width: int, height: int) -> PipelineCall:
        """The second pass, which starts from the images of this one, at its size in pixels."""
        options = {"num_inference_steps": hires.scheduled_steps(self.steps), "width": width, "height": height}
        return replace(self, options={**self.options, **options}, strength=hires.strength)

    @property
    def drawn_steps(self) -> int:
        """How many of them are drawn."""
        return self.steps if self.strength is None else max(1, int(self.steps * self.strength))

    def draw(self, prompts: list[str], seeds: list[int], starts: Sequence[Start]) -> list[Image.Image]:
        """The pictures of one batch; what is not finite or black is tried once more in fp32.

        starts: one for each picture, at its size, all or none with a mask; empty to start from noise.
        """
        pipe, base = self.pipe, self.base
        own = _drawing(base) if base else nullcontext()
        with own, fast_inference(pipe.unet), calls.drawing_steps(self.drawn_steps):
            latents = self._latents(prompts, seeds, starts)
        in_half = pipe.unet.dtype != torch.float32 or (base is not None and base.precision.compute != torch.float32)
        parts = (pipe.unet, getattr(pipe, "text_encoder", None), getattr(pipe, "text_encoder_2", None))
        is_quantised = any(getattr(part, "is_quantized", False) for part in parts)
        if in_half and not is_quantised and not torch.isfinite(latents).all():
            with upcast_to_fp32(*parts), calls.drawing_steps(self.drawn_steps):
                latents = self._latents(prompts, seeds, starts)
        complaint = "not finite" if is_quantised else "not finite, even in fp32"
        check_images(latents.isfinite(), seeds, f"{complaint}. {self._non_finite_advice()}")
        pictures = [to_pil(picture) for picture in decode_latents(pipe, latents, seeds)]
        for place, start in enumerate(starts):
            if start.mask is not None:  # the VAE's reconstruction of what was to stay is not what was to stay
                pictures[place] = Image.composite(pictures[place], start.picture, start.mask)
        return check_safety(pictures, pipe, seeds)

    def _latents(self, prompts: list[str], seeds: list[int], starts: Sequence[Start]) -> Tensor:
        if self.base is None:
            return self._denoise(_as_arguments(prompts, self.negative), seeds, starts)
        told = self._stages_of(self.base, prompts, self.drawn_steps)
        with staged_prompts(self.pipe.unet, told, self.pipe.scheduler) if len(told) > 1 else nullcontext():
            return self._denoise(_embedded(told[0]), seeds, starts)

    @torch.no_grad()
    def _denoise(self, text: dict[str, Any], seeds: list[int], starts: Sequence[Start]) -> Tensor:
        """Scaled latents, (batch, channels, height/f, width/f)."""
        pipe = self.pipe
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {**text, **self.options, "generator": generators, "output_type": "latent"}
        if starts:
            options |= {"image": [start.picture for start in starts], "strength": self.strength}
            check_strength(options.setdefault("num_inference_steps", _STEPS), starts[0])
        masks = [start.mask for start in starts if start.mask is not None]
        if is_inpainting(pipe.unet, pipe.vae) and not masks:  # the whole picture is to be drawn, by the prompt alone
            size = options["width"], options["height"]
            masks = [Image.new("L", size, "white")] * len(seeds)
            options = {"image": [Image.new("RGB", size, "grey")] * len(seeds), "strength": 1.0} | options
        if masks:
            pipe = _pipeline_variant(pipe, "AutoPipelineForInpainting")
            options |= {"mask_image": masks}
        elif starts:
            pipe = _pipeline_variant(pipe, "AutoPipelineForImage2Image")
            del options["width"], options["height"]  # the picture's own
        with _vae_unchanged(pipe.vae) if starts or masks else nullcontext():
            latents: Tensor = pipe(**options).images
        return latents

    def _stages_of(self, base: Base, prompts: list[str], steps: int) -> list[Stage]:
        """The prompts as the base's `encode_text` has them, which training saw and which knows of clip_skip."""
        from sfumato.compose.per_image import texts_by_picture

        syntax, negative, told = self.syntax, self.negative, calls.CURRENT_IMAGES.get()
        in_rows = syntax == "plain" and all(base.chunk_count(prompt) == 1 for prompt in (*prompts, negative))
        if not in_rows and len(prompts) > 1 and told is not None and texts_by_picture(base):
            each = []
            for place, prompt in zip(told[0], prompts, strict=True):  # a text encoder's rows are not the pictures'
                with calls.drawing_images([place], told[1]):
                    each.append(self._stages_of(base, [prompt], steps))
            return concat_stages(each)
        if syntax == "a1111":
            return encode_stages(base, prompts, negative, steps)
        if syntax == "plain":
            text = base.encode_text(prompts)
            other = base.encode_text([negative] * len(prompts)) if negative else base.unconditional(len(prompts))
            both = type(text).cat([text, other])  # of as many tokens, as pipelines want them
            text, other = both[: len(text)], both[len(text) :]
        else:
            text, other = encode_prompts(base, prompts, negative, syntax)
        return [Stage(steps, text, other)]

    def of_one_length(self, prompts: Sequence[str], places: Sequence[int]) -> Iterable[Sequence[int]]:
        """The places, of a batch of the prompts, together those whose embeddings, each by itself, have as many tokens.

        In one batch a shorter one is filled up with empty prompts, which draw another picture than none.
        """
        base, distinct = self.base, {prompts[place]: place for place in places}
        if base is None or self.syntax == "plain" or len(distinct) == 1:
            return [places]
        lengths = {}
        for prompt, place in distinct.items():
            with _drawing(base), calls.drawing_images([place], len(prompts)):
                lengths[prompt] = self._stages_of(base, [prompt], self.drawn_steps)[0].text.hidden.shape[1]
        together: dict[int, list[int]] = {}
        for place in places:
            together.setdefault(lengths[prompts[place]], []).append(place)
        return together.values()

    def _non_finite_advice(self) -> str:
        """What to do about latents that are not finite."""
        from sfumato.compose import current

        mix, parts = current(self.pipe), self.pipe.unet.modules()
        is_mixed = mix is not None and not all(map(is_zero_weight, mix.weights.values()))
        # Hooks are those of regions, of mixes beside the layers and of what is being trained.
        if is_mixed or any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            return "Draw without adapters to see what is broken."
        if self.syntax != "plain":
            return "No adapter is in use: give words weights nearer to 1; where they have none, the base is broken."
        return (
            "No adapter is in use, so the base is broken: get it anew or name another --base; where --image is given, "
            "try --precision fp32 or another --vae, too."
        )


def _drawing(base: Base) -> AbstractContextManager[None]:
    """The context in which the base's U-Net and text encoders draw."""
    return base.precision.drawing(base.denoiser, *base.text_encoders)


_LOCKS: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()
"""By VAE, what one thread at a time holds while its pictures begin with others."""


@contextmanager
def _vae_unchanged(vae: Any) -> Iterator[None]:
    """The VAE encodes in its own dtype, in tiles where memory does not hold one image, and is itself after the block.

    Pipelines that begin with a picture give and take it in the U-Net's dtype, and SDXL's leave an fp32 VAE in half
    precision.
    Threads that share the VAE wait for one another.
    """
    with _LOCKS.setdefault(vae, RLock()):
        yield from _in_own_dtype(vae)


def _in_own_dtype(vae: Any) -> Iterator[None]:
    held = {tensor: tensor.data for tensor in (*vae.parameters(), *vae.buffers())}
    encode, own = vae.encode, vae.__dict__.get("encode")

    def as_it_fits(pixels: Tensor, *args: Any, **options: Any) -> Any:
        try:
            return encode(pixels, *args, **options)
        except RuntimeError as error:
            if len(pixels) > 1 or not may_fit_tiled(vae, error):  # of several, fewer may fit
                raise
        with tiled_vae(vae, max(pixels.shape[2:]) // pixels_per_latent(vae)):
            return encode(pixels, *args, **options)

    def in_own_dtype(pixels: Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(pixels.device.type, enabled=False):
            encoded = as_it_fits(pixels.to(vae.dtype), *args, **options)
        found = getattr(encoded, "latent_dist", None)
        if found is not None and found.parameters.dtype != pixels.dtype:  # SD's pipelines pass it on as it is
            encoded.latent_dist = type(found)(found.parameters.to(pixels.dtype))
        return encoded

    vae.encode = in_own_dtype
    try:
        yield
    finally:
        if own is None:
            del vae.encode
        else:
            vae.encode = own
        for tensor, data in held.items():
            if tensor.dtype != data.dtype:
                tensor.data = data


def _pipeline_variant(pipe: Any, name: str) -> Any:
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
        variant = with_prompt_tags(variant, pipe)
    variant.set_progress_bar_config(disable=True)
    return variant


def _as_arguments(prompts: list[str], negative: str) -> dict[str, Any]:
    """The prompts for a pipeline that encodes them itself."""
    if not negative:  # without one, SDXL takes zeros instead of an empty prompt
        return {"prompt": prompts}
    return {"prompt": prompts, "negative_prompt": [negative] * len(prompts)}


def _embedded(stage: Stage) -> dict[str, Any]:
    """A stage for a pipeline's call."""
    text, other = stage.text, stage.negative
    embedded: dict[str, Any] = {"prompt_embeds": text.hidden, "negative_prompt_embeds": other.hidden}
    if text.pooled is not None and other.pooled is not None:
        embedded |= {"pooled_prompt_embeds": text.pooled, "negative_pooled_prompt_embeds": other.pooled}
    return embedded
