"""Check a folder of images before training: what training will see, and what is wrong. Loads no model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from hashlib import sha256
from os.path import abspath
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfumato.cli import run
from sfumato.config import parse
from sfumato.data.options import CropMode, MaskSource
from sfumato.errors import ConfigError, DataError
from sfumato.utils.formatting import escape_control, pluralize

if TYPE_CHECKING:
    from sfumato.data.checks.repair import RepairReport
    from sfumato.data.checks.report import Finding, Report


_OF_A_KIND = 20


@dataclass(frozen=True)
class Config:
    """Check a folder of images before training: what training will see, and what is wrong. Loads no model.

    Exits with 1 if training on it would stop.

    Example: sfumato check pictures --trigger zwx --sheet crops.png
    """

    images: Path
    """Folder of images, or a dataset.toml."""
    _: KW_ONLY
    base: str = "pocket"
    """Base model to train on: pocket, a diffusers folder, a checkpoint, a hub id; or a family: sd1, sd2, sdxl."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base model predicts: noise (epsilon) or v. Set it where its file does not say; for SD 2.x the image size
    depends on it."""
    max_tokens: Literal[75, 150, 225] | None = None
    """Tokens of a caption that are read, as for training."""
    resolution: int | None = None
    """Side in pixels of a square image. Unset: the base model's own resolution."""
    batch: int = 1
    """Images per step. The report then names shapes with too few images for one step."""
    caption: str | None = None
    """Template for captions, as for training."""
    caption_lines: bool = False
    """Each line of a caption is a caption of its own, as for training."""
    wildcards: bool = False
    """{red|blue} in a caption is a wildcard, as for training."""
    trigger: str | None = None
    """Trigger word. The report then says how it is tokenized and whether the captions contain it."""
    mask: MaskSource = "none"
    """Learn only a part of each image, as for training."""
    crop: CropMode = "center"
    """How images are cropped, as for training."""
    sheet: Path | None = None
    """Image file on which to show every crop. More than 200 crops continue in FILE-2 and so on. Only an earlier sheet
    is replaced."""
    json: bool = False
    """Print JSON for other programs."""
    fix: Path | None = None
    """New folder for a repaired copy. It has no images that training refuses, only one of identical images (one with a
    caption if there is one), upright images in sRGB, and captions in UTF-8. Nearly identical images stay."""
    checksums: bool = False
    """If nothing stops training, write SHA256SUMS into the folder. check and training then refuse files that were
    damaged or changed since, in every format."""


def main(argv: Sequence[str]) -> int:
    """Print what was found. Returns 1 if training would stop, else 0."""
    # A first word that ends in .toml is the data set, not a config of this program (--config names one).
    config = parse(Config, argv, program="check", first_may_be_config=False)
    from sfumato.data.checks.report import check
    from sfumato.models.family import read_requirements

    _refuse(config)
    report = check(
        config.images,
        read_requirements(config.base, config.prediction_type, config.max_tokens),
        resolution=config.resolution,
        batch=config.batch,
        caption_template=config.caption,
        trigger=config.trigger,
        mask=config.mask,
        crop=config.crop,
        caption_lines=config.caption_lines,
        wildcards=config.wildcards,
        thumbnails=config.sheet is not None,
        progress=_progress if sys.stderr is not None and sys.stderr.isatty() else None,
    )
    if not config.json:
        print(render(report))  # before anything is written, which a full disk would stop
    mended = _mend(report, config) if config.fix else None
    sums = _write_checksums(config) if config.checksums and not report.stops else None
    sheets = _sheets(report, config.sheet) if config.sheet else []
    if config.json:
        found = report.to_dict()
        if mended:
            found["fixed"] = {
                "folder": str(config.fix),
                "copied": list(mended.copied),
                "rewritten": dict(mended.rewritten),
                "left_out": dict(mended.left_out),
            }
        print(json.dumps(found, indent=2))
    else:
        if mended:
            print("\n".join(map(escape_control, _mended_lines(mended, config))))
        for sheet in sheets:
            print(f"crops drawn on {sheet}")
        if sums:
            print(f"checksums written to {sums}")
        elif config.checksums:
            print("no checksums written: mend what stops training first")
    return 1 if report.stops else 0


