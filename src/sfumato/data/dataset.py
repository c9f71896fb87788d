"""Pictures ready to be learned from: latents and text embeddings computed once, batches as pure functions.

Order, flips, dropped captions and posterior noise depend on (seed, step, place in the global batch) alone, so any
number of processes, accumulated micro-batches or restarts sees the same samples.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.data.buckets import Crop, Size, bucket_sizes
from sfumato.data.crops import Cropped, crop_example, to_mask, to_pixels
from sfumato.data.folder import Example, Folder, refuse_bad
from sfumato.data.order import Order
from sfumato.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sfumato.bases import Base, TextEmbedding

_WINDOW = 32
_ENCODED_AT_A_TIME_PX = 2**20


@dataclass(frozen=True)
class Batch:
    """A slice of a step's global batch, on the base's device.

    latents: (batch, channels, height/f, width/f) fp32, sampled from the posterior. text: the captions' embeddings, None
    where they were not asked for. captions: as used, "" where dropped. mask: (batch, 1, height/f, width/f) in [0, 1],
    or None. original_sizes, target_sizes: (height, width) and crops: (top, left) in pixels, each (batch, 2). indices:
    the pictures' places in the data set.
    """

    latents: Tensor
    text: TextEmbedding | None
    captions: list[str]
    mask: Tensor | None
    original_sizes: Tensor
    crops: Tensor
    target_sizes: Tensor
    indices: list[int]

    def __len__(self) -> int:
        return len(self.latents)

    def added(self, base: Base, text: TextEmbedding) -> dict[str, Tensor] | None:
        """SDXL's further conditions for this batch; None for the other families."""
        return base.added_conditions(text, self.original_sizes, self.crops, self.target_sizes)


@dataclass(frozen=True)
class _Item:
    """One picture's share of the data set. mean, deviation: (variants, channels, height/f, width/f), on the CPU;
    variant 1 is mirrored. mask: (variants, 1, height/f, width/f)."""

    caption: str
    crop: Crop
    mean: Tensor
    deviation: Tensor
    mask: Tensor | None


class Dataset:
    """What `prepare` made. len() is the number of pictures.

    notes: one line each, for the person. fingerprint: sha256 over file bytes, captions, masks and crops, in hex.
    """

    def __init__(
        self,
        items: Sequence[_Item],
        repeats: Sequence[int],
        prompts: Sequence[str],
        text: TextEmbedding | None,
        device: torch.device,
        *,
        caption_dropout: float,
        fingerprint: str,
        notes: Sequence[str],
    ):
        self.fingerprint, self.notes = fingerprint, list(notes)
        self._items, self._device, self._dropout = list(items), device, caption_dropout
        self._samples = [i for i, count in enumerate(repeats) for _ in range(count)]
        self._prompts = {prompt: place for place, prompt in enumerate(prompts)}
        self._text = text
        self._orders: dict[tuple[int, int], Order] = {}

    def __len__(self) -> int:
        return len(self._items)

    @property
    def captions(self) -> list[str]:
        """Each picture's caption."""
        return [item.caption for item in self._items]

    @property
    def sizes(self) -> list[Size]:
        """Each picture's (width, height) after the crop."""
        return [item.crop.size for item in self._items]

    def order(self, seed: int, step: int, batch_size: int) -> list[int]:
        """The pictures of a step's global batch, all of one size; see `sfumato.data.order.Order`."""
        key = (seed, batch_size)
        if key not in self._orders:
            self._orders[key] = Order(self._samples, self.sizes, seed, batch_size)
        return self._orders[key][step]

    def batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        first: int = 0,
        count: int | None = None,
        *,
        augment: bool = True,
    ) -> Batch:
        """Samples `first` to `first + count` of a step's global batch of `batch_size`.

        Without `augment` nothing is mirrored, no caption is dropped and the latents are the posterior's mean.
        """
        places = range(batch_size)[first : None if count is None else first + count]
        indices = [self.order(seed, step, batch_size)[place] for place in places]
        items = [self._items[index] for index in indices]
        if augment:
            variants = [self._variant(item, seed, step, place) for item, place in zip(items, places, strict=True)]
            captions = [self._caption(item, seed, step, place) for item, place in zip(items, places, strict=True)]
            noise = [
                randomness.normal(tuple(item.mean.shape[1:]), seed, "posterior", step, place)
                for item, place in zip(items, places, strict=True)
            ]
        else:
            variants, captions = [0] * len(items), [item.caption for item in items]
            noise = [torch.zeros(item.mean.shape[1:]) for item in items]
        chosen = list(zip(items, variants, strict=True))
        latents = [
            item.mean[variant] + item.deviation[variant] * sample
            for (item, variant), sample in zip(chosen, noise, strict=True)
        ]
        masks = [item.mask[variant] for item, variant in chosen if item.mask is not None]
        text = None if self._text is None else self._text[[self._prompts[caption] for caption in captions]]
        return Batch(
            torch.stack(latents).to(self._device),
            None if text is None else text.to(self._device),
            captions,
            torch.stack(masks).to(self._device) if masks else None,
            _pairs(item.crop.original for item in items),
            _pairs(item.crop.offset for item in items),
            _pairs(item.crop.size for item in items),
            indices,
        )

    def _variant(self, item: _Item, seed: int, step: int, place: int) -> int:
        mirrored = len(item.mean) > 1 and randomness.uniform(seed, "flip", step, place) < 0.5
        return int(mirrored)

    def _caption(self, item: _Item, seed: int, step: int, place: int) -> str:
        dropped = randomness.uniform(seed, "caption dropout", step, place) < self._dropout
        return "" if dropped else item.caption


