"""What lies in a folder: pictures with their companions, and what is ignored and why. Opens captions, no picture."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import abspath
from pathlib import Path

from sfumato.data.captions import (
    CAPTION_SUFFIXES,
    METADATA_FILE,
    guess_from,
    is_encodable,
    normalize_spaces,
    read_metadata,
    read_text,
    words_in_name,
)
from sfumato.data.checksums import CHECKSUMS_FILE, check_files, read_sums
from sfumato.data.images import SUFFIXES
from sfumato.errors import DataError
from sfumato.utils.formatting import format_list, pluralize

REPEATS_PATTERN = re.compile(r"(\d{1,5})_(.*)")
"""kohya's folders: "10_sks dog" holds pictures that come ten times in an epoch, and their caption."""


_MASKS = (".mask", "-masklabel")
"""How the names of masks beside their pictures end, here and in OneTrainer's folders."""
FOLDER_OF_PICTURES = "a folder; its images are not read"
FOLDER_OF_REPEATS = "a folder of folders with repeats"
"""`img` and `reg` within the folder that kohya's GUI makes."""


@dataclass(frozen=True)
class Caption:
    """A picture's caption as it was found. text: as `captions.by_line` has it, empty if there is none. origin: a file's
    name, "folder name" or "". error: why the caption's file cannot be read."""

    text: str = ""
    origin: str = ""
    error: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListedPicture:
    """A file that is taken for a picture, by its name.

    repeats: how often an epoch holds it. mask: its mask's file. checksums: sha256 of both as SHA256SUMS lists them, in
    hex, "" where it does not.
    """

    path: Path
    caption: Caption
    repeats: int = 1
    mask: Path | None = None
    checksums: tuple[str, str] = ("", "")

    @property
    def files(self) -> list[Path]:
        """The picture, and its mask if there is one."""
        return [self.path] if self.mask is None else [self.path, self.mask]


@dataclass(frozen=True)
class Ignored:
    """A file or folder that is not learned from. name: relative to the folder."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """A folder's pictures, sorted by name within each folder; what is left out; lines for the person."""

    root: Path
    pictures: tuple[ListedPicture, ...]
    ignored: tuple[Ignored, ...]
    notes: tuple[str, ...]


def list_folder(path: Path, *, words: str = "", suffixes: Sequence[str] = CAPTION_SUFFIXES) -> Listing:
    """What lies in `path`. words: the caption of pictures that have none. suffixes: endings of caption files.

    Nothing outside the folder is followed, nothing that could block is opened. Raises DataError for what is no folder.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such folder. --images wants a folder of images, or a dataset.toml.")
    if not path.is_dir():
        others = " sfumato dataset converts other tools' configs." if path.suffix in (".json", ".yaml", ".yml") else ""
        raise DataError(
            f"{path} is a file; --images wants the folder that the images are in, or a dataset.toml.{others}"
        )
    reader = _Reader(path, words, tuple(suffixes))
    reader.read()
    return Listing(path, tuple(reader.pictures), tuple(reader.ignored), tuple(reader.notes))


def own_name_note(folder: Path) -> str:
    """What to say of a folder that is named itself although its name is kohya's; empty for others."""
    folder = Path(abspath(folder)) if folder.name in ("", "..") else folder
    match = REPEATS_PATTERN.fullmatch(folder.name)
    if not match or not is_encodable(folder.name):
        return ""
    words = words_in_name(match[2])
    meant = f"{pluralize(int(match[1]), 'repeat')}{f' and the caption {words!r}' if words else ''}"
    return f"{folder.name}: its {meant} count where {folder.parent}, the folder above it, is named; here they do not"


