"""Examples -> a data set: everything decoded, cropped and encoded once, before the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.data.cache import Cache
from sfumato.data.crops import OPAQUE
from sfumato.data.dataset import Dataset, crops_move, middles_of
from sfumato.data.folder import Example, ExampleSet, cut_captions, refuse_bad, without_alpha, without_trigger
from sfumato.data.gathering import Gathered, gather
from sfumato.data.holes import WHOLE_SHARE, Holes
from sfumato.data.latents import PreparedPicture
from sfumato.data.listing import grouped
from sfumato.data.options import CropMode, Options
from sfumato.data.planning import Plan, early_notes, foreseen_crops, plan_of, require_space, sizes_of
from sfumato.data.tags import count_forms, forms, longest
from sfumato.data.texts import CaptionEmbeddings
from sfumato.errors import DataError
from sfumato.numerals import some

if TYPE_CHECKING:
    from sfumato.bases import Base

MOST_FORMS = 512
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
        asked = set(middles_of(len(examples), measured))
    foreseen = list(foreseen_crops([examples[place] for place in sorted(asked)], sizes, base.vae_factor))
    if drawn_over and any(crop.positions > 1 for _, crop in foreseen):
        raise crops_move()
    store = None if cache is None else Cache(cache)
    plan = plan_of(foreseen, sizes, base, store)
    for note in early_notes(foreseen, plan, store, base, will_draw, together):
        (say or notes.append)(note)
    if store:
        require_space(foreseen, plan, store, base)
    tell = progress or _tell_nobody
    gathered = gather(examples, asked, plan, store, base, skip_bad, tell)
    items = gathered.items
    refuse_bad(gathered.bad, len(examples), skip_bad)
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
        holes=Holes(inpaint_whole_share) if base.inpaints else None,
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
        if count <= MOST_FORMS:
            wanted |= {form for each in told for form in forms(*each)}
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


def _notes(gathered: Gathered, plan: Plan, base: Base) -> Iterator[str]:
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
    longest_of = {longest(text, item.options, base.token_count): item for text, item in reversed(first.items())}
    ends = {item.name: cut for caption, item in longest_of.items() if (cut := base.cut_off(caption))}
    return cut_captions(ends, base.token_limit, varies=any(item.options.varies_caption for item in first.values()))


def _crop_notes(items: Sequence[PreparedPicture]) -> Iterator[str]:
    small = [item.name for item in items if item.crop.enlarges]
    cut = [item.name for item in items if item.crop.loses_much]
    if small:
        yield f"{len(small)} of {len(items)} images are smaller than is learned, so they are enlarged: {some(small)}"
    if cut:
        yield f"{len(cut)} of {len(items)} images lose more than a quarter to the crop: {some(cut)}"
