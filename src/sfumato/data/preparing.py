"""Examples -> a data set: everything decoded, cropped and encoded once, before the loop."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfumato.data.buckets import Crop, Size, checked_sizes, fit_crop, nearest_bucket, side_step
from sfumato.data.cache import (
    Cache,
    Entry,
    crop_from_text,
    crop_to_text,
    decoders,
    key_of,
    weights_digest,
)
from sfumato.data.checksums import file_digest, refuse_changed
from sfumato.data.crops import OPAQUE, Cropped, crop_example
from sfumato.data.dataset import Dataset, crops_move, middles_of
from sfumato.data.folder import (
    Example,
    ExampleSet,
    cut_captions,
    labelled,
    labels_of,
    refuse_bad,
    without_alpha,
    without_trigger,
)
from sfumato.data.images import pixels_of, upright_size
from sfumato.data.latents import PreparedPicture, encode, keep_pixels
from sfumato.data.listing import grouped, some
from sfumato.data.options import CropMode, Options
from sfumato.data.order import Order
from sfumato.data.prefetch import prefetch
from sfumato.data.tags import count_forms, forms
from sfumato.data.texts import CaptionEmbeddings
from sfumato.errors import DataError
from sfumato.files.read import stamp
from sfumato.numerals import pluralize

if TYPE_CHECKING:
    from sfumato.bases import Base

_WINDOW = 32
"""Pictures that are encoded together, while as many are decoded."""
MOST_VARIANTS = 2048
"""Random crops, mirrored or not, that are encoded beforehand; beyond that, pixels are kept and encoded in the loop."""
MOST_FORMS = 512
"""Forms of all captions that are embedded where the steps to come are unknown."""
KEPT_BYTES = 2**28
"""Of latents in memory if there is a cache; with more, all stay in its mapped files."""


@dataclass(frozen=True)
class _Done:
    """One example. label: its name, unlike the others'. digest: of its file and mask. result: decoded, found in the
    cache, or only the crop where nothing asks for the pixels."""

    example: Example
    label: str
    digest: str
    key: str
    result: Cropped | Entry | Crop


@dataclass(frozen=True)
class _Plan:
    """How pictures become tensors; what the keys of the cache depend on, besides the files.

    in_loop: whether random crops are left to the loop. weights, dtype: of the VAE.
    """

    sizes: list[Size]
    vae_factor: int
    in_loop: bool
    weights: str
    dtype: str


def prepare(
    examples: Sequence[Example],
    base: Base,
    *,
    resolution: int,
    flip: bool = False,
    crop: CropMode = "center",
    buckets: bool = True,
    caption_dropout: float = 0.0,
    shuffle_tags: bool = False,
    keep_tags: int = 0,
    tag_dropout: float = 0.0,
    embed_text: bool = True,
    will_draw: tuple[int, int, int] | None = None,
    together: int | None = None,
    cache: Path | None = None,
    drawn_over: bool = False,
    measured: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Dataset:
    """Decode, crop and encode every example once.

    resolution: side in pixels of a square picture; with `buckets` others get a shape with about as many pixels, in
    multiples of what the U-Net can halve, at least a sixteenth of the side. flip, crop,
    caption_dropout, shuffle_tags, keep_tags, tag_dropout: for the examples whose `Options` do not say it themselves.
    embed_text: keep the embeddings of the captions. will_draw: (seed, steps, global batch) of the run to come, so that
    exactly the captions it will draw are embedded, however many forms they have; others are encoded when a batch asks
    for them. together: how many samples of a step must be of one size, those of a call of the U-Net; unset, all.
    cache: a folder for latents and embeddings, where they are found again. drawn_over: whether `views` will be asked
    for, so that what it refuses is refused before anything is decoded. measured: how many pictures `middles` will be
    asked for, where that is all; of the others only the files are looked at, unless `skip_bad`. progress: called with
    "images" or "captions", and how many of how many are done. say: told, before anything is decoded, how many pictures
    come in no step and what memory the latents take; unset, the notes tell.

    Raises DataError that names the bad files, ConfigError for a resolution that the base cannot take.
    """
    if not examples:
        raise DataError("no images to learn from; give a folder that holds some.")
    defaults = Options(flip, crop, caption_dropout, shuffle_tags, keep_tags, tag_dropout)
    defaults.check()
    notes = list(examples.notes) if isinstance(examples, ExampleSet) else []
    skip_bad = isinstance(examples, ExampleSet) and examples.skip_bad
    examples = [replace(example, options=example.options.over(defaults)) for example in examples]
    sizes = checked_sizes(resolution, _bucket_step(base, resolution), buckets=buckets)
    asked = set(range(len(examples)))
    if measured is not None and not skip_bad:  # of those that bad ones leave, others would be drawn
        asked = set(middles_of(len(examples), measured))
    foreseen = list(_foreseen([examples[place] for place in sorted(asked)], sizes, base.vae_factor))
    if drawn_over and any(crop.positions > 1 for _, crop in foreseen):
        raise crops_move()
    store = None if cache is None else Cache(cache)
    plan = _plan_of(foreseen, sizes, base, store)
    for note in _early_notes(foreseen, plan, store, base, will_draw, together):
        (say or notes.append)(note)
    if store:
        _require_space(foreseen, plan, store, base)
    tell = progress or _tell_nobody
    gathered = _gathered(examples, asked, plan, store, base, skip_bad, tell)
    items = gathered.items
    refuse_bad(gathered.bad, len(examples), skip_bad)
    notes.extend(_notes(gathered, plan, base))
    device = base.precision.device if hasattr(base, "precision") else torch.device("cpu")
    dataset = Dataset(
        items,
        gathered.repeats,
        device,
        base.encode_pixels,
        fingerprint=gathered.digest.hexdigest(),
        contents=gathered.contents,
        notes=notes,
        together=together,
    )
    if embed_text:
        texts = CaptionEmbeddings(base, store)
        dataset.notes.extend(_embed(texts, dataset, items, will_draw, tell))
        dataset.embed(texts)
    return dataset


def square_side(base: Base, resolution: int) -> int:
    """The side, in pixels, of the square that pictures of a `resolution` are cropped to.

    Raises ConfigError for one that the base cannot take.
    """
    ((side, _),) = checked_sizes(resolution, _bucket_step(base, resolution), buckets=False)
    return side


def _bucket_step(base: Base, resolution: int) -> int:
    return side_step(base.vae_factor, len(base.unet.config.block_out_channels), resolution)


def _foreseen(examples: Sequence[Example], sizes: list[Size], vae_factor: int) -> Iterator[tuple[Example, Crop]]:
    """The examples with their crops, by what their files' headers say."""
    for example in examples:
        with suppress(DataError):  # said when it is decoded
            yield example, _crop_of(example, sizes, vae_factor)


