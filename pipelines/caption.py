"""Write captions for images that have none, with BLIP, Florence-2 or a WD tagger. Never overwrites captions."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfumato.cli import run
from sfumato.config import parse
from sfumato.errors import ConfigError, DataError
from sfumato.utils.atomic import fsync_path, temporary_sibling
from sfumato.utils.formatting import escape_control, format_list, option_flag, pluralize, say

if TYPE_CHECKING:
    from sfumato.data.captioners import Captioner
    from sfumato.data.listing import ListedPicture


@dataclass(frozen=True)
class Config:
    """Caption the images of a folder that have no caption. Shows some captions; --write saves NAME.txt beside each
    image.

    Existing captions are never changed.

    Example: sfumato caption pictures --model models/blip --write
    """

    images: Path
    """Folder of images, or a dataset.toml."""
    model: str
    """Captioning model, a folder or hub id: BLIP, Florence-2 (florence-community/Florence-2-base), or a WD tagger
    (model.onnx)."""
    _: KW_ONLY
    write: bool = False
    """Write the captions. Without it some are only shown."""
    preview: int = 4
    """Number of captions to show without --write."""
    prefix: str = ""
    """Text to put before each caption, such as "zwx, "."""
    suffix: str = ""
    """Text to put after each caption, such as ", zwx style"."""
    detail: Literal["short", "detailed", "paragraph"] = "detailed"
    """How much Florence-2 says."""
    longest: int = 75
    """Largest number of tokens in a caption of BLIP or Florence-2. Training reads 75, or more with --max-tokens."""
    threshold: float = 0.35
    """Lowest probability at which a tagger's tag is used."""
    character_threshold: float = 0.85
    """The same for a tagger's names of characters."""
    without: tuple[str, ...] = ()
    """Tag of a tagger to leave out. Repeat the option for several."""
    batch: int = 4
    """Images per batch."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format that BLIP or Florence-2 is computed in."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1 or mps."""
    json: bool = False
    """Print JSON for other programs."""


def main(argv: Sequence[str]) -> int:
    """Show or write the captions. Returns 1 if an image could not be captioned, else 0."""
    # A first word that ends in .toml is the data set, not a config of this program (--config names one).
    config = parse(Config, argv, program="caption", first_may_be_config=False)
    check(config)
    wanted, captioned, silent = pictures_without(config.images)
    if silent:
        say(
            f"{format_list(silent)}: empty or unreadable, and nothing is written over. Remove such files to "
            f"have captions "
            "written there."
        )
    if not wanted and not config.json:
        print(
            f"{config.images}: {pluralize(captioned, 'image has', 'images have')} captions; nothing to do.",
            file=sys.stderr,
        )
        return 0
    chosen = list(wanted.values()) if config.write else list(wanted.values())[: config.preview]
    files = {found.path: file for file, found in wanted.items()}
    done: dict[str, str] = {}
    failed: list[str] = []
    for found, caption in captions(chosen, _captioner(config), config, failed) if chosen else ():
        if config.write:
            write_new(files[found.path], caption)
        done[found.path.as_posix()] = caption
        if not config.json:
            print(escape_control(f"{found.path.name}: {caption}"))
    say(*map(escape_control, failed))
    if config.json:
        print(json.dumps({"written": config.write, "captions": done, "failed": failed, "empty": silent}, indent=2))
    verb = "written" if config.write else "shown; --write writes them"
    kept = f"{pluralize(captioned, 'image')} had one already, kept as it is"
    print(f"{len(done)} of {len(wanted)} captions {verb}; {kept}.", file=sys.stderr)
    return 1 if failed else 0


def _captioner(config: Config) -> Captioner:
    from sfumato.data.captioners import CaptionSettings, load_captioner
    from sfumato.precision import decide

    wishes = CaptionSettings(**{wish.name: getattr(config, wish.name) for wish in fields(CaptionSettings)})
    return load_captioner(config.model, decide(config.precision, device=config.device), wishes)


def check(config: Config) -> None:
    """Refuse options that make no sense, before anything is loaded."""
    for name in ("preview", "longest", "batch"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name} is {getattr(config, name)}; it must be at least 1.")
    for name in ("threshold", "character_threshold"):
        if not 0 < getattr(config, name) <= 1:
            option = option_flag(name)
            raise ConfigError(f"{option} is {getattr(config, name)}; it must be above 0 and at most 1.")
    if config.write and config.preview != Config.preview:
        raise ConfigError("--preview has no effect beside --write, which writes all captions; leave one out.")


def pictures_without(images: Path) -> tuple[dict[Path, ListedPicture], int, list[str]]:
    """(caption file -> the image that has no caption yet, number of images that have one, caption files that say
    nothing).

    An empty or unreadable caption file stays as it is. If images share a caption file, as dog.jpg and dog.png do, the
    first is captioned. An image that several sources name counts once.
    """
    from sfumato.data.dataset_config import read_sources

    wanted: dict[Path, ListedPicture] = {}
    captioned: set[Path] = set()
    silent: dict[Path, str] = {}
    for source in read_sources(images):
        for found in source.list().pictures:
            place = found.path.parent.resolve() / found.path.name
            files = [place.with_name(f"{place.stem}{suffix}") for suffix in source.suffixes]
            there = [file.name for file in files if os.path.lexists(file)]
            if found.caption.text and found.caption.origin != "folder name":
                captioned.add(place)
            elif there or found.caption.error:
                silent[place] = there[0] if there else found.caption.origin  # NAME.TXT, which is found, too
            else:
                wanted.setdefault(files[0], found)
    if not wanted and not captioned and not silent:
        raise DataError(f"{images}: no images in it. Put PNG or JPEG files there.")
    return wanted, len(captioned), list(silent.values())


def captions(
    wanted: Sequence[ListedPicture], captioner: Captioner, config: Config, failed: list[str]
) -> Iterator[tuple[ListedPicture, str]]:
    """Yield each image and its caption. Images that cannot be opened are added to `failed`, with the reason."""
    from sfumato.data.images import open_image

    for start in range(0, len(wanted), config.batch):
        good, images = [], []
        for found in wanted[start : start + config.batch]:
            try:
                images.append(open_image(found.path))
                good.append(found)
            except DataError as error:
                failed.append(str(error))
        if not good:
            continue
        for found, caption in zip(good, captioner(images), strict=True):
            if caption:
                yield found, f"{config.prefix}{caption}{config.suffix}"
            else:
                failed.append(f"{found.path.name}: the model said nothing about it.")


def write_new(path: Path, caption: str) -> None:
    """Write a new caption file, complete or not at all. Raises DataError if one exists by now."""
    temporary = temporary_sibling(path, path.suffix)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(caption + "\n")
        fsync_path(temporary)
        _into_place(temporary, path)
    except FileExistsError:
        raise DataError(f"{path.name}: a caption appeared meanwhile; it is not written over. Start again.") from None
    except OSError as error:
        raise DataError(f"{path}: the caption cannot be written ({error.strerror}). See to it, and go on.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _into_place(temporary: Path, path: Path) -> None:
    """Give a file its name. Raises FileExistsError where something is by that name, even a broken link."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, such as a memory stick's
        path.open("x").close()
        temporary.replace(path)


if __name__ == "__main__":
    run(main)
