"""What training will see of some pictures, and what is wrong with them, before anything is loaded. Imports no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sfumato.adapters.embeddings.tokens import FREQUENT
from sfumato.data.buckets import OPAQUE, Size, Sizes, checked_sizes, nearest_bucket, side_step
from sfumato.data.checks.survey import PictureStats, find_duplicates, survey
from sfumato.data.dataset_config import Source, hold_out, read_sources
from sfumato.data.folder import (
    PLACEHOLDER,
    Example,
    ExampleSet,
    caption_lines_notes,
    is_caption_meaningless,
    make_example,
    meaningless_captions_note,
    merge_notes,
    missing_trigger_note,
    no_alpha_note,
    no_images_message,
    no_masks_message,
    no_subject_message,
    replace_label,
    template_note,
    truncated_captions_note,
    unique_labels,
    unmatched_braces,
    unused_trigger_note,
    wildcards_notes,
)
from sfumato.data.listing import Ignored, ListedPicture, Listing
from sfumato.data.options import CropMode, MaskSource, Options
from sfumato.data.tags import longest_caption
from sfumato.errors import DataError
from sfumato.models.family import BaseRequirements
from sfumato.utils.formatting import format_list, pluralize


@dataclass(frozen=True)
class Finding:
    """One finding. kind: a short word for programs. names: the files it is about. stops: whether training would."""

    kind: str
    text: str
    names: tuple[str, ...] = ()
    stops: bool = False


@dataclass(frozen=True)
class Report:
    """What `check` found. buckets: size -> samples of an epoch in it, none of the class. labels: of each, unlike
    the others'. captioned: whether somebody wrote its caption, rather than a folder's name or a template."""

    path: Path
    needs: BaseRequirements
    resolution: int
    batch: int
    examples: tuple[Example, ...]
    looks: tuple[PictureStats, ...]
    ignored: tuple[Ignored, ...]
    buckets: dict[Size, int]
    labels: tuple[str, ...]
    captioned: tuple[bool, ...]
    lines: tuple[Finding, ...] = field(default=())

    @property
    def samples(self) -> int:
        """Pictures of an epoch, repeats counted, the bad ones and those of the class left out."""
        return sum(self.buckets.values())

    @property
    def stops(self) -> bool:
        """Whether training on these pictures would end with an error."""
        return any(line.stops for line in self.lines)

    @property
    def folders(self) -> list[str]:
        """What each folder gives: its pictures, how often an epoch holds them, whether they are learned."""
        counts = Counter((example.path.parent, example.repeats, example.group) for example in self.examples)
        names = unique_labels([folder for folder, _, _ in counts])
        return [
            f"{name}: {pluralize(count, 'image')}"
            + (f" x {repeats}" if repeats > 1 else "")
            + {"class": " of the class", "validation": " for validation"}.get(of, "")
            for name, ((_, repeats, of), count) in zip(names, counts.items(), strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        pictures = [
            {
                "file": example.path.as_posix(),
                "caption": example.caption,
                "further_captions": list(example.further),
                "repeats": example.repeats,
                "group": example.group,
                "error": look.error or None,
                "size": None if look.crop is None else list(look.crop.original),
                "bucket": None if look.crop is None else list(look.crop.size),
                "box": None if look.crop is None else [round(side, 2) for side in look.crop.box],
                "flaws": list(look.flaws),
                "notes": list(look.notes),
            }
            for example, look in zip(self.examples, self.looks, strict=True)
        ]
        return {
            "path": self.path.as_posix(),
            "base": self.needs.name,
            "resolution": self.resolution,
            "pictures": len(pictures),
            "samples": self.samples,
            "stops": self.stops,
            "buckets": [{"size": list(size), "samples": count} for size, count in self.buckets.items()],
            "folders": self.folders,
            "ignored": [{"file": entry.name, "reason": entry.reason} for entry in self.ignored],
            "findings": [
                {"kind": line.kind, "text": line.text, "files": list(line.names), "stops": line.stops}
                for line in self.lines
            ],
            "files": pictures,
        }


def check(
    path: Path,
    needs: BaseRequirements,
    *,
    resolution: int | None = None,
    batch: int = 1,
    caption_template: str | None = None,
    trigger: str | None = None,
    mask: MaskSource = "none",
    crop: CropMode = "center",
    caption_lines: bool = False,
    wildcards: bool = False,
    thumbnails: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Look at every picture of a folder or dataset.toml as `prepare` would see it, and at what is wrong.

    Raises DataError where there is no folder or no picture, ConfigError for options that make no sense.
    """
    side = resolution or needs.resolution
    sources = read_sources(
        path,
        caption_template=caption_template,
        trigger=trigger,
        mask=mask,
        caption_lines=caption_lines,
        wildcards=wildcards,
    )
    listings = [source.list() for source in sources]
    founds = [(found, source) for source, each in zip(sources, listings, strict=True) for found in each.pictures]
    ignored = tuple(entry for listing in listings for entry in listing.ignored)
    if not founds:
        raise no_images_message(path, ignored)
    asked = [source.resolutions or (side,) for _, source in founds]  # of which the largest is looked at
    examples = [
        _example(found, source, Options(crop=crop, resolution=max(at)))
        for (found, source), at in zip(founds, asked, strict=True)
    ]
    sizes = {
        each: checked_sizes(each, side_step(needs.vae_factor, needs.levels, each), buckets=True)
        for each in sorted({side for at in asked for side in at})
    }
    faults = [unmatched_braces(example) for example in examples]
    examples = [
        replace(example, options=replace(example.options, wildcards=False)) if fault else example
        for example, fault in zip(examples, faults, strict=True)
    ]
    looks = tuple(survey(examples, sizes, needs.vae_factor, thumbnails=thumbnails, progress=progress))
    report = Report(
        path,
        needs,
        side,
        batch,
        tuple(examples),
        looks,
        ignored,
        _count_buckets(examples, looks, asked, sizes),
        tuple(unique_labels([example.path for example in examples])),
        tuple(bool(found.caption.text) and found.caption.origin != "folder name" for found, _ in founds),
    )
    lines = [
        *_bad(report),
        *_captions(report, [found for found, _ in founds]),
        *_unmatched(report, faults),
        *_masks(report, sources, listings),
        *_listings(report, sources, listings),
        *_subject(report),
        *_held_out(report),
        *_flaws(report),
        *_twice(report),
        *_buckets(report),
        *(line for word in dict.fromkeys(s.trigger for s in sources if s.trigger) for line in _trigger(report, word)),
    ]
    return replace(report, lines=tuple(dict.fromkeys(lines)))