def _refuse(config: Config) -> None:
    for name in ("resolution", "batch"):
        value = getattr(config, name)
        if value is not None and not 1 <= value < 2**31:
            raise ConfigError(f"--{name} is {value}; it must be at least 1 and below {2**31:,}.")
    if config.checksums and not config.images.is_dir():
        raise ConfigError(f"--checksums: {config.images} is no folder; write them for each of its folders.")
    if config.sheet and config.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ConfigError(f"--sheet {config.sheet}: wanted a file that ends in .png, .jpg or .webp.")
    if config.sheet:
        _refuse_another(config.sheet)


def _refuse_another(sheet: Path) -> None:
    """Raise ConfigError for a file that exists and is no such sheet: it may be a training image."""
    from sfumato.generation.metadata.png_info import read_picture_info

    if sheet.exists() and "crops" not in (read_picture_info(sheet).own or {}):
        raise ConfigError(f"--sheet: {sheet} exists, and is no sheet of crops; name another file.")


def _write_checksums(config: Config) -> Path:
    from sfumato.data.captions import METADATA_FILE
    from sfumato.data.checksums import write_sums
    from sfumato.data.dataset_config import read_sources

    pictures = [found for source in read_sources(config.images) for found in source.list().pictures]
    files = {file for found in pictures for file in found.files}  # masks, too, whatever --mask says this time
    captions = {found.path.with_name(found.caption.origin) for found in pictures if found.caption.origin}
    captions |= {folder / METADATA_FILE for folder in {config.images, *(file.parent for file in files)}}
    return write_sums(config.images, [*files, *(file for file in captions if file.is_file())])


def _progress(done: int, total: int) -> None:
    if done % 50 == 0 or done == total:
        print(f"\r{done:,} of {total:,} images", end="" if done < total else "\n", file=sys.stderr, flush=True)


def render(report: Report) -> str:
    """The report as text: what training will see, what stops it, what to look at."""
    from sfumato.data.captions import count_choices

    good = sum(1 for look in report.looks if not look.error)
    lines = [
        f"{report.path}: {good:,} of {len(report.looks):,} images can be learned from, "
        f"{pluralize(report.samples, 'sample')} an epoch, for {report.needs.name} at {report.resolution} px",
    ]
    shapes = ", ".join(f"{width} x {height}: {count:,}" for (width, height), count in report.buckets.items())
    if shapes:
        lines.append(f"  shapes   {shapes}")
    if len(report.folders) > 1:
        lines += [f"  folder   {folder}" for folder in report.folders]
    captions = {text: example.options for example in report.examples for text in example.captions if text}
    if captions:
        forms = sum(count_choices(text) if options.wildcards else 1 for text, options in captions.items())
        more = f", {forms:,} by their wildcards" if forms > len(captions) else ""
        lines.append(f"  captions {len(captions):,} different{more}, such as {next(iter(captions))!r}")
    if report.ignored:
        lines.append(f"  ignored  {pluralize(len(report.ignored), 'file')}")
        lines += [f"    {entry.name}: {entry.reason}" for entry in report.ignored[:20]]
        if len(report.ignored) > 20:
            lines.append(f"    ... and {len(report.ignored) - 20:,} more (--json has them all)")
    for title, stops in (("stops training", True), ("to look at", False)):
        found = [line for line in report.lines if line.stops == stops]
        if found:
            lines.append(title)
            lines += [f"  {text}" for text in _few_of_each(found)]
    if not report.lines:
        lines.append("nothing is wrong with them")
    return "\n".join(map(escape_control, lines))


