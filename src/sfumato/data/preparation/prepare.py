"""Examples -> a data set: everything decoded, cropped and encoded once, before the loop.

Examples -> tensors: decoded, cropped and encoded a few dozen at a time, or taken from the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfumato.data.buckets import OPAQUE, Crop, Cropped, crop_example, sizes_of_resolution
from sfumato.data.checksums import file_digest, refuse_changed
from sfumato.data.folder import (
    Example,
    ExampleSet,
    missing_trigger_note,
    no_alpha_note,
    refuse_bad_pictures,
    replace_label,
    truncated_captions_note,
    unique_labels,
)
from sfumato.data.images import pixels_of
from sfumato.data.listing import group_notes
from sfumato.data.options import CropMode, Options
from sfumato.data.preparation import planning
from sfumato.data.preparation.cache import Cache, Entry, crop_from_text, crop_to_text
from sfumato.data.preparation.dataset import Dataset, center_view_indices, random_crops_note
from sfumato.data.preparation.latents import WHOLE_SHARE, InpaintingMasks, PreparedPicture, encode_crops, keep_pixels
from sfumato.data.preparation.planning import (
    WINDOW,
    PreparationPlan,
    crop_from_header,
    crops_from_headers,
    early_notes,
    latents_key,
    make_plan,
    require_cache_space,
    sizes_of,
)
from sfumato.data.preparation.prefetch import prefetch
from sfumato.data.preparation.texts import CaptionEmbeddings
from sfumato.data.tags import caption_forms, count_forms, longest_caption
from sfumato.errors import DataError
from sfumato.files.read import stamp
from sfumato.utils.formatting import format_list

if TYPE_CHECKING:
    from sfumato.models import Base


@dataclass
class EncodedPictures:
    """The pictures as tensors. repeats: of each. bad: the reasons of those that are left out. digest: over all that is
    learned from; contents: of each picture by its name. nbytes: of the tensors, where they stay in memory."""

    items: list[PreparedPicture] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    contents: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0


@dataclass(frozen=True)
class _DecodedExample:
    """One example. label: its name, unlike the others'. digest: of its file and mask. result: decoded, found in the
    cache, or only the crop where nothing asks for the pixels."""

    example: Example
    label: str
    digest: str
    key: str
    result: Cropped | Entry | Crop


def encode_examples(
    examples: Sequence[Example],
    asked: Container[int],
    plan: PreparationPlan,
    store: Cache | None,
    base: Base,
    skip_bad: bool | None,
    tell: Callable[[str, int, int], None],
) -> EncodedPictures:
    """The examples in their order, those whose places are asked for decoded and encoded a few dozen at a time."""
    found = EncodedPictures()
    tell("images", 0, len(examples))
    labels = unique_labels([example.path for example in examples])
    read = prefetch(
        zip(examples, labels, (place in asked for place in range(len(examples))), strict=True),
        lambda named: _read(*named, plan, store),
        window=WINDOW,
        pixels=lambda named: pixels_of(named[0].path),
    )
    while window := list(islice(read, WINDOW)):
        found.bad.extend(str(done) for done in window if isinstance(done, DataError))
        good = [done for done in window if isinstance(done, _DecodedExample)]
        if found.bad and not skip_bad:
            continue  # the rest is only decoded, so that all bad files are named at once
        shown = partial(_tell_share, tell, len(found.items) + len(found.bad), len(good), len(examples))
        fresh, words = _items(good, plan, store, base, shown)
        found.notes.extend(words)
        for done, item in zip(good, fresh, strict=True):
            learned = _content_digest(done, item.crop)
            found.digest.update(repr(learned).encode())
            found.contents[_unique_label(done.label, found.contents)] = (
                f"{_short(learned[0])} {_short(repr(learned[1:]))}"
            )
        found.repeats.extend(done.example.repeats for done in good)
        found.items.extend(fresh)
        found.nbytes += sum(item.nbytes for item in fresh)
        if store and found.nbytes > planning.KEPT_BYTES:
            for item in found.items:
                item.tensors = None
    tell("images", len(found.items) + len(found.bad), len(examples))
    return found


def _unique_label(label: str, others: Container[str]) -> str:
    """The label, numbered where there is one such already: a picture may be in two sources."""
    return next(each for each in chain((label,), (f"{label} #{n}" for n in count(2))) if each not in others)


def _tell_share(tell: Callable[[str, int, int], None], before: int, these: int, count: int, part: float) -> None:
    """Tell that of `these` pictures, which come after those before, a part of 0 to 1 is encoded."""
    tell("images", before + int(part * these), count)


def _read(
    example: Example, label: str, asked: bool, plan: PreparationPlan, store: Cache | None
) -> _DecodedExample | DataError:
    """The example's crop, with its pixels or from the cache if it is asked for, or what is wrong with it."""
    sizes = sizes_of_resolution(plan.sizes, example.options.resolution)
    try:
        files = example.files
        before = [stamp(path.stat()) for path in files]
        content = [file_digest(path) for path in files]
        for path, wanted, found in zip(files, example.checksums, content, strict=False):
            refuse_changed(path, wanted, found)
        if not asked:
            return _DecodedExample(
                example, label, "".join(content), "", crop_from_header(example, sizes, plan.vae_factor)
            )
        key = latents_key(example, content, plan)
        result: Cropped | Entry | None = store.find("latents", key) if store else None
        if result is None:
            result = crop_example(example, sizes, plan.vae_factor)
            if [stamp(path.stat()) for path in files] != before:
                raise DataError(f"{example.path.name}: the file changed while it was read. Start again.")
        return _DecodedExample(example, label, "".join(content), key, result)
    except DataError as error:
        return DataError(replace_label(str(error), example.path, label))