def _crop_of(example: Example, sizes: list[Size], vae_factor: int) -> Crop:
    """The crop that `crop_example` makes, by the file's header."""
    size = upright_size(example.path)
    return fit_crop(size, nearest_bucket(size, sizes), example.options.crop or "center", vae_factor)


def _plan_of(foreseen: Sequence[tuple[Example, Crop]], sizes: list[Size], base: Base, store: Cache | None) -> _Plan:
    vae = getattr(base, "vae", None)
    weights = weights_digest([vae]) if store and vae is not None else ""
    return _Plan(sizes, base.vae_factor, _too_many(foreseen), weights, str(getattr(vae, "dtype", None)))


def _too_many(foreseen: Sequence[tuple[Example, Crop]]) -> bool:
    """Whether the random crops are too many to be encoded beforehand."""
    random = [(example, crop) for example, crop in foreseen if example.options.crop == "random"]
    return sum(crop.positions * (2 if example.options.flip else 1) for example, crop in random) > MOST_VARIANTS


def _early_notes(
    foreseen: Sequence[tuple[Example, Crop]],
    plan: _Plan,
    store: Cache | None,
    base: Base,
    will_draw: tuple[int, int, int] | None,
    together: int | None,
) -> Iterator[str]:
    """What the person should know before hours are spent on it."""
    if will_draw is not None and foreseen:
        seed, steps, batch = will_draw
        samples = [place for place, (example, _) in enumerate(foreseen) for _ in range(example.repeats)]
        order = Order(samples, [crop.size for _, crop in foreseen], seed, batch, together or batch)
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


