"""A folder of pictures -> examples: which files are learned from, with which captions and masks, and what is left out.

datasets/README.md has the format on one page. Nothing is decoded here; headers are read, so that most of what cannot be
learned from is refused before a base is loaded.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from sfumato.data.captions import (
    CAPTION_SUFFIXES,
    METADATA,
    check_template,
    fill_template,
    read_metadata,
    read_text,
    words_of,
)
from sfumato.data.images import SUFFIXES, read_size
from sfumato.errors import DataError

MaskSource = Literal["none", "alpha", "files"]
_REPEATS = re.compile(r"(\d{1,5})_(.*)")


@dataclass(frozen=True)
class Example:
    """One picture to learn from.

    repeats: how often an epoch holds it. mask: a picture, white where it is to be learned. alpha_mask: learn where
    it is opaque.
    """

    path: Path
    caption: str
    repeats: int = 1
    mask: Path | None = None
    alpha_mask: bool = False


@dataclass(frozen=True)
class Ignored:
    """A file or folder that is not learned from. name: relative to the folder."""

    name: str
    reason: str


@dataclass(frozen=True)
class Folder(Sequence[Example]):
    """The examples of a folder, sorted by name. notes: lines for the person. skip_bad: go on without bad files."""

    examples: tuple[Example, ...]
    ignored: tuple[Ignored, ...] = ()
    notes: tuple[str, ...] = ()
    skip_bad: bool = False

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def samples(self) -> int:
        """Pictures of one epoch, repeats counted."""
        return sum(example.repeats for example in self.examples)


def read_folder(
    path: Path,
    *,
    caption_template: str | None = None,
    trigger: str | None = None,
    skip_bad: bool = False,
    mask: MaskSource = "none",
) -> Folder:
    """The pictures of a folder with their captions.

    A caption comes from NAME.txt, NAME.caption, metadata.jsonl, the words of a kohya folder ("10_sks dog": 10 repeats),
    or, if there is a template, from the file's name; the template is then filled with it. mask: "alpha" learns the
    opaque part, "files" what is white in NAME.mask.png or masks/NAME.png. skip_bad: leave out the pictures whose
    header cannot be read, and (in `prepare`) those that cannot be decoded.

    Raises DataError for no folder, no pictures, bad pictures and missing captions; ConfigError for a bad template.
    """
    if caption_template is not None:
        check_template(caption_template, trigger)
    if not path.exists():
        raise DataError(f"{path}: there is no such folder. --images wants a folder of pictures.")
    if not path.is_dir():
        raise DataError(f"{path} is a file; --images wants the folder that the pictures are in.")
    reader = _Reader(path)
    reader.read()
    if not reader.pictures:
        raise DataError(f"{path}: no pictures in it{_ignored_words(reader.ignored)}. Put PNG or JPEG files there.")
    reader.drop_bad(skip_bad)
    examples = [
        Example(
            picture.path,
            reader.caption(picture, caption_template, trigger),
            picture.repeats,
            picture.mask if mask == "files" else None,
            mask == "alpha",
        )
        for picture in reader.pictures
    ]
    _check_captions(examples, caption_template)
    notes = [*reader.notes, *_mask_notes(path, examples, mask)]
    if reader.ignored:
        notes.insert(0, f"{len(examples)} pictures in {path.name}{_ignored_words(reader.ignored)}")
    if trigger and not any(trigger.casefold() in example.caption.casefold() for example in examples):
        notes.append(f'no caption holds the trigger {trigger!r}; pass --caption "{{caption}}, {{trigger}}" to add it')
    return Folder(tuple(examples), tuple(reader.ignored), tuple(notes), skip_bad)


@dataclass(frozen=True)
class _Found:
    path: Path
    repeats: int
    words: str
    metadata: str
    mask: Path | None


class _Reader:
    """Sorts a folder's files into pictures, their companions, and what is ignored."""

    def __init__(self, root: Path):
        self.root = root
        self.real_root = root.resolve()
        self.pictures: list[_Found] = []
        self.ignored: list[Ignored] = []
        self.notes: list[str] = []

    def read(self) -> None:
        entries = self._entries(self.root)
        kohya = [entry for entry in entries if entry.is_dir() and _REPEATS.fullmatch(entry.name)]
        if not kohya:
            self._folder(self.root, entries, 1, "")
            return
        for entry in entries:
            if entry not in kohya:
                self._ignore(entry, "beside folders with repeats, such as " + kohya[0].name)
        for folder in kohya:
            match = _REPEATS.fullmatch(folder.name)
            assert match
            if int(match[1]) == 0:
                self._ignore(folder, "0 repeats")
                continue
            self._folder(folder, self._entries(folder), int(match[1]), words_of(match[2]))

    def _entries(self, folder: Path) -> list[Path]:
        try:
            return sorted(folder.iterdir(), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder}: the folder cannot be read ({error.strerror}).") from None

    def _folder(self, folder: Path, entries: list[Path], repeats: int, words: str) -> None:
        listed = read_metadata(folder / METADATA) if (folder / METADATA).is_file() else {}
        below = [folder / name for name in listed if "/" in name]
        self._check_listed(folder, listed)
        pictures = [entry for entry in sorted({*entries, *below}) if self._is_picture(entry)]
        for path in pictures:
            metadata = listed.get(path.relative_to(folder).as_posix(), "")
            self.pictures.append(_Found(path, repeats, words, metadata, _mask_of(path)))
        companions = {path.with_suffix(suffix) for path in pictures for suffix in CAPTION_SUFFIXES}
        for entry in entries:
            if entry.suffix.lower() in CAPTION_SUFFIXES and entry not in companions and not entry.name.startswith("."):
                self._ignore(entry, "a caption without a picture")

    def _check_listed(self, folder: Path, listed: dict[str, str]) -> None:
        for name in listed:
            if not (folder / name).is_file():
                self.notes.append(f"{METADATA}: there is no picture {name}")

    def _is_picture(self, entry: Path) -> bool:
        """Whether to learn from it; if not, and it is no companion of a picture, why not."""
        if entry.name.startswith("."):
            self._ignore(entry, "hidden")
        elif entry.is_dir():
            if entry.name != "masks":
                self._ignore(entry, "a folder")
        elif not entry.is_file():
            self._ignore(entry, "a broken link" if entry.is_symlink() else "not a plain file")
        elif not entry.resolve().is_relative_to(self.real_root):
            self._ignore(entry, "leads out of the folder")
        elif entry.suffix.lower() in CAPTION_SUFFIXES or entry.name == METADATA or _is_document(entry):
            pass
        elif entry.suffix.lower() not in SUFFIXES:
            self._ignore(entry, "not a picture by its name")
        elif not entry.stem.endswith(".mask"):
            return True
        return False

    def _ignore(self, entry: Path, reason: str) -> None:
        self.ignored.append(Ignored(entry.relative_to(self.root).as_posix(), reason))

    def drop_bad(self, skip: bool) -> None:
        """Read every header; without `skip`, bad ones end here."""
        bad: dict[Path, str] = {}
        for picture in self.pictures:
            try:
                read_size(picture.path)
            except DataError as error:
                bad[picture.path] = str(error)
        refuse_bad(list(bad.values()), len(self.pictures), skip)
        for path, reason in bad.items():
            self._ignore(path, reason.removeprefix(f"{path.name}: "))
        self.pictures = [picture for picture in self.pictures if picture.path not in bad]

    def caption(self, picture: _Found, template: str | None, trigger: str | None) -> str:
        """The picture's caption; empty if it has none."""
        found = self._caption_file(picture.path) or picture.metadata or picture.words
        if template is None:
            return found
        return fill_template(template, found or words_of(picture.path.stem), trigger)

    def _caption_file(self, picture: Path) -> str:
        for suffix in CAPTION_SUFFIXES:
            path = picture.with_suffix(suffix)
            if not path.is_file():
                continue
            text, guessed = read_text(path)
            if guessed:
                self.notes.append(f"{path.name}: not UTF-8; read as {guessed}: {text[:60]!r}")
            if text:
                return text
            self.notes.append(f"{path.name}: empty, so taken for missing")
        return ""


