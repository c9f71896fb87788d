"""What a command says beside its result, and how a terminal can show it."""

import sys
import unicodedata


def say(*lines: str) -> None:
    """Lines for the person, on stderr: on stdout is the result alone."""
    for line in lines:
        print("\n".join(map(escape_control, line.split("\n"))), file=sys.stderr)


def escape_control(line: str) -> str:
    """The line with what a terminal would obey as it is written in Python: others name the files, keys and captions
    in it."""
    return "".join(letter if _is_seen(letter) else letter.encode("unicode_escape").decode() for letter in line)


def _is_seen(letter: str) -> bool:
    return letter.isprintable() or unicodedata.category(letter) == "Zs"  # the blanks of Japanese, say
