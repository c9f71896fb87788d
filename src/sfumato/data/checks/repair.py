"""A copy of a folder as it should be: whole pictures, upright, 8-bit sRGB, captions in UTF-8. Imports no torch."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags

from sfumato.data.checksums import check_files, write_sums
from sfumato.data.dataset_config import Source
from sfumato.data.images import open_as_stored, open_mask, open_picture, open_transparent
from sfumato.data.listing import REPEATS_PATTERN, ListedPicture
from sfumato.errors import ConfigError, DataError
from sfumato.utils.atomic import atomic_folder
from sfumato.utils.text_files import decode_text

_KEPT = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class RepairReport:
    """copied, rewritten, left_out: (file, why) of each picture."""

    copied: tuple[str, ...]
    rewritten: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str], ...]


def repair_folder(path: Path, sources: Sequence[Source], target: Path, *, leave_out: dict[Path, str]) -> RepairReport:
    """Write the sources' pictures, captions and masks into `target`, which must be new or empty.

    leave_out: picture -> why it is not taken (bad ones, duplicates). The originals are only read. With a dataset.toml a
    new one is written that names the copies. Whole or not at all. Raises ConfigError for a target that holds something.
    """
    originals = [source.path.resolve() for source in sources]
    place = target.resolve()
    if any(place == folder or folder in place.parents or place in folder.parents for folder in originals):
        raise ConfigError(f"--fix {target}: is, holds or lies in the folder of the originals. Name another place.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--fix {target}: exists and is not empty, and nothing is written over. Name a new folder.")
    copier = _Copier(leave_out)
    with atomic_folder(place) as part:
        folders = [part] if len(sources) == 1 and path.is_dir() else _folders(part, sources)
        filled: dict[Path, bool] = {}
        for source, folder in zip(sources, folders, strict=True):
            if folder not in filled:
                filled[folder] = copier.copy(source, folder)
        if not path.is_dir():
            _write_toml(path, part, folders, filled)
    return RepairReport(tuple(copier.copied), tuple(copier.rewritten), tuple(copier.left_out))


class _Copier:
    def __init__(self, leave_out: dict[Path, str]):
        self.leave_out = leave_out
        self.copied: list[str] = []
        self.rewritten: list[tuple[str, str]] = []
        self.left_out: list[tuple[str, str]] = []

    def copy(self, source: Source, folder: Path) -> bool:
        """Whether the folder has a picture now."""
        listing = source.list()
        taken: dict[str, dict[str, ListedPicture]] = {}
        folder.mkdir(exist_ok=True)
        for found in listing.pictures:
            relative = found.path.relative_to(listing.root)
            if found.path in self.leave_out:
                self.left_out.append((relative.as_posix(), self.leave_out[found.path]))
                continue
            try:
                self._one(found, relative, folder, taken, source.suffixes)
            except DataError as error:
                self.left_out.append((relative.as_posix(), str(error).removeprefix(f"{found.path.name}: ")))
        if any(any(found.checksums) for found in listing.pictures):
            write_sums(folder, [path for path in folder.rglob("*") if path.is_file()])
        return bool(taken)

    def _one(
        self,
        found: ListedPicture,
        relative: Path,
        folder: Path,
        taken: dict[str, dict[str, ListedPicture]],
        suffixes: Sequence[str],
    ) -> None:
        """taken: the copies so far, by their path without its ending, and by the ending; both as a file system reads
        them that makes no difference between capitals and small letters."""
        check_files(found.files, found.checksums)
        mask = None if found.mask is None else open_mask(found.mask)
        why = _why_rewritten(found.path)
        # In a folder with repeats, or in the folder itself: what metadata.jsonl named further below moves up, since the
        # copy has captions beside its pictures and reads no other folders.
        upper = relative.parts[0] if len(relative.parts) > 1 and REPEATS_PATTERN.fullmatch(relative.parts[0]) else "."
        place = folder / upper / relative.with_suffix(".png" if why else relative.suffix).name
        number = 2
        while (suffix := place.suffix.lower()) in (beside := taken.setdefault(_alike(place), {})) or any(
            # a.png, and a.heic that becomes one; or a caption's file for two captions
            other.caption.text != found.caption.text or other.mask != found.mask
            for other in beside.values()
        ):
            # A name that may have to serve as the caption gets what `words_of` passes over.
            more = f"-{number}" if found.caption.text else "_" * (number - 1)
            place = place.with_name(f"{relative.stem}{more}{place.suffix}")
            number += 1
        beside[suffix] = found
        place.parent.mkdir(parents=True, exist_ok=True)
        if why:
            # Its colours are sRGB by now, or a guess that they are; a profile that says otherwise is left behind.
            open_transparent(found.path).save(place, icc_profile=None)
            self.rewritten.append((relative.as_posix(), why))
        else:
            shutil.copyfile(found.path, place)
            self.copied.append(relative.as_posix())
        if found.caption.text and found.caption.origin != "folder name":
            kept = (end for end in suffixes if found.caption.origin.lower().endswith(end))
            text = place.with_name(f"{place.stem}{next(kept, suffixes[0])}")
            text.write_text(found.caption.text + "\n", encoding="utf-8")
        if mask is not None:
            mask.save(place.with_name(f"{place.stem}.mask.png"))


def _alike(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path.with_suffix(""))).casefold()


def _why_rewritten(path: Path) -> str:
    """Why a picture is written anew; empty if its file may stay as it is. Raises DataError for one that is broken."""
    picture = open_picture(path)
    with open_as_stored(path) as file:
        if file.format not in _KEPT:
            return f"{file.format} becomes PNG"
        if picture.notes:  # first, since EXIF data that cannot be read is one of these
            return picture.notes[0].partition(": ")[2]
        if file.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return "turned upright"
        if file.mode not in ("RGB", "RGBA", "L", "LA"):
            return f"{file.mode} becomes RGB"
        if file.info.get("icc_profile"):
            image = open_transparent(path)
            if image.tobytes() != file.convert(image.mode).tobytes():
                return "its colour profile is applied"
    return ""


def _folders(part: Path, sources: Sequence[Source]) -> list[Path]:
    """A folder in `part` for each source, named as the source's is, whatever way leads there (".."): one and the same
    for those of one folder, unless they read other captions there."""
    read = [(source.path.resolve(), source.suffixes) for source in sources]
    folders: dict[tuple[Path, tuple[str, ...]], Path] = {}
    for place, suffixes in dict.fromkeys(read):
        own = place.name or "pictures"
        name, number = own, 2
        while name.casefold() in {folder.name.casefold() for folder in folders.values()}:
            name, number = f"{own}-{number}", number + 1
        folders[place, suffixes] = part / name
    return [folders[each] for each in read]


def _write_toml(path: Path, part: Path, folders: Sequence[Path], filled: Mapping[Path, bool]) -> None:
    """The dataset.toml of the copies, without the sources of which nothing is left: they would stop training."""
    import tomlkit

    document = tomlkit.parse(decode_text(path.read_bytes()))
    for entry, folder in zip(document["source"], folders, strict=True):
        entry["path"] = folder.name
    for folder, has_pictures in filled.items():
        if not has_pictures:
            folder.rmdir()
    if any(filled.values()):
        for place in reversed([place for place, folder in enumerate(folders) if not filled[folder]]):
            del document["source"][place]
    (part / path.name).write_text(tomlkit.dumps(document), encoding="utf-8")
