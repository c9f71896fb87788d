"""Examples -> tensors: decoded, cropped and encoded a few dozen at a time, or taken from the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any

import torch

from sfumato.data import planning
from sfumato.data.buckets import Crop, of_resolution
from sfumato.data.cache import Cache, Entry, crop_from_text, crop_to_text
from sfumato.data.checksums import file_digest, refuse_changed
from sfumato.data.crops import Cropped, crop_example
from sfumato.data.folder import Example, labelled, labels_of
from sfumato.data.images import pixels_of
from sfumato.data.latents import PreparedPicture, encode, keep_pixels
from sfumato.data.planning import WINDOW, Plan, foreseen_crop, latents_key
from sfumato.data.prefetch import prefetch
from sfumato.errors import DataError
from sfumato.files.read import stamp

if TYPE_CHECKING:
    from sfumato.bases import Base


@dataclass
class Gathered:
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
class _Done:
    """One example. label: its name, unlike the others'. digest: of its file and mask. result: decoded, found in the
    cache, or only the crop where nothing asks for the pixels."""

    example: Example
    label: str
    digest: str
    key: str
    result: Cropped | Entry | Crop


def gather(
    examples: Sequence[Example],
    asked: Container[int],
    plan: Plan,
    store: Cache | None,
    base: Base,
    skip_bad: bool | None,
    tell: Callable[[str, int, int], None],
) -> Gathered:
    """The examples in their order, those whose places are asked for decoded and encoded a few dozen at a time."""
    found = Gathered()
    tell("images", 0, len(examples))
    labels = labels_of([example.path for example in examples])
    read = prefetch(
        zip(examples, labels, (place in asked for place in range(len(examples))), strict=True),
        lambda named: _read(*named, plan, store),
        window=WINDOW,
        pixels=lambda named: pixels_of(named[0].path),
    )
    while window := list(islice(read, WINDOW)):
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
        if store and found.nbytes > planning.KEPT_BYTES:
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


def _read(example: Example, label: str, asked: bool, plan: Plan, store: Cache | None) -> _Done | DataError:
    """The example's crop, with its pixels or from the cache if it is asked for, or what is wrong with it."""
    sizes = of_resolution(plan.sizes, example.options.resolution)
    try:
        files = example.files
        before = [stamp(path.stat()) for path in files]
        content = [file_digest(path) for path in files]
        for path, wanted, found in zip(files, example.checksums, content, strict=False):
            refuse_changed(path, wanted, found)
        if not asked:
            return _Done(example, label, "".join(content), "", foreseen_crop(example, sizes, plan.vae_factor))
        key = latents_key(example, content, plan)
        result: Cropped | Entry | None = store.find("latents", key) if store else None
        if result is None:
            result = crop_example(example, sizes, plan.vae_factor)
            if [stamp(path.stat()) for path in files] != before:
                raise DataError(f"{example.path.name}: the file changed while it was read. Start again.")
        return _Done(example, label, "".join(content), key, result)
    except DataError as error:
        return DataError(labelled(str(error), example.path, label))


def _items(
    good: Sequence[_Done], plan: Plan, store: Cache | None, base: Base, shown: Callable[[float], None]
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
    missing: Sequence[_Done], plan: Plan, base: Base, shown: Callable[[float], None]
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
    kept = [
        keep_pixels(each) if plan.keeps_pixels or is_late else {} for each, is_late in zip(cropped, late, strict=True)
    ]
    return [{**pixels, **found.get(place, {})} for place, pixels in enumerate(kept)]


def _learned(done: _Done, crop: Crop) -> tuple[Any, ...]:
    """All of an example that what is learned depends on; first its files."""
    example, options = done.example, done.example.options
    learned = done.digest, example.caption, example.repeats, example.alpha_mask, options, crop
    kept = [example.kept_tags.get(caption) for caption in example.captions]
    told = ("wildcards" if options.wildcards else None, options.secondary_separator)
    return *learned, *filter(None, (example.further, kept if any(kept) else None, *told))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
