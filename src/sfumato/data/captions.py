"""Captions: from the files people keep them in, through a template.

{red|blue} in a caption is a wildcard: a sample has one of its alternatives, as with sd-scripts' enable_wildcard.

An alternative may hold wildcards, whose }} closes two of them. Else {{ and }} are the letters { and }; an empty {} is
two letters, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

from charset_normalizer import from_bytes

from sfumato.errors import ConfigError, DataError
from sfumato.utils.formatting import quote_argument
from sfumato.utils.text_files import bom_encoding, decode_text

Alternatives = tuple["Parts", ...]
Parts = tuple[str | Alternatives, ...]
"""A text as the words between its wildcards, and these as their alternatives."""

_TOKEN = re.compile(r"\{\{|\}\}|\{\}|[{}|]|[^{}|]+")
_LETTERS = {"{{": "{", "}}": "}"}
_DEEPEST = 20
"""Wildcards within each other; nobody writes more, and Python calls no function within thousands of others."""


def choose_alternatives(text: str, pick: Callable[[int], int]) -> str:
    """The text with one alternative of each wildcard. pick: told how many there are, says which, from 0 on.

    Raises DataError for braces that do not match, as all of these do.
    """
    return _drawn(_parsed(text), pick)


def count_choices(text: str) -> int:
    """How many ways there are to choose."""
    return _count(_parsed(text))


def expand_wildcards(text: str) -> Iterator[str]:
    """The text for each way to choose; ask `count` first."""
    return _forms(_parsed(text))


def covering_forms(text: str) -> list[str]:
    """So few of the forms that each alternative is in one of them, in the first those that come first."""
    return _cover(_parsed(text))


def longest_form(text: str, size: Callable[[str], int]) -> str:
    """The form with the longest alternative of each wildcard. size: of a text."""
    return _longest(_parsed(text), size)


def wildcard_fault(text: str) -> str:
    """What is wrong with the text's braces; empty if nothing is."""
    try:
        _parsed(text)
    except DataError as error:
        return str(error)
    return ""


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Parts:
    ((parts,), _) = _read(text, 0, 0)
    return parts


def _read(text: str, start: int, depth: int) -> tuple[Alternatives, int]:
    """The alternatives that begin here, and where their wildcard has ended. depth: how many wildcards are open; without
    any the whole text is the one alternative."""
    if depth > _DEEPEST:
        raise DataError(f"wildcards in more than {_DEEPEST} others. Write {{{{ for each {{ that is a letter.")
    alternatives: list[list[str | Alternatives]] = [[]]
    at, pairs = start, 0  # pairs: how many {{ wait for their }}
    while token := _TOKEN.match(text, at):
        found = "}" if token[0] == "}}" and depth and not pairs else token[0]
        at += len(found)
        if found == "{":
            inner, at = _read(text, at, depth + 1)
            alternatives[-1].append(inner)
        elif found == "}" and depth:
            return tuple(map(tuple, alternatives)), at
        elif found == "}":
            said = text[max(0, at - 30) : at]
            raise DataError(f"a }} that closes nothing, {said!r}. Open it with {{, or write }}}} for the letter.")
        elif found == "|" and depth:
            alternatives.append([])
        else:
            pairs += (found == "{{") - (found == "}}")
            alternatives[-1].append(_LETTERS.get(found, found))
    if depth:
        said = text[start - 1 : start + 29]
        raise DataError(f"a {{ that is never closed, {said!r}. Close it with }}, or write {{{{ for the letter.")
    return tuple(map(tuple, alternatives)), at


def _drawn(parts: Parts, pick: Callable[[int], int]) -> str:
    return "".join(part if isinstance(part, str) else _drawn(part[pick(len(part))], pick) for part in parts)


def _count(parts: Parts) -> int:
    return prod(sum(map(_count, part)) for part in parts if not isinstance(part, str))


def _forms(parts: Parts) -> Iterator[str]:
    return map("".join, product(*_each(parts, _forms)))


def _cover(parts: Parts) -> list[str]:
    each = _each(parts, _cover)
    return ["".join(own[place % len(own)] for own in each) for place in range(max(map(len, each), default=1))]


def _each(parts: Parts, texts: Callable[[Parts], Iterator[str] | list[str]]) -> list[list[str]]:
    """Of each part the texts that may stand there."""
    return [[part] if isinstance(part, str) else [text for one in part for text in texts(one)] for part in parts]


def _longest(parts: Parts, size: Callable[[str], int]) -> str:
    return "".join(
        part if isinstance(part, str) else max((_longest(one, size) for one in part), key=size) for part in parts
    )