class _Reader:
    """Sorts a folder's files into pictures, their companions, and what is ignored."""

    def __init__(self, root: Path, words: str, suffixes: tuple[str, ...]):
        self.root, self.words, self.suffixes = root, words, suffixes
        self.real_root = root.resolve()
        self.pictures: list[ListedPicture] = []
        self.ignored: list[Ignored] = []
        self.notes: list[str] = []
        self.captions: list[Path] = []
        self.likely: str | None = None
        self.read_below: set[Path] = set()
        self.inside: dict[Path, bool] = {}
        self.spelt: dict[Path, dict[str, Path]] = {}
        self.sums: dict[Path, str] = {}
        self.differing: list[str] = []

    def read(self) -> None:
        entries = self._entries(self.root)
        self._read_sums(self.root)
        self._folders(entries)
        self._compare_sums()
        self._note_conflicting_captions()

    def _read_sums(self, folder: Path) -> None:
        self.sums |= {folder / name: digest for name, digest in read_sums(folder).items()}

    def _compare_sums(self) -> None:
        """Say what is listed and not there, and what is there and not listed."""
        absent = [path.relative_to(self.root).as_posix() for path in self.sums if not path.is_file()]
        if absent:
            self.notes.append(
                f"{CHECKSUMS_FILE} lists {pluralize(len(absent), 'file that is', 'files that are')} not there: "
                f"{format_list(absent)}"
            )
        unlisted = [found.path.name for found in self.pictures if not found.checksums[0]]
        if self.sums and unlisted:
            self.notes.append(
                f"{CHECKSUMS_FILE} does not list {pluralize(len(unlisted), 'image')}, left unchecked: "
                f"{format_list(unlisted)}"
            )

    def _note_conflicting_captions(self) -> None:
        """Say which pictures have captions in two places that contradict each other."""
        if self.differing[1:]:
            self.notes.append(f"{len(self.differing)} images have captions that differ, such as {self.differing[0]}")
        else:
            self.notes.extend(self.differing)

    def _folders(self, entries: list[Path]) -> None:
        kohya = [entry for entry in entries if REPEATS_PATTERN.fullmatch(entry.name) and entry.is_dir()]
        if not kohya:
            self._folder(self.root, entries, 1, self.words)
            return
        for entry in entries:
            if entry not in kohya and entry.name != CHECKSUMS_FILE:
                self._ignore(entry, "beside folders with repeats, such as " + kohya[0].name)
        for folder in kohya:
            match = REPEATS_PATTERN.fullmatch(folder.name)
            assert match
            if int(match[1]) == 0:
                self._ignore(folder, "0 repeats")
                continue
            if not folder.resolve().is_relative_to(self.real_root):
                self._ignore(folder, "leads out of the folder")
                continue
            if 1900 <= int(match[1]) < 2100:
                self.notes.append(
                    f"{folder.name}: {int(match[1]):,} repeats an epoch, as kohya's folders are named; give a folder "
                    "of a year another name"
                )
            self._read_sums(folder)
            self._folder(folder, self._entries(folder), int(match[1]), words_in_name(match[2]) or self.words)

    def _entries(self, folder: Path) -> list[Path]:
        try:
            return sorted(folder.iterdir(), key=lambda entry: entry.name)
        except OSError as error:
            reason = f"the folder cannot be read ({error.strerror}). See to its permissions."
            raise DataError(f"{folder}: {reason}") from None

    def _folder(self, folder: Path, entries: list[Path], repeats: int, words: str) -> None:
        described = self._metadata(folder)
        below = [path for path in described if path.parent != folder]
        self.captions = [e for e in entries if self._is_caption(e) and self._is_inside(e)]
        self.likely = None
        self.read_below = {parent for path in below for parent in path.parents}
        # By their parts: Windows compares paths in small letters, and the order decides what is learned.
        ordered = sorted({*entries, *below}, key=lambda path: path.parts)
        pictures = [entry for entry in ordered if self._is_picture(entry)]
        for path in pictures:
            caption = self._caption(path, described.get(path, ""), words)
            mask = self._mask_of(path)
            sums = (self.sums.get(path, ""), self.sums.get(mask, "") if mask else "")
            self.pictures.append(ListedPicture(path, caption, repeats, mask, sums))
        self._ignore_unmatched(folder, entries, pictures)

    def _metadata(self, folder: Path) -> dict[Path, str]:
        """The texts of the folder's metadata.jsonl, by picture."""
        if not (folder / METADATA_FILE).is_file():
            return {}
        if not self._is_inside(folder / METADATA_FILE):
            self.notes.append(f"{METADATA_FILE}: leads out of the folder, so it is not read")
            return {}
        self._check(folder / METADATA_FILE)
        listed = read_metadata(folder / METADATA_FILE)
        described = {self._listed(folder / name): text for name, text in listed.items()}
        lacking = [name for name, text in listed.items() if not text]
        if lacking and len(lacking) == len(listed):
            self.notes.append(f'{METADATA_FILE}: no line of it has a "text", so it holds no caption')
        elif lacking:
            found = pluralize(len(lacking), "line has", "lines have")
            self.notes.append(f'{METADATA_FILE}: {found} no "text", so no caption: {format_list(lacking)}')
        for path in described:
            if not path.is_file():
                self.notes.append(f"{METADATA_FILE}: there is no image {path.relative_to(folder).as_posix()}")
        return described

    def _ignore_unmatched(self, folder: Path, entries: list[Path], pictures: list[Path]) -> None:
        """Note the captions and masks that belong to none of the pictures."""
        beside = [path.stem for path in pictures if path.parent == folder]
        companions = {_normalize_unicode(f"{stem}{suffix}") for stem in beside for suffix in self.suffixes}
        masks = {found.mask for found in self.pictures}
        for entry in (each for each in entries if not each.name.startswith(".")):
            if self._is_caption(entry) and self._lowered(entry) not in companions:
                self._ignore(entry, "a caption without an image")
            elif not self._is_inside(entry):  # of which that is said already
                continue
            elif entry.suffix.lower() in SUFFIXES and entry.stem.endswith(_MASKS) and entry not in masks:
                self._ignore(entry, _idle_mask(entry))
        for entry in self._entries(folder / "masks") if (folder / "masks").is_dir() else []:
            if entry.suffix.lower() in SUFFIXES and entry not in masks:
                leads_out = entry.is_file() and not self._is_inside(entry)
                self._ignore(entry, "leads out of the folder" if leads_out else _idle_mask(entry))

    def _listed(self, path: Path) -> Path:
        """The picture that a line of metadata.jsonl means by this path."""
        # By the folder's own spelling: a Mac opens a file by another spelling, too, which then is no picture listed.
        here = path.parent
        found = self._companion(here, path.name) or self._companion(here, self._lowered(path))
        if found is None and path.is_file():  # in capitals elsewhere, where the system makes no difference
            found = next((each for each in self._entries(here) if each.is_file() and each.samefile(path)), None)
        return found or path

    def _companion(self, folder: Path, name: str) -> Path | None:
        """The plain file of this name in the folder, whose suffix may be in capitals."""
        if folder not in self.spelt:  # once, since ten thousand pictures would be looked for ten thousand times
            there = self._entries(folder) if folder.is_dir() else []
            small = {self._lowered(entry): entry for entry in there}
            self.spelt[folder] = small | {entry.name: entry for entry in there}
        path = self.spelt[folder].get(name) or self.spelt[folder].get(_normalize_unicode(name))
        return path if path is not None and path.is_file() else None  # a pipe by that name would never end

    def _mask_of(self, picture: Path) -> Path | None:
        places = [(picture.parent, f"{picture.stem}{end}.png") for end in _MASKS]
        found = (self._companion(*place) for place in (*places, (picture.parent / "masks", f"{picture.stem}.png")))
        return next((mask for mask in found if mask is not None and self._is_inside(mask)), None)

    def _is_picture(self, entry: Path) -> bool:
        """Whether to learn from it; if not, and it is no companion of a picture, why not."""
        if entry.name.startswith("."):
            self._ignore(entry, "hidden")
        elif entry.is_dir():
            if entry.name != "masks" and entry not in self.read_below:
                self._ignore(entry, _kind_of(entry))
        elif not entry.is_file():
            self._ignore(entry, "a broken link" if entry.is_symlink() else "not a plain file")
        elif not self._is_inside(entry):
            self._ignore(entry, "leads out of the folder")
        elif self._is_caption(entry) or entry.name in (METADATA_FILE, CHECKSUMS_FILE) or _is_document(entry):
            pass
        elif entry.name == "metadata.csv":
            self._ignore(entry, f"captions are read from {METADATA_FILE}")
        elif entry.suffix.lower() not in SUFFIXES:
            self._ignore(entry, "not an image by its name")
        elif entry.stem.endswith("-condlabel"):
            self._ignore(entry, "OneTrainer's image to inpaint by")
        elif not entry.stem.endswith(_MASKS):
            return True
        return False

    def _is_caption(self, entry: Path) -> bool:
        """Whether it ends as captions do, be it in two parts, such as ".tags.txt"."""
        return entry.name.lower().endswith(self.suffixes)

    def _lowered(self, entry: Path) -> str:
        """Its name with the ending in small letters, all of it where captions end in two parts, composed."""
        end = next((end for end in self.suffixes if entry.name[-len(end) :].lower() == end), entry.suffix.lower())
        return _normalize_unicode(entry.name[: len(entry.name) - len(end)] + end)

    def _is_inside(self, file: Path) -> bool:
        """Whether it is a plain file that no link leads out of the folder for."""
        folder = file.parent
        if folder not in self.inside:  # a link may lead out on the way, too
            self.inside[folder] = folder.resolve().is_relative_to(self.real_root)
        if not file.is_file() or not self.inside[folder]:
            return False
        return not file.is_symlink() or file.resolve().is_relative_to(self.real_root)

    def _check(self, file: Path) -> None:
        check_files([file], [self.sums.get(file, "")])

    def _ignore(self, entry: Path, reason: str) -> None:
        self.ignored.append(Ignored(entry.relative_to(self.root).as_posix(), reason))

    def _caption(self, picture: Path, metadata: str, words: str) -> Caption:
        notes: list[str] = []
        named = [self._companion(picture.parent, f"{picture.stem}{suffix}") for suffix in self.suffixes]
        paths = [path for path in named if path is not None]
        for place, path in enumerate(paths, start=1):
            if not self._is_inside(path):
                notes.append(f"{path.name}: leads out of the folder, so it is not read")
                continue
            try:
                self._check(path)
                text, guessed = self._text_of(path)
            except DataError as error:
                return Caption(origin=path.name, error=str(error))
            if guessed:
                notes.append(f"{path.name}: not UTF-8; read as {guessed}: {text[:60]!r}")
            if text:
                if others := self._otherwise(text, paths[place:], metadata):
                    said = f"{' and '.join(others)} {'says' if len(others) == 1 else 'say'} otherwise"
                    self.differing.append(f"{picture.name}: {path.name} is read; {said}")
                return Caption(text, path.name, notes=tuple(notes))
            notes.append(f"{path.name}: empty, so taken for missing")
        if metadata:
            return Caption(metadata, METADATA_FILE, notes=tuple(notes))
        return Caption(words, "folder name" if words else "", notes=tuple(notes))

    def _text_of(self, path: Path) -> tuple[str, str | None]:
        text, guessed = read_text(path)
        if guessed:  # one caption is short; all of the folder's together tell more
            self.likely = self.likely or guess_from(self.captions)
            text, guessed = read_text(path, self.likely)
        return text, guessed

    def _otherwise(self, text: str, paths: Sequence[Path], metadata: str) -> list[str]:
        """The names of the further sources that hold another caption than this text. paths: the files; metadata: the
        text of metadata.jsonl."""
        others = {METADATA_FILE: metadata}
        for path in paths:
            if self._is_inside(path):
                with suppress(DataError):  # of a file that is not needed
                    others[path.name] = self._text_of(path)[0]
        return [name for name, other in others.items() if normalize_spaces(other) not in ("", normalize_spaces(text))]


