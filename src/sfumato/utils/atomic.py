"""Writing a file or a folder so that nobody ever sees half of it.

Room on the disk, asked for before anything is written.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sfumato.errors import ConfigError

_LONGEST_NAME = 255
"""Bytes of a name in a folder."""
_PATIENCE_S = 2.0 if os.name == "nt" else 0.0
"""How long a rename is tried that the system denies."""


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when it does not.

    The temporary name keeps the suffix, because image and weight writers choose their format by it. The bytes reach
    the disk before the rename, so that a power cut leaves the old file or the new one; where that takes too long for
    what can be made again, it may leave a broken one if not `durable`. An OSError names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path, path.suffix)
    try:
        yield temporary
        if durable:
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
        _move(temporary, path)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary):  # a full disk tells no name at all
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):  # a disk that cannot be written refuses it even where there is no such file
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty temporary folder beside `path` that takes its place when the block ends well and is removed when it does
    not. What is in it reaches the disk before. What lies at `path` is removed once the new folder is there, and comes
    back if it cannot be."""
    temporary, aside = temporary_sibling(path), temporary_sibling(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            fsync_path(written)
        if path.exists():
            _move(path, aside)
        _move(temporary, path)
    finally:
        if aside.exists() and not path.exists():  # the second of the two renames failed
            with suppress(OSError):
                _move(aside, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Rename; on Windows anew for a while: nothing that is open can be moved there, and a virus scanner or an indexer
    opens what has just been written."""
    until, pause_s = time.monotonic() + _PATIENCE_S, 0.01
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() >= until:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.25)


def fsync_path(path: Path) -> None:
    """Bring a file's bytes, or a folder's entries, to the disk, where the system knows how."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_sibling(path: Path, suffix: str = "") -> Path:
    """A hidden path beside `path` that nobody else writes at: no thread, process or machine that shares the folder.

    It ends in ".part", and in `suffix` after that. A long name is cut to what file systems take.
    """
    stem, end = path.name.removesuffix(suffix), f".{secrets.token_hex(6)}.part{suffix}"
    room = _LONGEST_NAME - len(os.fsencode(f".{end}"))
    if len(encoded := os.fsencode(stem)) > room:
        stem = encoded[:room].decode(errors="ignore")
    return path.with_name(f".{stem}{end}")


def check_overwrite(
    output: Path, overwrite: bool, suffix: str | None = None, *, folder: bool = False, read: Iterable[object] = ()
) -> None:
    """Raises ConfigError, naming the option, where an --output exists and --overwrite was not said, where its name does
    not end in `suffix`, or where nothing can be written.

    folder: it will be one, and these are not written over. read: what it is made of and is to stay, whatever was said:
    paths, or names that are none.
    """
    if suffix is not None and output.suffix != suffix:
        raise ConfigError(f"--output {output}: wanted a name that ends in {suffix}, such as {output.stem}{suffix}.")
    if folder and output.exists():
        raise ConfigError(f"--output {output}: exists already, and folders are not written over; name another place.")
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output}: exists already; name another place, or say --overwrite.")
    for source in filter(os.path.exists, map(str, read)) if output.exists() else ():
        if output.samefile(source):
            raise ConfigError(
                f"--output {output}: is what it would be made of, {source}, which is to stay; name another place."
            )
    checked_folder(output.parent, f"--output {output}")


def checked_folder(folder: Path, where: str) -> Path:
    """The folder, which there need not be yet. Raises ConfigError where it can be neither made nor written to."""
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ConfigError(f"{where}: {part} is a file, not a folder; name another place.")
    nearest = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    if not os.access(nearest, os.W_OK):
        raise ConfigError(f"{where}: nothing can be written to {nearest}; see to its permissions.")
    return folder


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8 at `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


SPARE_BYTES = 64 * 2**20
"""Room that is left beside what is written: for the log, the samples and everybody else."""


def require_disk_space(folder: Path, needed: int) -> None:
    """Raise OSError where the disk of the folder has less than `needed` bytes and a reserve."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"no space: {(needed + SPARE_BYTES) / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free on "
            f"the disk of {folder}",
        )
