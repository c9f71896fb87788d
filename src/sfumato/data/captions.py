"""Captions: from the files people keep them in, through a template."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from charset_normalizer import from_bytes

from sfumato.data import wildcards
from sfumato.errors import ConfigError, DataError
from sfumato.text_files import decode, wide_by_mark

CAPTION_SUFFIXES = (".txt", ".caption")
"""Endings of the files with one picture's caption, in the order they are looked for."""

METADATA = "metadata.jsonl"
_FIELDS = ("caption", "trigger")
_LARGEST_CAPTION = 1_000_000


_LIKELY = ["cp1252", "cp932", "cp1251", "gb18030", "euc_kr", "big5"]
"""What captions are written in that are not UTF-8; a caption is too short to tell a hundred encodings apart, or western
European letters (cp1252) from central European ones (cp1250), of which the former are far more frequent."""

_WESTERN = "cp1252"
_WESTERN_LETTERS = frozenset("àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿœšžß")
_WESTERN_SIGNS = frozenset(
    b"\x80\x84\x85\x91\x92\x93\x94\x96\x97\xa0\xa1\xa9\xab\xae\xb0\xb4\xb7\xbb\xbd\xbf".decode(_WESTERN)
)
"""Quotation marks, dashes and the like."""
_FREQUENT = {"euc_kr": range(0xB0, 0xC9), "gb18030": range(0xB0, 0xD8), "big5": range(0xA4, 0xC7)}
"""First bytes of the letters in everyday use, which these standards sort before the rare ones: 2,350 of Korean, 3,755
of simplified and 5,401 of traditional Chinese, the fewest first."""


def read_text(path: Path, likely: str | None = None) -> tuple[str, str | None]:
    """(text as `by_line` has it, the encoding that had to be guessed or None).

    UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one, else `likely` (what the captions around it are
    in, see `guess_from`) where that makes sense of it, else charset-normalizer's guess. Raises DataError if the
    file cannot be read or nothing fits.
    """
    data = _bytes(path)
    if (text := _unicode(data)) is not None:
        return by_line(text), None
    own = _sensible(data)
    for encoding in [likely, *own] if likely in own else [*own, likely]:
        if encoding is None:
            continue
        try:
            return by_line(data.decode(encoding)), encoding
        except (UnicodeDecodeError, LookupError):
            continue
    raise DataError(f"{path.name}: not text in any encoding that could be told. Save it as UTF-8.")


def _sensible(data: bytes) -> list[str]:
    """The encodings in which the bytes are text that somebody may have written, the most likely first."""
    if wide := _wide_without_mark(data):
        return [wide]
    found = from_bytes(data, cp_isolation=_LIKELY) or from_bytes(data)
    names = _frequent_first(data, [name for match in found for name in match.could_be_from_charset])
    return list(dict.fromkeys([_WESTERN, *names])) if _is_western(data) else names


def _frequent_first(data: bytes, names: Sequence[str]) -> list[str]:
    """The encodings, of Korean and Chinese first that with the fewest everyday letters of which the bytes are.

    A short caption is bytes of all three, and in the others has letters that hardly anybody writes.
    """
    letters = {pair[0] for pair in re.findall(rb"[\x80-\xff].", data, re.DOTALL) if pair[0] > 0xA3}  # signs before
    fitting = [name for name, frequent in _FREQUENT.items() if name in names and letters <= set(frequent)]
    ordered = iter([*fitting, *(name for name in names if name in _FREQUENT and name not in fitting)])
    return [next(ordered) if name in _FREQUENT else name for name in names]


def _is_western(data: bytes) -> bool:
    """Whether the bytes are Latin words in which single letters have accents, as in "Käse" and "café".

    They may be something else in other encodings ("K酲e", "cafй"), which charset-normalizer prefers where a caption is
    short, but no words that anybody writes.
    """
    try:
        text = data.decode(_WESTERN)
    except UnicodeDecodeError:
        return False
    foreign = {character for character in text.lower() if not character.isascii()}
    if foreign - _WESTERN_LETTERS - _WESTERN_SIGNS:
        return False
    accented = [word for word in re.findall(r"[^\W\d_]+", text) if not word.isascii()]
    return all(
        (word.islower() or word.istitle() or word.isupper())
        and (len(word) == 1 or any(letter.isascii() for letter in word))
        for word in accented
    )


def _wide_without_mark(data: bytes) -> str | None:
    """UTF-16 without a byte order mark, if every other byte of most letters is 0, as in no other text."""
    even, odd = data[::2].count(0), data[1::2].count(0)
    if not data or len(data) % 2 or max(even, odd) < len(data) / 4 or min(even, odd):
        return None
    return "utf-16-le" if odd else "utf-16-be"


def guess_from(paths: Sequence[Path]) -> str | None:
    """The one encoding that most likely holds for all of the files that are not Unicode; None if nothing fits."""
    contents = (_bytes(path) for path in paths[:1000])
    return next(iter(_sensible(b"\n".join(data for data in contents if _unicode(data) is None))), None)


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST_CAPTION:
            raise DataError(f"{path.name}: {path.stat().st_size:,} bytes; no caption is that long. Remove it.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror}). See to its permissions.") from None


def _unicode(data: bytes) -> str | None:
    """The text, if the bytes say that they are Unicode."""
    try:
        return None if wide_by_mark(data) is None and _wide_without_mark(data) else decode(data)
    except UnicodeDecodeError:
        return None