def _require_space(foreseen: Sequence[tuple[Example, Crop]], plan: _Plan, store: Cache, base: Base) -> None:
    """Raise DataError, before hours are spent on them, where the disk has no room for the latents that the cache
    lacks."""
    sizes = [_bytes_of(example, crop, plan, base) for example, crop in foreseen]
    try:
        store.require_space(sum(sizes))
    except DataError:  # the files are read only here, to know what is in the cache

        def is_there(seen: tuple[Example, Crop]) -> bool:
            return store.has("latents", _key_of(seen[0], [file_digest(path) for path in seen[0].files], plan))

        there = prefetch(foreseen, is_there, window=_WINDOW, pixels=lambda _: 0)
        if lacking := sum(size for size, found in zip(sizes, there, strict=True) if not found):
            store.require_space(lacking)


def _bytes_of(example: Example, crop: Crop, plan: _Plan, base: Base) -> int:
    """What the tensors of a picture take."""
    masked = example.mask is not None or example.alpha_mask or crop.inside is not None
    mask = math.prod(crop.resized) // plan.vae_factor**2 if masked else 0
    if plan.in_loop and crop.positions > 1:
        return 3 * math.prod(crop.resized) + mask
    variants = crop.positions * (2 if example.options.flip else 1)
    numbers: int = 2 * base.unet.config.in_channels * math.prod(crop.size) // plan.vae_factor**2
    return variants * numbers * torch.float32.itemsize + mask


@dataclass
class _Gathered:
    """The pictures as tensors. repeats: of each. bad: the reasons of those that are left out. digest: over all that is
    learned from; contents: of each picture by its name. nbytes: of the tensors, where they stay in memory."""

    items: list[PreparedPicture] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    contents: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0


def _gathered(
    examples: Sequence[Example],
    asked: Container[int],
    plan: _Plan,
    store: Cache | None,
    base: Base,
    skip_bad: bool,
    tell: Callable[[str, int, int], None],
) -> _Gathered:
    """The examples in their order, those whose places are asked for decoded and encoded a few dozen at a time."""
    found = _Gathered()
    tell("images", 0, len(examples))
    labels = labels_of([example.path for example in examples])
    read = prefetch(
        zip(examples, labels, (place in asked for place in range(len(examples))), strict=True),
        lambda named: _read(*named, plan, store),
        window=_WINDOW,
        pixels=lambda named: pixels_of(named[0].path),
    )
    while window := list(islice(read, _WINDOW)):
        found.bad.extend(str(done) for done in window if isinstance(done, DataError))
        good = [done for done in window if isinstance(done, _Done)]
        if found.bad and not skip_bad:
            continue  # the rest is only decoded, so that all bad files are named at once
        shown = partial(_tell_share, tell, len(found.items) + len(found.bad), len(good), len(examples))
        fresh, words = _items(good, plan, store, base, shown)
        found.notes.extend(words)
        for done, item in zip(good, fresh, strict=True):
            learned = _learned(done, item.crop)
            found.digest.update(repr(learned).encode())
            found.contents[_unlike(done.label, found.contents)] = f"{_short(learned[0])} {_short(repr(learned[1:]))}"
        found.repeats.extend(done.example.repeats for done in good)
        found.items.extend(fresh)
        found.nbytes += sum(item.nbytes for item in fresh)
        if store and found.nbytes > KEPT_BYTES:
            for item in found.items:
                item.tensors = None
    tell("images", len(found.items) + len(found.bad), len(examples))
    return found