def _example(found: ListedPicture, source: Source, defaults: Options) -> Example:
    example = make_example(
        found,
        template=source.template,
        trigger=source.trigger,
        mask=source.mask,
        by_line=bool(source.by_line),
        options=source.options.over(defaults),
    )
    return replace(example, group=source.group)


def _count_buckets(
    examples: Sequence[Example], looks: Sequence[PictureStats], asked: Sequence[tuple[int, ...]], sizes: Sizes
) -> dict[Size, int]:
    """Samples of an epoch by size, in the order of the sizes; none of the class."""
    counts: Counter[Size] = Counter()
    for example, look, sides in zip(examples, looks, asked, strict=True):
        if look.crop is not None and example.group == "instance":
            for side in sides:
                counts[nearest_bucket(look.crop.original, sizes[side])] += example.repeats
    ordered = dict.fromkeys(size for of_side in sizes.values() for size in of_side)
    return {size: counts[size] for size in ordered if counts[size]}


def _listings(report: Report, sources: Sequence[Source], listings: Sequence[Listing]) -> Iterator[Finding]:
    named = list(zip(sources, listings, strict=True))
    for source, listing in named:
        yield from (Finding("listing", note) for note in listing.notes)
        if not listing.pictures:
            yield Finding("no pictures", str(no_images_message(source.path, listing.ignored)), stops=True)
    of_lines = (
        (s.asks, caption_lines_notes(listing.pictures, s.template, s.by_line, of_class=s.group == "class"))
        for s, listing in named
    )
    yield from (Finding("caption lines", note) for note in merge_notes(of_lines))
    examples = iter(report.examples)
    of_wildcards = (
        (
            s.asks,
            wildcards_notes(
                [*islice(examples, len(listing.pictures))], s.options.wildcards, of_class=s.group == "class"
            ),
        )
        for s, listing in named
    )
    yield from (Finding("wildcards", note) for note in merge_notes(of_wildcards))


