"""The pictures that a command line asks for: prompts and their own settings, size, a picture to begin from, files.

Imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from sfumato.adapters.prompt_tags import LETTERS
from sfumato.errors import ConfigError
from sfumato.generation.arguments.adapters import refuse_prompt_tags
from sfumato.generation.arguments.axes import CHECKS
from sfumato.generation.image_options import PictureRequest, round_side
from sfumato.utils.atomic import checked_folder
from sfumato.utils.limits import checked_area

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Of the pictures that are written, in small letters."""


def checked_flags(flags: Mapping[str, Any], *, sheet: bool) -> dict[str, Any]:
    """What a prompt's own options set. sheet: whether the pictures are for one. Raises ConfigError, one line."""
    for name in CHECKS.keys() & flags.keys():
        try:
            CHECKS[name](flags[name])
        except ConfigError as error:
            raise ConfigError(f"--{LETTERS[name]} {flags[name]} in a prompt: {error}") from None
    refuse_prompt_tags(flags.get("negative", ""), "--n")
    for letter, name in (("w", "width"), ("h", "height")):
        if name in flags and (flags[name] <= 0 or flags[name] % 8):
            near = round_side(flags[name])
            raise ConfigError(f"--{letter} {flags[name]} in a prompt: wanted a multiple of 8; the nearest is {near}.")
    checked_area(flags.get("width", 8), flags.get("height", 8))
    if sheet and flags.keys() - {"seed"}:
        raise ConfigError(
            "a sheet has one setting for all: instead of options in a prompt give --negative, --size, --steps or "
            "--guidance."
        )
    return dict(flags)


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) in pixels of WIDTHxHEIGHT, or of one number. Raises ConfigError, one line."""
    found = re.fullmatch(r"(\d{1,5})(?:[xX*](\d{1,5}))?", text)
    if not found:
        raise ConfigError(f"--size {text}: wanted WIDTHxHEIGHT in pixels, such as 512x768.")
    width, height = int(found[1]), int(found[2] or found[1])
    if width % 8 or height % 8 or not width or not height:
        near = "x".join(str(round_side(side)) for side in (width, height))
        raise ConfigError(f"--size {text}: both sides are multiples of 8; the nearest is {near}.")
    checked_area(width, height)
    return width, height


def check_start(image: Path | None, mask: Path | None, strength: float | None) -> None:
    """Refuse what --image, --mask and --strength cannot mean."""
    if mask and not image:
        raise ConfigError(f"--mask {mask}: a mask wants the image that it is for; give --image, too.")
    if strength is not None and not image:
        raise ConfigError(f"--strength {strength:g}: says how much of an image is drawn anew; give --image, too.")
    if strength is not None and not 0 < strength <= 1:
        raise ConfigError(f"--strength {strength:g}: wanted above 0 and at most 1; 0.6 is usual.")
    for option, file in (("--image", image), ("--mask", mask)):
        if file is not None and isdir(file):
            raise ConfigError(f"{option} {file}: a folder; name one image in it.")
        if file is not None and not isfile(file):
            raise ConfigError(f"{option} {file}: there is no such image; name one that is there.")


_OTHER_FILES = frozenset(
    (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".psd", ".svg", ".pdf", ".txt", ".json", ".safetensors")
)


def picture_files(
    output: Path, pictures: Sequence[PictureRequest], *, is_sheet: bool, may_exist: bool, given: Sequence[str]
) -> tuple[Path, ...]:
    """One file for each picture, or one for the sheet of all. given: the prompts as the command line has them.

    Raises ConfigError for a file that exists, unless it `may_exist`, and where they cannot be written.
    """
    count = 1 if is_sheet else len(pictures)
    suffix = "" if output.is_dir() else output.suffix.lower()
    if not output.is_dir() and output.name.lower() in SUFFIXES:  # whose suffix is none
        raise ConfigError(f"--output {output}: a file's ending without its name; name it, such as crab{output.name}.")
    is_file = suffix in SUFFIXES
    is_near = not is_file and bool(difflib.get_close_matches(suffix, SUFFIXES))  # .pgn, which would be a folder
    if is_near or suffix in _OTHER_FILES:
        raise ConfigError(f"--output {output}: images are written as .png, .jpg or .webp; name one of these.")
    if is_file and count > 1:
        shown = ", ".join(f"{prompt!r:.40}" for prompt in given[:3])
        several = f", or put the words of one prompt into quotes: {shown} are several" if given[1:] else ""
        raise ConfigError(f"--output {output}: {count} images do not fit into one file; name a folder{several}.")
    names = [f"{i:03}-{_slug(each.prompt)}-{each.seed}" for i, each in enumerate(pictures, start=1)]
    in_folder = tuple(output / f"{name}.png" for name in (["sheet"] if is_sheet else names))
    files = (output,) if is_file else in_folder
    checked_folder(output.parent if is_file else output, f"--output {output}")
    there = [file for file in files if file.exists()]
    if there and not may_exist:
        or_skip = "" if len(files) == 1 else ", or --skip-existing for the others alone"
        raise ConfigError(
            f"--output {output}: {there[0]} exists already; name another place, or say --overwrite{or_skip}."
        )
    return files


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"