def _unlike(label: str, others: Container[str]) -> str:
    """The label, numbered where there is one such already: a picture may be in two sources."""
    return next(each for each in chain((label,), (f"{label} #{n}" for n in count(2))) if each not in others)


def _tell_share(tell: Callable[[str, int, int], None], before: int, these: int, count: int, part: float) -> None:
    """Tell that of `these` pictures, which come after those before, a part of 0 to 1 is encoded."""
    tell("images", before + int(part * these), count)


def _tell_nobody(what: str, done: int, count: int) -> None:
    """The progress of a call that asks for none."""


def _read(example: Example, label: str, asked: bool, plan: _Plan, store: Cache | None) -> _Done | DataError:
    """The example's crop, with its pixels or from the cache if it is asked for, or what is wrong with it."""
    try:
        files = example.files
        before = [stamp(path.stat()) for path in files]
        content = [file_digest(path) for path in files]
        for path, wanted, found in zip(files, example.checksums, content, strict=False):
            refuse_changed(path, wanted, found)
        if not asked:
            crop = _crop_of(example, plan.sizes, plan.vae_factor)
            return _Done(example, label, "".join(content), "", crop)
        key = _key_of(example, content, plan)
        result: Cropped | Entry | None = store.find("latents", key) if store else None
        if result is None:
            result = crop_example(example, plan.sizes, plan.vae_factor, example.options.crop or "center")
            if [stamp(path.stat()) for path in files] != before:
                raise DataError(f"{example.path.name}: the file changed while it was read. Start again.")
        return _Done(example, label, "".join(content), key, result)
    except DataError as error:
        return DataError(labelled(str(error), example.path, label))


def _key_of(example: Example, content: Sequence[str], plan: _Plan) -> str:
    return key_of(
        kind="latents",
        files=list(content),
        alpha=example.alpha_mask,
        crop=example.options.crop,
        flip=example.options.flip,
        decoders=decoders(),
        torch=torch.__version__,
        **asdict(plan),
    )


def _items(
    good: Sequence[_Done], plan: _Plan, store: Cache | None, base: Base, shown: Callable[[float], None]
) -> tuple[list[PreparedPicture], list[str]]:
    """The items of some examples, in their order, and what was said while they were decoded. shown: told which part of
    the encoding is done."""
    missing = [done for done in good if isinstance(done.result, Cropped)]
    computed = dict(zip((id(done) for done in missing), _tensors(missing, plan, base, shown), strict=True))
    items: list[PreparedPicture] = []
    notes: list[str] = []
    for done in good:
        options = done.example.options
        entry: Entry | None = None
        if isinstance(done.result, Crop):
            tensors, crop, words = None, done.result, []
        elif isinstance(done.result, Entry):
            entry = done.result
            tensors = done.result.tensors()
            crop = crop_from_text(done.result.metadata["crop"])
            words = json.loads(done.result.metadata["notes"])
        else:
            tensors, crop, words = computed[id(done)], done.result.crop, list(done.result.notes)
            described = {"crop": crop_to_text(crop), "notes": json.dumps(words)}
            entry = store.write("latents", done.key, tensors, described) if store else None
        # The notes name the file, and the cache knows contents only.
        notes.extend(f"{done.label}: {word.partition(': ')[2]}" for word in words)
        items.append(
            PreparedPicture(
                done.label,
                done.example.caption,
                options,
                crop,
                bool(options.flip),
                tensors,
                entry,
                done.example.further,
            )
        )
    return items, notes