def _held_out(report: Report) -> Iterator[Finding]:
    """Pictures that are learned and held out."""
    try:
        hold_out(ExampleSet(report.examples), 0.0)
    except DataError as error:
        yield Finding("held out", str(error), stops=True)


def _subject(report: Report) -> Iterator[Finding]:
    if not any(example.group == "instance" for example in report.examples):
        yield Finding("no subject", str(no_subject_message(report.path)), stops=True)


def _bad(report: Report) -> Iterator[Finding]:
    for look, label in zip(report.looks, report.labels, strict=True):
        if look.error:
            yield Finding("bad", replace_label(look.error, look.path, label), (label,), stops=True)


def _unmatched(report: Report, faults: Sequence[str]) -> Iterator[Finding]:
    """Wildcards that do not end or begin."""
    for label, fault in zip(report.labels, faults, strict=True):
        if fault:
            yield Finding("wildcards", f"{label}: {fault}", (label,), stops=True)


def _captions(report: Report, founds: Sequence[ListedPicture]) -> Iterator[Finding]:
    named = list(zip(report.examples, founds, report.labels, strict=True))
    trigger = next((example.trigger for example in report.examples if example.trigger), None)
    notes: dict[str, list[str]] = {}
    for _, found, label in named:
        if found.caption.error:
            yield Finding("caption unreadable", found.caption.error, (label,), stops=True)
        for note in found.caption.notes:
            notes.setdefault(note, []).append(label)
    for note, names in notes.items():
        yield Finding("caption encoding" if "not UTF-8" in note else "caption", note, tuple(names))
    missing = [label for e, found, label in named if not e.caption and not found.caption.error]
    if missing:
        by_model = "`sfumato caption DIR --model MODEL --write`"
        advice = f"write NAME.txt beside each, run {by_model}, or pass {template_note(missing, trigger)}"
        text = (
            f"{_count(missing)} no caption: {format_list(missing, 4)}. `lora` wants one: {advice}. `dreambooth` and "
            "`textual_inversion` give them their own."
        )
        yield Finding("caption missing", text, tuple(missing), True)
    if numbers := {label: e.template or "" for e, found, label in named if is_caption_meaningless(found, e.template)}:
        text = meaningless_captions_note(list(numbers), next(iter(numbers.values())), trigger)
        yield Finding("caption says nothing", text, tuple(numbers))
    captions = [(label, caption) for example, _, label in named for caption in example.captions]
    if text := missing_trigger_note(captions):
        yield Finding("trigger missing", text, tuple(label for label, caption in captions if PLACEHOLDER in caption))
    owners = _by_caption(report)
    cut = {caption: end for caption in owners if (end := report.needs.cut_off(caption))}
    if cut:
        whose = tuple(name for caption in cut for name in owners[caption])
        varies = any(example.options.varies_caption for example, _, label in named if label in whose)
        ends = {format_list(owners[caption], 4): end for caption, end in cut.items()}
        text = truncated_captions_note(ends, report.needs.token_limit, varies=varies)
        yield Finding("caption cut", text, whose)


def _by_caption(report: Report) -> dict[str, list[str]]:
    """Whose each caption is. Of a wildcard it has the longest alternative."""

    def tokens(text: str) -> int:
        return len(report.needs.ids(text))

    found: dict[str, list[str]] = {}
    for example, label in zip(report.examples, report.labels, strict=True):
        for caption in filter(None, example.captions):
            found.setdefault(longest_caption(caption, example.options, tokens), []).append(label)
    return found


def _masks(report: Report, sources: Sequence[Source], listings: Sequence[Listing]) -> Iterator[Finding]:
    pairs = zip(report.examples, report.labels, strict=True)
    for source, listing in zip(sources, listings, strict=True):
        # Of this source alone: another of the same folder may learn its images whole.
        own = list(islice(pairs, len(listing.pictures)))
        without = [label for example, label in own if example.mask is None] if source.mask == "files" else []
        if own and len(without) == len(own):
            yield Finding("no masks", str(no_masks_message(source.path)), stops=True)
        elif without:
            yield Finding(
                "mask missing", f"{_count(without)} no mask, learned whole: {format_list(without, 4)}", tuple(without)
            )
    looks = zip(report.looks, report.labels, strict=True)
    if opaque := [label for look, label in looks if any(note.endswith(OPAQUE) for note in look.notes)]:
        yield Finding("mask missing", no_alpha_note(opaque), tuple(opaque))


