"""TOML files as people write them: by Notepad and PowerShell, too, and with Windows' paths. Imports no torch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from sfumato.errors import ConfigError
from sfumato.text_files import decode

_ADVICE = r"Write paths with / or in single quotes: 'C:\pictures'."


def read_toml(path: Path) -> dict[str, Any]:
    """The file's values; UTF-8, or UTF-16 that says so. Raises ConfigError, one line, for what is no TOML; OSError."""
    data = path.read_bytes()
    try:
        return tomllib.loads(decode(data))
    except (ValueError, RecursionError) as error:  # a number too long, values too deep, or no TOML at all
        said = " ".join(str(error).split())
        advice = f" {_ADVICE}" if "Unescaped" in said or "hex value" in said else ""
        raise ConfigError(f"{path}: not readable as TOML ({said}); mend that line.{advice}") from None


def check_path(text: str, where: str) -> None:
    r"""Raises ConfigError, which begins with `where`, for a path of which TOML has read a part as a sign: in double
    quotes C:\new holds the end of a line."""
    if any(ord(letter) < 32 for letter in text):
        raise ConfigError(rf"{where}{text!r:.80} is no path: in double quotes \ begins a sign. {_ADVICE}")