def prepare(
    examples: Sequence[Example],
    base: Base,
    *,
    resolution: int,
    flip: bool = False,
    buckets: bool = True,
    bucket_step: int | None = None,
    caption_dropout: float = 0.0,
    embed_text: bool = True,
    skip_bad: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Decode, crop and encode every example once.

    resolution: side in pixels of a square picture; with `buckets` others get a shape with about as many pixels, in
    multiples of `bucket_step` (unset: what the U-Net can halve, at least a sixteenth of the side). flip: keep a
    mirrored variant of each picture, too. embed_text: keep the embeddings of the captions. skip_bad: leave out what
    cannot be decoded (unset: as `read_folder` was told). progress: called with (pictures done, pictures in all).

    Raises DataError that names the bad files, ConfigError for a resolution that the base cannot take.
    """
    if not examples:
        raise DataError("no pictures to learn from.")
    if not 0 <= caption_dropout <= 1:
        raise ConfigError(f"caption dropout is {caption_dropout}; it must be in 0 ... 1.")
    notes = list(examples.notes) if isinstance(examples, Folder) else []
    if skip_bad is None:
        skip_bad = isinstance(examples, Folder) and examples.skip_bad
    step = bucket_step or _bucket_step(base, resolution)
    if resolution < step:
        raise ConfigError(f"--resolution {resolution}: this base takes multiples of {step} px. Give {step} or more.")
    sizes = bucket_sizes(resolution, step, largest_ratio=2.0 if buckets else 1.0)
    masked = any(example.mask is not None or example.alpha_mask for example in examples)

    items: list[_Item] = []
    kept: list[Example] = []
    bad: list[str] = []
    device = torch.device("cpu")
    digest = hashlib.sha256()
    for window in _windows(examples):
        cropped: list[Cropped] = []
        fresh: list[Example] = []
        for example, result in zip(window, _crop_all(window, sizes, base.vae_factor), strict=True):
            if isinstance(result, DataError):
                bad.append(str(result))
                continue
            fresh.append(example)
            cropped.append(result)
            _digest_into(digest, example, result.crop)
        if bad and not skip_bad:
            continue  # the rest is only decoded, so that all bad files are named at once
        encoded, device = _encode(base, fresh, cropped, flip=flip, masked=masked)
        items.extend(encoded)
        kept.extend(fresh)
        for result in cropped:
            notes.extend(result.notes)
        if progress:
            progress(len(items) + len(bad), len(examples))
    refuse_bad(bad, len(examples), skip_bad)
    notes.extend(f"left out: {reason}" for reason in bad)
    notes.extend(_crop_notes(kept, items))

    captions = [item.caption for item in items]
    prompts = [*dict.fromkeys(filter(None, captions)), *([""] if caption_dropout or "" in captions else [])]
    notes.extend(_cut_notes(base, prompts))
    return Dataset(
        items,
        [example.repeats for example in kept],
        prompts,
        _embed(base, prompts) if embed_text else None,
        device,
        caption_dropout=caption_dropout,
        fingerprint=digest.hexdigest(),
        notes=notes,
    )


def _bucket_step(base: Base, resolution: int) -> int:
    """Pixels that a side must be a multiple of: the U-Net halves the latents at each level but the last."""
    levels = len(base.unet.config.block_out_channels)
    halved = int(base.vae_factor * 2 ** (levels - 1))
    return max(halved, resolution // 16 // halved * halved)


def _windows(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """A few dozen at a time, so that memory does not grow with the folder."""
    for start in range(0, len(examples), _WINDOW):
        yield list(examples[start : start + _WINDOW])


def _crop_all(examples: Sequence[Example], sizes: list[Size], vae_factor: int) -> list[Cropped | DataError]:
    """Each example's crop, or what is wrong with it; on all cores, since Pillow lets go of the interpreter."""

    def crop(example: Example) -> Cropped | DataError:
        try:
            return crop_example(example, sizes, vae_factor)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(crop, examples))


