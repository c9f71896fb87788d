"""What a preparation knows of pictures by their files' headers alone, before hours are spent on decoding them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from sfumato.data.buckets import Crop, Size, Sizes, checked_sizes, choose_crop, side_step, sizes_of_resolution
from sfumato.data.checksums import file_digest
from sfumato.data.folder import Example
from sfumato.data.images import upright_size
from sfumato.data.preparation.cache import Cache, cache_key, decoder_versions, weights_digest
from sfumato.data.preparation.dataset import BatchOrder
from sfumato.data.preparation.prefetch import prefetch
from sfumato.errors import DataError
from sfumato.utils.formatting import pluralize

if TYPE_CHECKING:
    from sfumato.models import Base

WINDOW = 32
"""Pictures that are encoded together, while as many are decoded."""
MOST_VARIANTS = 2048
"""Random crops, mirrored or not, that are encoded beforehand; beyond that, pixels are kept and encoded in the loop."""
KEPT_BYTES = 2**28
"""Of latents in memory if there is a cache; with more, all stay in its mapped files."""

HeaderCrops = Sequence[tuple[Example, Crop]]
"""Each example whose file can be read, and its crop."""


@dataclass(frozen=True)
class PreparationPlan:
    """How pictures become tensors; what the keys of the cache depend on, besides the files.

    in_loop: whether random crops are left to the loop. weights, dtype: of the VAE. keeps_pixels: whether pixels are
    kept beside the latents.
    """

    sizes: Sizes
    vae_factor: int
    in_loop: bool
    weights: str
    dtype: str
    keeps_pixels: bool = False


def square_side(base: Base, resolution: int) -> int:
    """The side, in pixels, of the square that pictures of a `resolution` are cropped to.

    Raises ConfigError for one that the base cannot take.
    """
    ((side, _),) = checked_sizes(resolution, bucket_step(base, resolution), buckets=False)
    return side


def bucket_step(base: Base, resolution: int) -> int:
    """`side_step` of this base."""
    return side_step(base.vae_factor, base.levels, resolution)


def sizes_of(examples: Iterable[Example], base: Base, *, buckets: bool) -> Sizes:
    """The shapes for the resolutions of the examples, which all say theirs. Raises ConfigError for one that the base
    cannot take."""
    asked = {side for example in examples if (side := example.options.resolution) is not None}
    return {side: checked_sizes(side, bucket_step(base, side), buckets=buckets) for side in sorted(asked)}


def crops_from_headers(examples: Sequence[Example], sizes: Sizes, vae_factor: int) -> Iterator[tuple[Example, Crop]]:
    """The examples with their crops, by what their files' headers say."""
    for example in examples:
        with suppress(DataError):  # said when it is decoded
            yield example, crop_from_header(example, sizes_of_resolution(sizes, example.options.resolution), vae_factor)


def crop_from_header(example: Example, sizes: list[Size], vae_factor: int) -> Crop:
    """The crop that `crop_example` makes, by the file's header."""
    return choose_crop(example, upright_size(example.path), sizes, vae_factor)


def make_plan(foreseen: HeaderCrops, sizes: Sizes, base: Base, store: Cache | None) -> PreparationPlan:
    """The plan for pictures of these sizes. store: the VAE's weights are digested for its keys alone."""
    vae = getattr(base, "vae", None)
    weights = weights_digest([vae]) if store and vae is not None else ""
    dtype = str(getattr(vae, "dtype", None))
    return PreparationPlan(
        sizes, base.vae_factor, _has_too_many_crops(foreseen), weights, dtype, keeps_pixels=base.inpaints
    )


def _has_too_many_crops(foreseen: HeaderCrops) -> bool:
    """Whether the random crops are too many to be encoded beforehand."""
    random = [(example, crop) for example, crop in foreseen if example.options.crop == "random"]
    return sum(crop.variants(example.options.flip) for example, crop in random) > MOST_VARIANTS


def early_notes(
    foreseen: HeaderCrops,
    plan: PreparationPlan,
    store: Cache | None,
    base: Base,
    will_draw: tuple[int, int, int] | None,
    together: int | None,
) -> Iterator[str]:
    """What the person should know before hours are spent on it."""
    if will_draw is not None and foreseen:
        seed, steps, batch = will_draw
        samples = [place for place, (example, _) in enumerate(foreseen) for _ in range(example.repeats)]
        order = BatchOrder(samples, [crop.size for _, crop in foreseen], seed, batch, together or batch)
        if unseen := order.unseen(steps):
            yield (
                f"{unseen} of {pluralize(len(foreseen), 'image')} come in none of the {steps} steps; more steps learn "
                "from all."
            )
    size = sum(_bytes_of(example, crop, plan, base) for example, crop in foreseen)
    if size > KEPT_BYTES and store is None:
        yield f"latents take {size / 2**20:,.0f} MiB of memory; --cache DIR keeps them on disk"
    elif size > KEPT_BYTES:
        yield f"latents take {size / 2**20:,.0f} MiB and stay on disk, memory-mapped"


def require_cache_space(foreseen: HeaderCrops, plan: PreparationPlan, store: Cache, base: Base) -> None:
    """Raise DataError, before hours are spent on them, where the disk has no room for the latents that the cache
    lacks."""
    sizes = [_bytes_of(example, crop, plan, base) for example, crop in foreseen]
    try:
        store.require_space(sum(sizes))
    except DataError:  # the files are read only here, to know what is in the cache

        def is_there(seen: tuple[Example, Crop]) -> bool:
            return store.has("latents", latents_key(seen[0], [file_digest(path) for path in seen[0].files], plan))

        there = prefetch(foreseen, is_there, window=WINDOW, pixels=lambda _: 0)
        if lacking := sum(size for size, found in zip(sizes, there, strict=True) if not found):
            store.require_space(lacking)


def _bytes_of(example: Example, crop: Crop, plan: PreparationPlan, base: Base) -> int:
    """What the tensors of a picture take."""
    masked = example.mask is not None or example.alpha_mask or crop.inside is not None
    mask = math.prod(crop.resized) // plan.vae_factor**2 if masked else 0
    pixels = 3 * math.prod(crop.resized)
    if plan.in_loop and crop.positions > 1:
        return pixels + mask
    numbers: int = 2 * base.latent_channels * math.prod(crop.size) // plan.vae_factor**2
    latents = crop.variants(example.options.flip) * numbers * torch.float32.itemsize
    return latents + mask + pixels * plan.keeps_pixels


def latents_key(example: Example, content: Sequence[str], plan: PreparationPlan) -> str:
    """The name of an example's latents in the cache. content: digests of its files."""
    told = asdict(plan) | {"sizes": sizes_of_resolution(plan.sizes, example.options.resolution)}
    if not plan.keeps_pixels:
        del told["keeps_pixels"]  # as before there was any that does
    return cache_key(
        kind="latents",
        files=list(content),
        alpha=example.alpha_mask,
        crop=example.options.crop,
        flip=example.options.flip,
        decoders=decoder_versions(),
        torch=torch.__version__,
        **told,
    )