def _items(
    good: Sequence[_DecodedExample],
    plan: PreparationPlan,
    store: Cache | None,
    base: Base,
    shown: Callable[[float], None],
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
                done.example.kept_tags,
            )
        )
    return items, notes


def _tensors(
    missing: Sequence[_DecodedExample], plan: PreparationPlan, base: Base, shown: Callable[[float], None]
) -> list[dict[str, torch.Tensor]]:
    cropped = [done.result for done in missing if isinstance(done.result, Cropped)]
    late = [plan.in_loop and result.crop.positions > 1 for result in cropped]
    now = [place for place, is_late in enumerate(late) if not is_late]
    encoded = encode_crops(
        [cropped[place] for place in now],
        [missing[place].label for place in now],
        [bool(missing[place].example.options.flip) for place in now],
        base.encode_pixels,
        shown,
    )
    found = dict(zip(now, encoded, strict=True))
    kept = [
        keep_pixels(each) if plan.keeps_pixels or is_late else {} for each, is_late in zip(cropped, late, strict=True)
    ]
    return [{**pixels, **found.get(place, {})} for place, pixels in enumerate(kept)]


def _content_digest(done: _DecodedExample, crop: Crop) -> tuple[Any, ...]:
    """All of an example that what is learned depends on; first its files."""
    example, options = done.example, done.example.options
    learned = done.digest, example.caption, example.repeats, example.alpha_mask, options, crop
    kept = [example.kept_tags.get(caption) for caption in example.captions]
    told = ("wildcards" if options.wildcards else None, options.secondary_separator)
    return *learned, *filter(None, (example.further, kept if any(kept) else None, *told))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


MAX_CAPTION_FORMS = 512
"""Forms of all captions that are embedded where the steps to come are unknown."""


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
    inpaint_whole_share: float = WHOLE_SHARE,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Dataset:
    """Decode, crop and encode every example once.

    resolution: side in pixels of a square picture; with `buckets` others get a shape with about as many pixels, in
    multiples of what the U-Net can halve, at least a sixteenth of the side. resolution, flip, crop,
    caption_dropout, shuffle_tags, keep_tags, tag_dropout: for the examples whose `Options` do not say it themselves.
    embed_text: keep the embeddings of the captions. will_draw: (seed, steps, global batch) of the run to come, so that
    exactly the captions it will draw are embedded, however many forms they have; others are encoded when a batch asks
    for them. together: how many samples of a step must be of one size, those of a call of the U-Net; unset, all.
    cache: a folder for latents and embeddings, where they are found again. drawn_over: whether `views` will be asked
    for, so that what it refuses is refused before anything is decoded. measured: how many pictures `middles` will be
    asked for, where that is all; of the others only the files are looked at, unless `skip_bad`. inpaint_whole_share: of
    an inpainting model's samples, those whose whole picture is hidden. progress: called with
    "images" or "captions", and how many of how many are done. say: told, before anything is decoded, how many pictures
    come in no step and what memory the latents take; unset, the notes tell.

    Raises DataError that names the bad files, ConfigError for a resolution that the base cannot take.
    """
    if not examples:
        raise DataError("no images to learn from; give a folder that holds some.")
    defaults = Options(flip, crop, caption_dropout, shuffle_tags, keep_tags, tag_dropout, resolution=resolution)
    defaults.check()
    notes = list(examples.notes) if isinstance(examples, ExampleSet) else []
    skip_bad = isinstance(examples, ExampleSet) and examples.skip_bad
    examples = [replace(example, options=example.options.over(defaults)) for example in examples]
    sizes = sizes_of(examples, base, buckets=buckets)
    asked = set(range(len(examples)))
    if measured is not None and not skip_bad:  # of those that bad ones leave, others would be drawn
        asked = set(center_view_indices(len(examples), measured))
    foreseen = list(crops_from_headers([examples[place] for place in sorted(asked)], sizes, base.vae_factor))
    if drawn_over and any(crop.positions > 1 for _, crop in foreseen):
        raise random_crops_note()
    store = None if cache is None else Cache(cache)
    plan = make_plan(foreseen, sizes, base, store)
    for note in early_notes(foreseen, plan, store, base, will_draw, together):
        (say or notes.append)(note)
    if store:
        require_cache_space(foreseen, plan, store, base)
    tell = progress or _tell_nobody
    gathered = encode_examples(examples, asked, plan, store, base, skip_bad, tell)
    items = gathered.items
    refuse_bad_pictures(gathered.bad, len(examples), skip_bad)
    notes.extend(_notes(gathered, plan, base))
    dataset = Dataset(
        items,
        gathered.repeats,
        base.precision.device,
        base.encode_pixels,
        base.decode,
        fingerprint=gathered.digest.hexdigest(),
        contents=gathered.contents,
        notes=notes,
        together=together,
        holes=InpaintingMasks(inpaint_whole_share) if base.inpaints else None,
        known=base.known if base.inpaints else None,
    )
    if embed_text:
        texts = CaptionEmbeddings(base, store)
        dataset.notes.extend(_embed(texts, dataset, items, will_draw, tell))
        dataset.embed(texts)
    return dataset


