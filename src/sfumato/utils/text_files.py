"""Text files as people write them: UTF-8, or what Notepad and PowerShell take for Unicode. Imports no torch.

JSON that another program may have written, or half written: what is none is nothing, not an error. Imports no
torch.

TOML files as people write them: by Notepad and PowerShell, too, and with Windows' paths. Imports no torch.
"""

from __future__ import annotations

import codecs
import json
import tomllib
from pathlib import Path
from typing import Any

from sfumato.errors import ConfigError

_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",  # after UTF-32's, which begins as it does
    codecs.BOM_UTF16_BE: "utf-16",
}


def bom_encoding(data: bytes) -> str | None:
    """The encoding of two or four bytes a letter that the first bytes name."""
    return next((name for mark, name in _BOMS.items() if data.startswith(mark)), None)


def decode_text(data: bytes) -> str:
    """The text, ends of lines as they are: UTF-8, or wide where its mark says so. Raises UnicodeDecodeError."""
    return data.decode(bom_encoding(data) or "utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """The value; None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that the text is; an empty one where it is none."""
    found = parse_json(text)
    return found if isinstance(found, dict) else {}


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that the file holds; an empty one where it is missing, cannot be read or holds none."""
    try:
        return parse_json_object(path.read_bytes())
    except OSError:
        return {}


_ADVICE = r"Write paths with / or in single quotes: 'C:\pictures'."


def read_toml(path: Path) -> dict[str, Any]:
    """The file's values; UTF-8, or UTF-16 that says so. Raises ConfigError, one line, for what is no TOML; OSError."""
    data = path.read_bytes()
    try:
        return tomllib.loads(decode_text(data))
    except (ValueError, RecursionError) as error:  # a number too long, values too deep, or no TOML at all
        said = " ".join(str(error).split())
        advice = f" {_ADVICE}" if "Unescaped" in said or "hex value" in said else ""
        raise ConfigError(f"{path}: not readable as TOML ({said}); mend that line.{advice}") from None


def check_toml_path(text: str, where: str) -> None:
    r"""Raises ConfigError, which begins with `where`, for a path of which TOML has read a part as a sign: in double
    quotes C:\new holds the end of a line."""
    if any(ord(letter) < 32 for letter in text):
        raise ConfigError(rf"{where}{text!r:.80} is no path: in double quotes \ begins a sign. {_ADVICE}")