def _few_of_each(found: Sequence[Finding]) -> Iterator[str]:
    """The first 20 texts of each kind, so that many of one kind hide no other."""
    counts = Counter(line.kind for line in found)
    told: Counter[str] = Counter()
    for line in found:
        told[line.kind] += 1
        if told[line.kind] <= _OF_A_KIND:
            yield line.text
        if told[line.kind] == counts[line.kind] > _OF_A_KIND:
            yield f"... and {counts[line.kind] - _OF_A_KIND:,} more of {line.kind} (--json has them all)"


def _mend(report: Report, config: Config) -> RepairReport:
    """The repaired copy, without bad files and with only one of identical images."""
    from sfumato.data.checks.repair import repair_folder
    from sfumato.data.checks.survey import find_duplicates
    from sfumato.data.dataset_config import read_sources

    assert config.fix is not None
    sources = read_sources(config.images, trigger=config.trigger)
    # Copied, whatever --mask says this time.
    masks = {found.path: found.mask for source in sources for found in source.list().pictures}
    leave_out = {look.path: look.error.removeprefix(f"{look.path.name}: ") for look in report.looks if look.error}
    for places in _same(report, masks, find_duplicates(report.looks)[0]):
        # The first that somebody wrote a caption for, or the first.
        first = next((place for place in places if report.captioned[place]), places[0])
        reason = f"the same image as {report.labels[first]}"
        # Not the first itself, which several sources may hold.
        others = (report.looks[place].path for place in places)
        leave_out |= {path: reason for path in others if abspath(path) != abspath(report.looks[first].path)}
    return repair_folder(config.images, sources, config.fix, leave_out=leave_out)


def _same(report: Report, masks: Mapping[Path, Path | None], alike: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Of images with equal crops, which is what training sees, the groups that are equal as a whole, including
    masks."""
    from sfumato.data.images import open_mask, open_transparent

    for places in alike:
        found: dict[tuple[bytes, ...], list[int]] = {}
        for place in places:
            path = report.looks[place].path
            mask = masks.get(path)
            try:
                shown = [open_transparent(path), *([open_mask(mask)] if mask else [])]
            except DataError:  # of a mask, for which the image is left out by itself
                continue
            whole = tuple(f"{each.mode} {each.size}".encode() + sha256(each.tobytes()).digest() for each in shown)
            found.setdefault(whole, []).append(place)
        yield from (group for group in found.values() if len(group) > 1)


def _mended_lines(mended: RepairReport, config: Config) -> list[str]:
    lines = [
        f"mended copy in {config.fix}: {len(mended.copied)} copied, {len(mended.rewritten)} written anew, "
        f"{len(mended.left_out)} left out"
    ]
    told = ([f"  {name}: {why}" for name, why in mended.rewritten],
            [f"  {name} is left out: {why}" for name, why in mended.left_out])  # fmt: skip
    for some in told:
        lines += some[:20]
        if len(some) > 20:
            lines.append(f"  ... and {len(some) - 20:,} more (--json has them all)")
    return lines


def _sheets(report: Report, file: Path) -> list[Path]:
    """Every crop with its name, its caption and what is wrong with it, on sheets of 200."""
    from sfumato.data.checks.survey import crop_sheets, sheets_of
    from sfumato.generation.metadata.png_info import save_picture

    captions = [" | ".join(example.captions) for example in report.examples]
    numbers = range(2, sheets_of(len(captions)) + 1)
    paths = [file, *(file.with_name(f"{file.stem}-{number}{file.suffix}") for number in numbers)]
    for path in paths:
        _refuse_another(path)
    sheets = crop_sheets(report.looks, report.labels, captions)
    written = [
        save_picture(sheet, path, None, {"crops": len(captions)}) for path, sheet in zip(paths, sheets, strict=True)
    ]
    return written


if __name__ == "__main__":
    run(main)
