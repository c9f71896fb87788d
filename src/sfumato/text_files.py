"""Text files as people write them: UTF-8, or what Notepad and PowerShell take for Unicode. Imports no torch."""

from __future__ import annotations

import codecs

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",  # after UTF-32's, which begins as it does
    codecs.BOM_UTF16_BE: "utf-16",
}


def wide_by_mark(data: bytes) -> str | None:
    """The encoding of two or four bytes a letter that the first bytes name."""
    return next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)


def decode(data: bytes) -> str:
    """The text, ends of lines as they are: UTF-8, or wide where its mark says so. Raises UnicodeDecodeError."""
    return data.decode(wide_by_mark(data) or "utf-8-sig")