def _tell_nobody(what: str, done: int, count: int) -> None:
    """The progress of a call that asks for none."""


def _embed(
    texts: CaptionEmbeddings,
    dataset: Dataset,
    items: Sequence[PreparedPicture],
    will_draw: tuple[int, int, int] | None,
    tell: Callable[[str, int, int], None],
) -> Iterator[str]:
    """Embed what will be drawn, if that can be known and kept; lines for the person."""
    whole = {caption for item in items for caption in item.said}
    if will_draw is not None:
        wanted = dataset.drawn_captions(*will_draw)
    else:
        wanted = set(whole)
        told = [(text, item.options, item.kept_tags.get(text)) for item in items for text in item.captions]
        count = sum(count_forms(*each) for each in told)
        if count <= MAX_CAPTION_FORMS:
            wanted |= {form for each in told for form in caption_forms(*each)}
        elif any(item.options.varies_caption for item in items):
            yield f"tags vary in {count:,} ways, more than are embedded beforehand; captions are encoded in the loop"
        elif any(item.options.wildcards for item in items):
            yield f"wildcards make {count:,} captions, more than are embedded beforehand; they are encoded in the loop"
    # Of those whose tags vary another run would draw others: the cache would grow, and hardly be read.
    lasting = wanted & whole
    passing = wanted - lasting
    for captions, is_lasting in ((lasting, True), (passing, False)):
        if texts.fits(captions, cached=is_lasting):
            # Sorted, so that equal runs encode in equal batches.
            texts.compute(sorted(captions), partial(tell, "captions"), cached=is_lasting)
        else:
            yield f"{len(captions):,} captions are too many to keep in memory; they are encoded in the loop"


def _notes(gathered: EncodedPictures, plan: PreparationPlan, base: Base) -> Iterator[str]:
    """What the person should know of the pictures and captions."""
    items = gathered.items
    opaque = [note.removesuffix(f": {OPAQUE}") for note in gathered.notes if note.endswith(OPAQUE)]
    yield from group_notes(note for note in gathered.notes if not note.endswith(OPAQUE))
    if opaque:
        yield no_alpha_note(opaque)
    yield from (f"left out: {reason}" for reason in gathered.bad)
    yield from _crop_notes(items)
    if plan.in_loop:
        yield "random crops are too many to be encoded beforehand; pixels are kept and encoded in the loop"
    if note := _cut_note(base, items):
        yield note
    if note := missing_trigger_note((item.name, caption) for item in items for caption in item.captions):
        yield note


def _cut_note(base: Base, items: Sequence[PreparedPicture]) -> str:
    first = {caption: item for item in reversed(items) for caption in item.captions}  # of several with one caption
    longest_of = {longest_caption(text, item.options, base.token_count): item for text, item in reversed(first.items())}
    ends = {item.name: cut for caption, item in longest_of.items() if (cut := base.cut_off(caption))}
    return truncated_captions_note(
        ends, base.token_limit, varies=any(item.options.varies_caption for item in first.values())
    )


def _crop_notes(items: Sequence[PreparedPicture]) -> Iterator[str]:
    small = [item.name for item in items if item.crop.enlarges]
    cut = [item.name for item in items if item.crop.loses_much]
    if small:
        yield (
            f"{len(small)} of {len(items)} images are smaller than is learned, so they are enlarged: "
            f"{format_list(small)}"
        )
    if cut:
        yield f"{len(cut)} of {len(items)} images lose more than a quarter to the crop: {format_list(cut)}"
