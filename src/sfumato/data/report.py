"""What training will see of some pictures, and what is wrong with them, before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sfumato.data.buckets import Size, bucket_sizes
from sfumato.data.duplicates import duplicates
from sfumato.data.folder import Example, MaskSource, caption_of
from sfumato.data.listing import Found, Ignored
from sfumato.data.options import CropMode, Options
from sfumato.data.source import Source, sources_of
from sfumato.data.survey import Look, survey
from sfumato.data.target import Target
from sfumato.errors import ConfigError, DataError

COMMON_ID = 40_000
"""CLIP's tokens are numbered by frequency, 49,408 in all; words of one token below this are ordinary ones."""


@dataclass(frozen=True)
class Line:
    """One finding. kind: a short word for programs. names: the files it is about. stops: whether training would."""

    kind: str
    text: str
    names: tuple[str, ...] = ()
    stops: bool = False


@dataclass(frozen=True)
class Report:
    """What `check` found. buckets: size -> samples of an epoch in it. captions: by file."""

    path: Path
    target: Target
    resolution: int
    batch: int
    examples: tuple[Example, ...]
    looks: tuple[Look, ...]
    ignored: tuple[Ignored, ...]
    buckets: dict[Size, int]
    lines: tuple[Line, ...] = field(default=())

    @property
    def samples(self) -> int:
        """Pictures of an epoch, repeats counted, the bad ones left out."""
        return sum(self.buckets.values())

    @property
    def stops(self) -> bool:
        """Whether training on these pictures would end with an error."""
        return any(line.stops for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        pictures = [
            {
                "file": example.path.as_posix(),
                "caption": example.caption,
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
            "base": self.target.name,
            "resolution": self.resolution,
            "pictures": len(pictures),
            "samples": self.samples,
            "stops": self.stops,
            "buckets": [{"size": list(size), "samples": count} for size, count in self.buckets.items()],
            "ignored": [{"file": entry.name, "reason": entry.reason} for entry in self.ignored],
            "findings": [
                {"kind": line.kind, "text": line.text, "files": list(line.names), "stops": line.stops}
                for line in self.lines
            ],
            "files": pictures,
        }


def check(
    path: Path,
    target: Target,
    *,
    resolution: int | None = None,
    batch: int = 1,
    caption_template: str | None = None,
    trigger: str | None = None,
    mask: MaskSource = "none",
    crop: CropMode = "center",
    buckets: bool = True,
    thumbnails: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Look at every picture of a folder or dataset.toml as `prepare` would see it, and at what is wrong.

    Raises DataError where there is no folder or no picture, ConfigError for options that make no sense.
    """
    side = resolution or target.resolution
    step = target.step(side)
    if side < step:
        raise ConfigError(f"--resolution {side}: this base takes multiples of {step} px. Give {step} or more.")
    sizes = bucket_sizes(side, step, largest_ratio=2.0 if buckets else 1.0)
    sources = sources_of(path, caption_template=caption_template, trigger=trigger, mask=mask)
    examples: list[Example] = []
    founds: list[Found] = []
    ignored: list[Ignored] = []
    lines: list[Line] = []
    for source in sources:
        listing = source.list()
        founds.extend(listing.pictures)
        ignored.extend(listing.ignored)
        lines.extend(Line("listing", note) for note in listing.notes)
        examples.extend(_example(found, source, Options(crop=crop)) for found in listing.pictures)
    if not examples:
        raise DataError(f"{path}: no pictures in it ({len(ignored)} files ignored). Put PNG or JPEG files there.")
    looks = tuple(survey(examples, sizes, target.vae_factor, thumbnails=thumbnails, progress=progress))
    counts: Counter[Size] = Counter()
    for example, look in zip(examples, looks, strict=True):
        if look.crop is not None:
            counts[look.crop.size] += example.repeats
    report = Report(
        path, target, side, batch, tuple(examples), looks, tuple(ignored), {s: counts[s] for s in sizes if counts[s]}
    )
    found_lines = [
        *_bad(report),
        *_captions(report, founds),
        *_masks(report, sources),
        *lines,
        *_flaws(report),
        *_twice(report),
        *_buckets(report),
        *(line for word in dict.fromkeys(s.trigger for s in sources if s.trigger) for line in _trigger(report, word)),
    ]
    return replace(report, lines=tuple(found_lines))


def _example(found: Found, source: Source, defaults: Options) -> Example:
    return Example(
        found.path,
        caption_of(found, source.template, source.trigger),
        found.repeats,
        found.mask if source.mask == "files" else None,
        source.mask == "alpha",
        source.options.over(defaults),
        source.group,
        found.sums,
    )


def _bad(report: Report) -> Iterator[Line]:
    for look in report.looks:
        if look.error:
            yield Line("bad", look.error, (look.path.name,), stops=True)


def _captions(report: Report, founds: Sequence[Found]) -> Iterator[Line]:
    named = list(zip(report.examples, founds, strict=True))
    for _, found in named:
        if found.caption.error:
            yield Line("caption unreadable", found.caption.error, (found.path.name,), stops=True)
        for note in found.caption.notes:
            yield Line("caption encoding" if "not UTF-8" in note else "caption", note, (found.path.name,))
    missing = [e.path.name for e, found in named if not e.caption and not found.caption.error]
    if missing:
        advice = 'Write NAME.txt beside each, run `sfumato caption`, or pass --caption "{caption}".'
        yield Line("caption missing", f"{_count(missing)} no caption: {_some(missing)}. {advice}", tuple(missing), True)
    limit = report.target.token_limit
    for caption, names in _by_caption(report).items():
        if cut := report.target.cut_off(caption):
            text = f"{_some(names)}: the caption is longer than {limit} tokens; its end is not seen: ... {cut!r}"
            yield Line("caption cut", text, tuple(names))


def _by_caption(report: Report) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for example in report.examples:
        if example.caption:
            found.setdefault(example.caption, []).append(example.path.name)
    return found


def _masks(report: Report, sources: Sequence[Source]) -> Iterator[Line]:
    if any(source.mask == "files" for source in sources):
        without = [e.path.name for e in report.examples if e.mask is None and not e.alpha_mask]
        if without:
            yield Line("mask missing", f"{_count(without)} no mask, learned whole: {_some(without)}", tuple(without))


def _flaws(report: Report) -> Iterator[Line]:
    good = [look for look in report.looks if look.crop is not None]
    for look in good:
        for note in look.notes:
            yield Line("note", note, (look.path.name,))
    small = [
        f"{look.path.name} ({look.crop.original[0]} x {look.crop.original[1]} px, x {look.crop.scale:.1f})"
        for look in good
        if look.crop is not None and look.crop.scale > 1
    ]
    if small:
        yield Line("too small", f"smaller than is learned, so enlarged: {_some(small)}", _names(small))
    cut = [
        f"{look.path.name} ({1 - look.crop.kept:.0%})"
        for look in good
        if look.crop is not None and look.crop.kept < 0.75
    ]
    if cut:
        yield Line("cropped", f"the crop takes more than a quarter of: {_some(cut)}", _names(cut))
    for flaw, words in (("black", "black"), ("one colour", "one colour only"), ("blurred", "blurred")):
        names = [look.path.name for look in good if flaw in look.flaws]
        if names:
            yield Line(flaw, f"{words}: {_some(names)}", tuple(names))


def _names(shown: Sequence[str]) -> tuple[str, ...]:
    return tuple(text.rpartition(" (")[0] if text.count(" (") == 1 else text.split(" (")[0] for text in shown)


def _twice(report: Report) -> Iterator[Line]:
    exact, near = duplicates(report.looks)
    for kind, groups, words in (("duplicate", exact, "the same picture"), ("near duplicate", near, "nearly the same")):
        for places in groups:
            names = [report.looks[place].path.name for place in places]
            yield Line(kind, f"{words}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}", tuple(names))
    spare = sum(len(places) - 1 for places in [*exact, *near])
    if spare > 0.3 * len(report.looks):
        share = spare / len(report.looks)
        yield Line("many duplicates", f"{share:.0%} of the pictures repeat others; what they show is learned by heart")


def _buckets(report: Report) -> Iterator[Line]:
    for (width, height), count in report.buckets.items():
        if count < report.batch:
            text = (
                f"{width} x {height} px: {count} samples an epoch, fewer than a batch of {report.batch}, so that they "
                f"come once in {-(-report.batch // count)} epochs, together"
            )
            yield Line("small bucket", text)


def _trigger(report: Report, trigger: str) -> Iterator[Line]:
    """How each word of the trigger tokenizes, and whether the model knows it already."""
    if not any(trigger.casefold() in example.caption.casefold() for example in report.examples):
        yield Line(
            "trigger unused", f'no caption holds the trigger {trigger!r}; pass --caption "{{caption}}, {{trigger}}"'
        )
    for word in trigger.split():
        pieces = report.target.pieces(word)
        shown = " + ".join(piece.removesuffix("</w>") for piece, _ in pieces)
        whole = len(pieces) == 1
        if whole and (pieces[0][1] < COMMON_ID or len(report.target.tokenizer) < COMMON_ID):
            text = (
                f"trigger {word!r} is one token, number {pieces[0][1]:,}: an ordinary word, whose meaning is in the way"
            )
            yield Line("trigger ordinary", f"{text}. Take a rare one, such as zwx.")
        elif whole:
            yield Line("trigger", f"trigger {word!r} is one rare token, number {pieces[0][1]:,}")
        else:
            yield Line("trigger", f"trigger {word!r} is {len(pieces)} tokens: {shown}")


def _count(names: Sequence[str]) -> str:
    return "1 picture has" if len(names) == 1 else f"{len(names)} pictures have"


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