CAPTION_SUFFIXES = (".txt", ".caption")
"""Endings of the files with one picture's caption, in the order they are looked for."""

METADATA_FILE = "metadata.jsonl"
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


def caption_command(folder: Path) -> str:
    """The command that writes captions into a folder of images that have none."""
    return f"sfumato caption {quote_argument(str(folder))} --model florence-community/Florence-2-base --write"


def read_text(path: Path, likely: str | None = None) -> tuple[str, str | None]:
    """(text as `by_line` has it, the encoding that had to be guessed or None).

    UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one, else `likely` (what the captions around it are
    in, see `guess_from`) where that makes sense of it, else charset-normalizer's guess. Raises DataError if the
    file cannot be read or nothing fits.
    """
    data = _bytes(path)
    if (text := _unicode(data)) is not None:
        return normalize_lines(text), None
    own = _sensible(data)
    for encoding in [likely, *own] if likely in own else [*own, likely]:
        if encoding is None:
            continue
        try:
            return normalize_lines(data.decode(encoding)), encoding
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
        return None if bom_encoding(data) is None and _wide_without_mark(data) else decode_text(data)
    except UnicodeDecodeError:
        return None


def read_metadata(path: Path) -> dict[str, str]:
    """File name -> caption as `by_line` has it, from lines such as {"file_name": "a.png", "text": "a red apple"}.

    That is Hugging Face's imagefolder; `caption` does for `text`. Raises DataError with the line's number.
    """
    try:
        lines = decode_text(path.read_bytes()).split("\n")  # a text may hold other ends of lines, U+2028 say
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
        if text and not is_encodable(text):
            raise DataError(f"{path.name}, line {number}: half of a character ({text[:60]!r}). Write it whole.")
        name, caption = named.as_posix(), normalize_lines(text or "")
        if found.setdefault(name, caption) != caption:
            raise DataError(f"{path.name}, line {number}: another text for {name}. Leave one of them.")
    return found


def words_in_name(name: str) -> str:
    """The words of a file's name: "red-apple" and "red_apple" are "red apple".

    Raises DataError for a name that is not in UTF-8, as an old archive may hold it.
    """
    if not is_encodable(name):
        raise DataError(f"{name!r}: a name that is to be a caption, and is not in UTF-8. Rename it.")
    return normalize_spaces(re.sub(r"[-_]+", " ", name))


_OF_CAMERAS = frozenset({
    "img", "image", "pic", "picture", "photo", "dsc", "dscn", "dscf", "pxl", "mvimg", "gopr", "dji", "sam", "mg",
    "imgp", "cimg", "vid", "fb", "wa", "whatsapp", "signal", "telegram", "inshot", "screenshot", "unnamed",
})  # fmt: skip
_BESIDE_THESE = frozenset({
    "at", "am", "pm", "screen", "shot", "edited", "edit", "copy", "portrait", "cover", "night", "burst", "hdr", "mp",
    "original", "received",
})  # fmt: skip
"""What phones put behind, which are words by themselves."""


def is_meaningless_name(name: str) -> bool:
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
        if fault := wildcard_fault(_with_fields_as_letters(template)):
            raise ConfigError(f"{said} {template!r} has {fault}")
    elif left := re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", template)):
        raise ConfigError(f"{said} {template!r} has a {left[0]} by itself; {{caption}} and {{trigger}} are filled.")
    if "{trigger}" in template and not trigger:
        raise ConfigError(f"{said} {template!r} has {{trigger}}, and there is none; {do}.")


def fill_template(template: str, caption: str, trigger: str | None) -> str:
    """The template with caption and trigger put in, on one line."""
    values: Mapping[str, str] = {"caption": caption, "trigger": trigger or ""}
    return normalize_spaces(re.sub(r"\{(caption|trigger)\}", lambda match: values[match[1]], template))


def first_template(template: str) -> str:
    """The template with the first alternative of each wildcard, to be filled."""
    return covering_forms(_with_fields_as_letters(template))[0]


def _with_fields_as_letters(template: str) -> str:
    return re.sub(r"\{(caption|trigger)\}", r"{{\1}}", template)


def is_encodable(text: str) -> bool:
    """Whether it can be written: no half of a UTF-16 pair, and no byte of a file's name that was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def normalize_spaces(text: str) -> str:
    """The words of a text with one space between any two."""
    return " ".join(text.replace("\0", " ").split())


def normalize_lines(text: str) -> str:
    """The same for each line, without those that are empty."""
    return "\n".join(filter(None, map(normalize_spaces, re.split(r"[\r\n]+", text))))