def read_metadata(path: Path) -> dict[str, str]:
    """File name -> caption as `by_line` has it, from lines such as {"file_name": "a.png", "text": "a red apple"}.

    That is Hugging Face's imagefolder; `caption` does for `text`. Raises DataError with the line's number.
    """
    try:
        lines = decode(path.read_bytes()).split("\n")  # a text may hold other ends of lines, U+2028 say
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}: cannot be read as UTF-8 ({type(error).__name__}). Save it so.") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        wanted = f'{path.name}, line {number}: wanted {{"file_name": "a.png", "text": "a red apple"}}'
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{wanted}, found no JSON ({error}).") from None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise DataError(f"{wanted}, found no file_name.")
        named = PurePosixPath(row["file_name"].replace("\\", "/"))  # ./a.png, and Windows' a\\b.png
        if named.is_absolute() or PureWindowsPath(str(named)).drive or ".." in named.parts:
            raise DataError(f"{wanted}, found {row['file_name']}, which is outside the folder.")
        if not named.name:
            raise DataError(f"{wanted}, found no file_name.")
        text = row.get("text", row.get("caption"))
        if text is not None and not isinstance(text, str):
            raise DataError(f"{wanted}, found a text that is no string.")
        if text and not is_text(text):
            raise DataError(f"{path.name}, line {number}: half of a character ({text[:60]!r}). Write it whole.")
        name, caption = named.as_posix(), by_line(text or "")
        if found.setdefault(name, caption) != caption:
            raise DataError(f"{path.name}, line {number}: another text for {name}. Leave one of them.")
    return found


def words_of(name: str) -> str:
    """The words of a file's name: "red-apple" and "red_apple" are "red apple".

    Raises DataError for a name that is not in UTF-8, as an old archive may hold it.
    """
    if not is_text(name):
        raise DataError(f"{name!r}: a name that is to be a caption, and is not in UTF-8. Rename it.")
    return one_line(re.sub(r"[-_]+", " ", name))


_OF_CAMERAS = frozenset({
    "img", "image", "pic", "picture", "photo", "dsc", "dscn", "dscf", "pxl", "mvimg", "gopr", "dji", "sam", "mg",
    "imgp", "cimg", "vid", "fb", "wa", "whatsapp", "signal", "telegram", "inshot", "screenshot", "unnamed",
})  # fmt: skip
_BESIDE_THESE = frozenset({
    "at", "am", "pm", "screen", "shot", "edited", "edit", "copy", "portrait", "cover", "night", "burst", "hdr", "mp",
    "original", "received",
})  # fmt: skip
"""What phones put behind, which are words by themselves."""


def says_nothing(name: str) -> bool:
    """Whether a file's name is a number, such as a camera gives: "00", "IMG_1234", "b07", "DSC00012 (1)"."""
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", name)]
    known = _OF_CAMERAS | _BESIDE_THESE if _OF_CAMERAS.intersection(words) or words[:2] == ["screen", "shot"] else ()
    return any(letter.isdigit() for letter in name) and all(
        word in known or (len(word) == 1 and word.isascii()) for word in words
    )


def check_template(
    template: str,
    trigger: str | None,
    *,
    has_wildcards: bool = False,
    said: str = "--caption",
    do: str = "pass --trigger WORD",
) -> None:
    """Refuse a template that cannot be filled. Raises ConfigError. has_wildcards: whether {a|b} is one. said: what gave
    it. do: how a trigger is named."""
    names = r"(?<!\{)\{([^{}|]*)\}" if has_wildcards else r"\{([^{}]*)\}"
    for name in re.findall(names, template):
        if name not in _FIELDS:
            choice = ", and with --wildcards one of {a|b} is taken" if "|" in name else ""
            known = f"{{caption}} and {{trigger}} are filled{choice}"
            raise ConfigError(f"{said} {template!r}: {{{name}}} is unknown; {known}.")
    if has_wildcards:
        if fault := wildcards.fault(_with_fields_as_letters(template)):
            raise ConfigError(f"{said} {template!r} has {fault}")
    elif left := re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", template)):
        raise ConfigError(f"{said} {template!r} has a {left[0]} by itself; {{caption}} and {{trigger}} are filled.")
    if "{trigger}" in template and not trigger:
        raise ConfigError(f"{said} {template!r} has {{trigger}}, and there is none; {do}.")


def fill_template(template: str, caption: str, trigger: str | None) -> str:
    """The template with caption and trigger put in, on one line."""
    values: Mapping[str, str] = {"caption": caption, "trigger": trigger or ""}
    return one_line(re.sub(r"\{(caption|trigger)\}", lambda match: values[match[1]], template))


def first_template(template: str) -> str:
    """The template with the first alternative of each wildcard, to be filled."""
    return wildcards.cover(_with_fields_as_letters(template))[0]


def _with_fields_as_letters(template: str) -> str:
    return re.sub(r"\{(caption|trigger)\}", r"{{\1}}", template)


def is_text(text: str) -> bool:
    """Whether it can be written: no half of a UTF-16 pair, and no byte of a file's name that was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(text: str) -> str:
    """The words of a text with one space between any two."""
    return " ".join(text.replace("\0", " ").split())


def by_line(text: str) -> str:
    """The same for each line, without those that are empty."""
    return "\n".join(filter(None, map(one_line, re.split(r"[\r\n]+", text))))