def _tensors(
    missing: Sequence[_Done], plan: _Plan, base: Base, shown: Callable[[float], None]
) -> list[dict[str, torch.Tensor]]:
    cropped = [done.result for done in missing if isinstance(done.result, Cropped)]
    late = [plan.in_loop and result.crop.positions > 1 for result in cropped]
    now = [place for place, is_late in enumerate(late) if not is_late]
    encoded = encode(
        [cropped[place] for place in now],
        [missing[place].label for place in now],
        [bool(missing[place].example.options.flip) for place in now],
        base.encode_pixels,
        shown,
    )
    found = dict(zip(now, encoded, strict=True))
    return [found[place] if place in found else keep_pixels(cropped[place]) for place in range(len(cropped))]


def _learned(done: _Done, crop: Crop) -> tuple[Any, ...]:
    """All of an example that what is learned depends on; first its files."""
    example = done.example
    learned = done.digest, example.caption, example.repeats, example.alpha_mask, example.options, crop
    return (*learned, example.further) if example.further else learned


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _embed(
    texts: CaptionEmbeddings,
    dataset: Dataset,
    items: Sequence[PreparedPicture],
    will_draw: tuple[int, int, int] | None,
    tell: Callable[[str, int, int], None],
) -> Iterator[str]:
    """Embed what will be drawn, if that can be known and kept; lines for the person."""
    whole = {caption for item in items for caption in item.captions}
    if will_draw is not None:
        wanted = dataset.drawn_captions(*will_draw)
    else:
        wanted = set(whole)
        told = [(caption, item.options) for item in items for caption in item.captions]
        count = sum(count_forms(caption, options) for caption, options in told)
        if count <= MOST_FORMS:
            wanted |= {form for caption, options in told for form in forms(caption, options)}
        elif any(item.options.varies_caption for item in items):
            yield f"tags vary in {count:,} ways, more than are embedded beforehand; captions are encoded in the loop"
    # Of those whose tags vary another run would draw others: the cache would grow, and hardly be read.
    lasting = wanted & whole
    passing = wanted - lasting
    for captions, is_lasting in ((lasting, True), (passing, False)):
        if texts.fits(captions, cached=is_lasting):
            # Sorted, so that equal runs encode in equal batches.
            texts.compute(sorted(captions), partial(tell, "captions"), cached=is_lasting)
        else:
            yield f"{len(captions):,} captions are too many to keep in memory; they are encoded in the loop"


def _notes(gathered: _Gathered, plan: _Plan, base: Base) -> Iterator[str]:
    """What the person should know of the pictures and captions."""
    items = gathered.items
    opaque = [note.removesuffix(f": {OPAQUE}") for note in gathered.notes if note.endswith(OPAQUE)]
    yield from grouped(note for note in gathered.notes if not note.endswith(OPAQUE))
    if opaque:
        yield without_alpha(opaque)
    yield from (f"left out: {reason}" for reason in gathered.bad)
    yield from _crop_notes(items)
    if plan.in_loop:
        yield "random crops are too many to be encoded beforehand; pixels are kept and encoded in the loop"
    if note := _cut_note(base, items):
        yield note
    if note := without_trigger((item.name, caption) for item in items for caption in item.captions):
        yield note


def _cut_note(base: Base, items: Sequence[PreparedPicture]) -> str:
    first = {caption: item for item in reversed(items) for caption in item.captions}  # of several with one caption
    ends = {item.name: cut for caption, item in reversed(first.items()) if (cut := base.cut_off(caption))}
    return cut_captions(ends, base.token_limit, varies=any(item.options.varies_caption for item in first.values()))


def _crop_notes(items: Sequence[PreparedPicture]) -> Iterator[str]:
    small = [item.name for item in items if item.crop.scale > 1]
    cut = [item.name for item in items if item.crop.kept < 0.75]
    if small:
        yield f"{len(small)} of {len(items)} images are smaller than is learned, so they are enlarged: {some(small)}"
    if cut:
        yield f"{len(cut)} of {len(items)} images lose more than a quarter to the crop: {some(cut)}"