def _flaws(report: Report) -> Iterator[Finding]:
    good = [(look, look.crop, label) for look, label in zip(report.looks, report.labels, strict=True) if look.crop]
    for look, _, label in good:
        for note in (note for note in look.notes if not note.endswith(OPAQUE)):
            yield Finding("note", replace_label(note, look.path, label), (label,))
    small = {
        label: f"{label} ({crop.original[0]} x {crop.original[1]} px, x {crop.scale:.1f})"
        for _, crop, label in good
        if crop.enlarges
    }
    if small:
        text = f"smaller than is learned, so enlarged: {format_list(list(small.values()), 4)}"
        yield Finding("too small", text, tuple(small))
    cut = {label: f"{label} ({1 - crop.kept:.0%})" for _, crop, label in good if crop.loses_much}
    if cut:
        yield Finding(
            "cropped", f"the crop takes more than a quarter of: {format_list(list(cut.values()), 4)}", tuple(cut)
        )
    for flaw, words in (("black", "black"), ("one colour", "one colour only"), ("blurred", "blurred")):
        names = [label for look, _, label in good if flaw in look.flaws]
        if names:
            yield Finding(flaw, f"{words}: {format_list(names, 4)}", tuple(names))


def _twice(report: Report) -> Iterator[Finding]:
    # Sources may give a folder several prompts; that its files are like themselves is no news.
    files = [(os.path.abspath(example.path), example.group) for example in report.examples]
    first: dict[tuple[str, str], int] = {}
    for place, file in enumerate(files):
        first.setdefault(file, place)
    places = list(first.values())
    exact, near = find_duplicates([report.looks[place] for place in places])
    for kind, groups, words in (("duplicate", exact, "the same image"), ("near duplicate", near, "nearly the same")):
        for group in groups:
            names = [report.labels[places[number]] for number in group]
            yield Finding(kind, f"{words}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}", tuple(names))
    captions = Counter((first[file], e.caption) for file, e in zip(files, report.examples, strict=True))
    if again := tuple(dict.fromkeys(report.labels[place] for (place, _), count in captions.items() if count > 1)):
        yield Finding("named twice", f"in several sources with the same caption: {format_list(again, 4)}", again)
    spare = sum(len(group) - 1 for group in [*exact, *near])
    if spare > 0.3 * len(places):
        share = spare / len(places)
        yield Finding("many duplicates", f"{share:.0%} of the images repeat others; what they show is learned by heart")


def _buckets(report: Report) -> Iterator[Finding]:
    for (width, height), count in report.buckets.items():
        if count < report.batch:
            text = (
                f"{width} x {height} px: {pluralize(count, 'sample')} an epoch, fewer than a batch of {report.batch}, "
                f"so that they come once in {-(-report.batch // count)} epochs, together"
            )
            yield Finding("small bucket", text)


def _trigger(report: Report, trigger: str) -> Iterator[Finding]:
    """How each word of the trigger tokenizes, and whether the model knows it already."""
    if unused := unused_trigger_note(report.examples, trigger):
        yield Finding("trigger unused", unused)
    words = {word: report.needs.pieces(word) for word in trigger.split()}
    ordinary = {word: len(pieces) == 1 and pieces[0][1] < FREQUENT for word, pieces in words.items()}
    for word, pieces in words.items():
        shown = " + ".join(piece.removesuffix("</w>") for piece, _ in pieces)
        if ordinary[word] and not all(ordinary.values()):
            yield Finding("trigger", f"trigger {word!r} is an ordinary word, as the class beside a rare word should be")
        elif ordinary[word]:
            text = (
                f"trigger {word!r} is one token, number {pieces[0][1]:,}: an ordinary word, whose meaning is in the way"
            )
            yield Finding("trigger ordinary", f"{text}. Take a rare one, such as zwx.")
        elif len(pieces) == 1:
            yield Finding("trigger", f"trigger {word!r} is one rare token, number {pieces[0][1]:,}")
        else:
            yield Finding("trigger", f"trigger {word!r} is {len(pieces)} tokens: {shown}")


def _count(names: Sequence[str]) -> str:
    return pluralize(len(names), "image has", "images have")