def _encode(
    base: Base, examples: Sequence[Example], cropped: Sequence[Cropped], *, flip: bool, masked: bool
) -> tuple[list[_Item], torch.device]:
    """The items of some crops, in their order, and the device that the VAE answered on."""
    found: dict[int, _Item] = {}
    device = torch.device("cpu")
    for places in _alike(cropped):
        pixels = torch.stack([to_pixels(cropped[place].image) for place in places])
        mean, deviation = base.encode_pixels(torch.cat([pixels, pixels.flip(-1)]) if flip else pixels)
        device = mean.device
        if not torch.isfinite(mean).all() or not torch.isfinite(deviation).all():
            names = ", ".join(examples[place].path.name for place in places[:3])
            raise DataError(f"{names}: the VAE's latents are not finite. Use --precision fp32, or another --vae.")
        mean, deviation = mean.float().cpu(), deviation.float().cpu()
        for row, place in enumerate(places):
            rows = [row, row + len(places)] if flip else [row]
            mask = None
            if masked:
                small = (mean.shape[-1], mean.shape[-2])
                mask = to_mask(cropped[place].mask, small)
                mask = torch.stack([mask, mask.flip(-1)] if flip else [mask])
            found[place] = _Item(examples[place].caption, cropped[place].crop, mean[rows], deviation[rows], mask)
    return [found[place] for place in range(len(cropped))], device


def _alike(cropped: Sequence[Cropped]) -> Iterator[list[int]]:
    """The places of crops of one size, at most about a megapixel together."""
    by_size: dict[Size, list[int]] = {}
    for place, result in enumerate(cropped):
        by_size.setdefault(result.crop.size, []).append(place)
    for (width, height), places in by_size.items():
        most = max(1, _ENCODED_AT_A_TIME_PX // (width * height))
        for start in range(0, len(places), most):
            yield places[start : start + most]


def _embed(base: Base, prompts: Sequence[str]) -> TextEmbedding:
    """The prompts' embeddings on the CPU; an empty prompt comes last."""
    with torch.no_grad(), warnings.catch_warnings():
        # What is cut is said in the notes, with the file's name.
        warnings.filterwarnings("ignore", message="prompt of")
        written = [prompt for prompt in prompts if prompt]
        parts = [base.encode_text(written[start : start + _WINDOW]) for start in range(0, len(written), _WINDOW)]
        if len(written) < len(prompts):
            # A dropped caption is what guidance calls "no prompt", which is not the same for every family.
            parts.append(base.unconditional(1))
        parts = [part.to("cpu") for part in parts]
    return type(parts[0]).cat(parts)


def _cut_notes(base: Base, prompts: Sequence[str]) -> Iterator[str]:
    for prompt in prompts:
        if cut := base.cut_off(prompt):
            yield f"caption longer than {base.token_limit} tokens; its end is not seen: ... {cut!r}"


def _crop_notes(examples: Sequence[Example], items: Sequence[_Item]) -> Iterator[str]:
    small = [example.path.name for example, item in zip(examples, items, strict=True) if item.crop.scale > 1]
    cut = [example.path.name for example, item in zip(examples, items, strict=True) if item.crop.kept < 0.75]
    if small:
        yield f"{len(small)} of {len(items)} pictures are smaller than is learned, so they are enlarged: {_some(small)}"
    if cut:
        yield f"{len(cut)} of {len(items)} pictures lose more than a quarter to the crop: {_some(cut)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _digest_into(digest: Any, example: Example, crop: Crop) -> None:
    for path in (example.path, example.mask):
        if path is None:
            continue
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(repr((example.caption, example.repeats, example.alpha_mask, crop.box, crop.size)).encode())


def _pairs(sizes: Iterator[Size]) -> Tensor:
    """(batch, 2) of (height, width), from (width, height)."""
    return torch.tensor([(second, first) for first, second in sizes])
