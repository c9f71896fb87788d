"""SHA256SUMS beside the pictures: what each file was, so that a damaged copy of it is named, whatever its format.

PNG files carry checksums of their own. A JPEG, WebP, BMP, TIFF, GIF or AVIF in which a byte has changed may decode to
other pixels, and nothing in the file tells. A folder that holds SHA256SUMS, as `sha256sum * > SHA256SUMS` or
`shasum -a 256 * > SHA256SUMS` write it, tells: a listed file whose bytes are others is a bad file. Imports no torch.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType

from sfumato.data.captions import is_encodable
from sfumato.errors import DataError
from sfumato.utils.atomic import write_text
from sfumato.utils.text_files import decode_text

CHECKSUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](?:\./)?(.+?)\r?")
_SIGNS = MappingProxyType({"\\": "\\", "n": "\n", "r": "\r"})
"""What stands behind a backslash in a name, as sha256sum writes it; the line itself then begins with one."""
_LARGEST_BYTES = 2**26


def read_sums(folder: Path) -> dict[str, str]:
    """Name, relative to the folder, -> sha256 in hex; empty where the folder has no SHA256SUMS.

    Raises DataError, with the line's number, for one that cannot be read.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise DataError(
                f"{CHECKSUMS_FILE}: {path.stat().st_size:,} bytes; no list of checksums is that long. Write it anew."
            )
        lines = decode_text(path.read_bytes()).split("\n")  # a name may hold other ends of lines, U+2028 say
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{CHECKSUMS_FILE}: cannot be read as UTF-8 ({type(error).__name__}). Write it anew.") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(
                f"{CHECKSUMS_FILE}, line {number}: wanted 64 hex digits, two spaces and a name, found "
                f"{line[:60]!r}. Write it "
                f"anew with sha256sum * > {CHECKSUMS_FILE}."
            )
        name = re.sub(r"\\(.)", lambda sign: _SIGNS.get(sign[1], sign[0]), match[3]) if match[1] else match[3]
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(
                f"{CHECKSUMS_FILE}, line {number}: {name[:60]} is outside the folder. Name files from it on."
            )
        found[name] = match[2].lower()
    return found


def write_sums(folder: Path, files: Iterable[Path]) -> Path:
    """Write the checksums of these files, which lie in or below the folder, into it; its own is left out.

    Raises DataError for a name that cannot be written in UTF-8.
    """
    others = sorted(file for file in files if file != folder / CHECKSUMS_FILE)
    for file in others:
        if not is_encodable(file.name):
            raise DataError(f"{file.name!r}: its name is not in UTF-8, as {CHECKSUMS_FILE} is. Rename it.")
    write_text(
        folder / CHECKSUMS_FILE,
        "".join(_line(file_digest(file), file.relative_to(folder).as_posix()) for file in others),
    )
    return folder / CHECKSUMS_FILE


def _line(digest: str, name: str) -> str:
    escaped = name
    for letter, sign in _SIGNS.items():  # the backslash first
        escaped = escaped.replace(sign, f"\\{letter}")
    mark = "" if escaped == name else "\\"
    return f"{mark}{digest}  {escaped}\n"


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex. Raises DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror}). See to its permissions.") from None


def check_files(files: Sequence[Path], sums: Sequence[str]) -> None:
    """Raises DataError, naming the file, where its checksum is not the one in `sums`; "" stands for any."""
    for path, wanted in zip(files, sums, strict=False):
        if wanted:
            refuse_changed(path, wanted, file_digest(path))


def refuse_changed(path: Path, wanted: str, found: str) -> None:
    """Raises DataError, naming the file, unless both checksums are one, or there is none that is wanted."""
    if wanted and wanted != found:
        raise DataError(
            f"{path.name}: not the file that {CHECKSUMS_FILE} lists; its bytes are others. Copy it anew, or "
            f"write {CHECKSUMS_FILE} anew if "
            "you changed it."
        )