def _is_document(entry: Path) -> bool:
    """A read-me or a licence, which nobody takes for a picture that was forgotten."""
    return entry.suffix.lower() == ".md" or entry.stem.upper() in ("LICENSE", "LICENCE")


def _kind_of(folder: Path) -> str:
    """What to call a folder that is not read."""
    try:
        entries = list(folder.iterdir())
    except OSError:
        return "a folder"
    if any(entry.suffix.lower() in SUFFIXES for entry in entries):
        return FOLDER_OF_PICTURES
    return (
        FOLDER_OF_REPEATS
        if any(REPEATS_PATTERN.fullmatch(each.name) and each.is_dir() for each in entries)
        else "a folder"
    )


def group_notes(notes: Iterable[str]) -> list[str]:
    """Notes that begin with a file's name; for those that say the same, be it with another example after a colon, one
    line."""
    found: dict[str, list[tuple[str, str]]] = {}
    for note in notes:
        name, _, text = note.partition(": ")
        found.setdefault(text.partition(": ")[0], []).append((name, text))
    return [f"{format_list([name for name, _ in alike])}: {alike[0][1]}" for alike in found.values()]


def _normalize_unicode(name: str) -> str:
    """The name with each accent in its letter; files from a Mac have them apart, so that "é" is not "é"."""
    return unicodedata.normalize("NFC", name)


def _idle_mask(entry: Path) -> str:
    return "a mask that no image takes" if entry.suffix.lower() == ".png" else "masks are read from .png"
