"""Commands as a person can copy them into a shell: bash and zsh, PowerShell, or Windows' cmd.

shlex quotes with ', which cmd hands on as a letter; all of these take ".
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable

_WINDOWS = os.name == "nt"
_BARE = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_BARE_THERE = re.compile(r"[\w@+=:,./\\-]+", re.ASCII)
_READ_WITHIN = re.compile(r'["$`!%\\\r\n]')
"""What one of the shells reads within "."""
_READ_WITHIN_THERE = re.compile(r'["$`%\r\n]|\\$')


def quote(word: str) -> str:
    """The word as a shell hands it on whole: bare, in " where that suits every shell, or as this system's takes it."""
    bare, read = (_BARE_THERE, _READ_WITHIN_THERE) if _WINDOWS else (_BARE, _READ_WITHIN)
    if bare.fullmatch(word):
        return word
    if not read.search(word):
        return f'"{word}"'
    return subprocess.list2cmdline([word]) if _WINDOWS else shlex.quote(word)


def option(name: str) -> str:
    """The option of a config's field of this name."""
    return f"--{name.replace('_', '-')}"


def join(words: Iterable[str]) -> str:
    """The words as one command."""
    return " ".join(map(quote, words))
