"""Latents to pictures: in fp32 where half precision breaks them, never a black one, past the safety checker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import BaseModelError, is_out_of_memory
from sfumato.precision.memory import release_freed_memory

_TILE = 64
"""Latent pixels of a tile's side, 512 px on SD: the VAEs' own tiles are as large as their families' usual pictures."""
_DECODED_AT_ONCE = 4096
"""Latent pixels: one picture of 512 px on SD 1.x, whose decoding takes more memory than all else of its drawing."""


def decode_batch_size(latents: Tensor) -> int:
    """How many pictures of such latents, (batch, channels, height/f, width/f), a GPU decodes at once."""
    return max(1, _DECODED_AT_ONCE // latents[0, 0].numel())


def decode_latents(pipe: Any, latents: Tensor, seeds: list[int]) -> Tensor:
    """Pixels of scaled latents, fp32, (batch, 3, height, width); -1 is black, 1 is white.

    Raises BaseModelError for a picture that is black or not finite in fp32, too, with its seed.
    """
    pixels = _decode(pipe, latents)
    if not is_valid_image(pixels).all() and pipe.vae.dtype != torch.float32:
        with upcast_to_fp32(pipe.vae):
            pixels = _decode(pipe, latents)
    broken = "black or not finite, even in fp32. The VAE is broken; name another with --vae."
    check_images(is_valid_image(pixels), seeds, broken)
    return pixels


def _decode(pipe: Any, latents: Tensor) -> Tensor:
    """On a GPU few pictures at once, and in tiles where its memory does not hold one."""
    if latents.device.type == "cpu":
        return _decode_at_once(pipe, latents)
    try:
        some = torch.split(latents, decode_batch_size(latents))
        return torch.cat([_decode_at_once(pipe, each) for each in some])
    except RuntimeError as error:
        if not may_fit_tiled(pipe.vae, error):
            raise
    # Here, where the error is gone, and what its frames held.
    with tiled_vae(pipe.vae, max(latents.shape[2:])):
        return torch.cat([_decode_at_once(pipe, each) for each in torch.split(latents, 1)])


def may_fit_tiled(vae: Any, error: BaseException) -> bool:
    """Whether what the VAE failed at may fit into memory in tiles."""
    can_tile = hasattr(vae, "tile_latent_min_size") and not getattr(vae, "use_tiling", False)
    return can_tile and is_out_of_memory(error)


@contextmanager
def tiled_vae(vae: Any, longest: int) -> Iterator[None]:
    """The VAE works in overlapping tiles, of at most half of the image's longest side, which is in latent pixels."""
    release_freed_memory()
    side = min(_TILE, -(-longest // 2))
    own = vae.tile_latent_min_size, vae.tile_sample_min_size
    vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * pixels_per_latent(vae)
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = own


def pixels_per_latent(vae: Any) -> int:
    """Pixels on the side of a latent pixel of a VAE that tiles."""
    ratio: int = round(vae.tile_sample_min_size / vae.tile_latent_min_size)
    return ratio


@torch.no_grad()
def _decode_at_once(pipe: Any, latents: Tensor) -> Tensor:
    from diffusers.utils.torch_utils import get_module_execution_device

    from sfumato.models.base import latent_scale

    shift, scale = latent_scale(pipe.vae, latents.device)
    encoded = latents.float() / scale + shift
    encoded = encoded.to(get_module_execution_device(pipe.vae), pipe.vae.dtype)
    pixels: Tensor = pipe.vae.decode(encoded, return_dict=False)[0]
    return pixels.float()


def is_valid_image(pixels: Tensor) -> Tensor:
    """(batch, 1), of pixels in [-1, 1]: finite, and not black in every pixel."""
    flat = pixels.flatten(1)
    return (flat.isfinite().all(1) & (flat.amax(1) > -1 + 1 / 255)).unsqueeze(1)


def check_images(good: Tensor, seeds: list[int], complaint: str) -> None:
    """Raises BaseModelError, with the complaint and the first seed, where any of a picture's values in `good` is False.

    good: (batch, ...) or (batch,), a row for each picture.
    """
    bad = [seed for seed, fine in zip(seeds, good.reshape(len(good), -1).all(1).tolist(), strict=True) if not fine]
    if bad:
        raise BaseModelError(f"{len(bad)} of {len(seeds)} images (seed {bad[0]}) came out {complaint}")


def to_pil(pixels: Tensor) -> Image.Image:
    """A picture of (3, height, width) pixels in [-1, 1]."""
    values = (pixels.clamp(-1, 1) / 2 + 0.5).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def check_safety(pictures: list[Image.Image], pipe: Any, seeds: list[int]) -> list[Image.Image]:
    """The pictures as they are. Raises BaseModelError where the pipeline has a safety checker that flags one."""
    if getattr(pipe, "safety_checker", None) is None:
        return pictures
    inputs = pipe.feature_extractor(pictures, return_tensors="pt").pixel_values
    device, dtype = pipe.safety_checker.device, pipe.safety_checker.dtype
    blank = [torch.zeros(1) for _ in pictures]
    _, flagged = pipe.safety_checker(images=blank, clip_input=inputs.to(device, dtype))
    check_images(~torch.tensor(flagged), seeds, "flagged by the pipeline's safety checker. Try another prompt or seed.")
    return pictures


@contextmanager
def upcast_to_fp32(*modules: Any) -> Iterator[None]:
    """The modules in fp32, and back in their own dtypes, which loses nothing."""
    before = [(module, module.dtype) for module in modules if module is not None]
    try:
        for module, _ in before:
            module.float()
        yield
    finally:
        for module, dtype in before:
            module.to(dtype)