def refuse_bad(reasons: Sequence[str], total: int, skip: bool) -> None:
    """End with the bad pictures' names and reasons, unless they may be skipped and some are left."""
    if not reasons or (skip and len(reasons) < total):
        return
    shown = "; ".join(reason.rstrip(".") for reason in reasons[:3])
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    advice = "None is left to learn from." if skip else "Mend or remove them, or pass --skip-bad to go on without them."
    raise DataError(f"{len(reasons)} of {total} pictures cannot be learned from: {shown}{more}. {advice}")


def _is_document(entry: Path) -> bool:
    """A read-me or a licence, which nobody takes for a picture that was forgotten."""
    return entry.suffix.lower() == ".md" or entry.stem.upper() in ("LICENSE", "LICENCE")


def _mask_of(picture: Path) -> Path | None:
    candidates = (picture.with_name(f"{picture.stem}.mask.png"), picture.parent / "masks" / f"{picture.stem}.png")
    return next((path for path in candidates if path.is_file()), None)


def _check_captions(examples: Sequence[Example], template: str | None) -> None:
    missing = [example.path.name for example in examples if not example.caption]
    if not missing:
        return
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    if template is not None:
        raise DataError(f"{shown}: the caption is empty once put into {template!r}. Put words into the template.")
    raise DataError(
        f"{len(missing)} of {len(examples)} pictures have no caption: {shown}. Write NAME.txt beside each, list them "
        f'in {METADATA}, or pass --caption "{{caption}}" to take the words of the file names.'
    )


def _mask_notes(root: Path, examples: Sequence[Example], mask: MaskSource) -> Iterator[str]:
    if mask != "files":
        return
    without = [example.path.name for example in examples if example.mask is None]
    if len(without) == len(examples):
        raise DataError(f"{root}: no masks in it. Put NAME.mask.png beside NAME.png, or masks/NAME.png.")
    if without:
        yield f"{len(without)} pictures have no mask and are learned whole: {', '.join(without[:3])}"


def _ignored_words(ignored: Sequence[Ignored]) -> str:
    if not ignored:
        return ""
    shown = ", ".join(f"{entry.name} ({entry.reason.rstrip('.')})" for entry in ignored[:5])
    more = f" and {len(ignored) - 5} more" if len(ignored) > 5 else ""
    return f", {len(ignored)} ignored: {shown}{more}"
