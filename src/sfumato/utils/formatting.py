"""Numbers as texts, and texts as lines for a person have them.

What a command says beside its result, and how a terminal can show it.

Commands as a person can copy them into a shell: bash and zsh, PowerShell, or Windows' cmd.

shlex quotes with ', which cmd hands on as a letter; all of these take ".
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Sequence


def format_number(number: float) -> str:
    """The shortest text that is read back as the same number: 7, 0.8, 0.1234567."""
    return repr(float(number)).removesuffix(".0")


def pluralize(count: int, one: str, several: str | None = None) -> str:
    """What there are so many of: "1 picture", "1,200 pictures". several: in the plural, where that is not `one` with an
    s, such as "pictures have" of "picture has"."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def format_duration(seconds: float) -> str:
    """A time as a person says it: "0.31 s", "42 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def format_list(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are: "a, b, c and 2 more"; empty for none."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def truncate_text(text: str) -> str:
    """The text, of a long one its beginning: at most 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def to_single_line(text: str) -> str:
    """A text from a file as one line for a terminal: no control characters, at most 200 letters."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown if len(shown) <= 200 else shown[:197] + "..."


def say(*lines: str) -> None:
    """Lines for the person, on stderr: on stdout is the result alone."""
    for line in lines:
        print("\n".join(map(escape_control, line.split("\n"))), file=sys.stderr)


def escape_control(line: str) -> str:
    """The line with what a terminal would obey as it is written in Python: others name the files, keys and captions
    in it."""
    return "".join(letter if _is_printable(letter) else letter.encode("unicode_escape").decode() for letter in line)


def _is_printable(letter: str) -> bool:
    return letter.isprintable() or unicodedata.category(letter) == "Zs"  # the blanks of Japanese, say


_WINDOWS = os.name == "nt"
_BARE = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_BARE_THERE = re.compile(r"[\w@+=:,./\\-]+", re.ASCII)
_READ_WITHIN = re.compile(r'["$`!%\\\r\n]')
"""What one of the shells reads within "."""
_READ_WITHIN_THERE = re.compile(r'["$`%\r\n]|\\$')


def quote_argument(word: str) -> str:
    """The word as a shell hands it on whole: bare, in " where that suits every shell, or as this system's takes it."""
    bare, read = (_BARE_THERE, _READ_WITHIN_THERE) if _WINDOWS else (_BARE, _READ_WITHIN)
    if bare.fullmatch(word):
        return word
    if not read.search(word):
        return f'"{word}"'
    return subprocess.list2cmdline([word]) if _WINDOWS else shlex.quote(word)


def option_flag(name: str) -> str:
    """The option of a config's field of this name."""
    return f"--{name.replace('_', '-')}"


def join_command(words: Iterable[str]) -> str:
    """The words as one command."""
    return " ".join(map(quote_argument, words))
