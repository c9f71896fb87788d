"""A script for bash, cmd or PowerShell -> the words of its commands, with its variables filled in.

No shell is run. What only a running one knows, such as a variable that is set in a branch or what a program answers,
stays in its word as a name between two UNSET.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

UNSET = "\0"
_CONTINUED = re.compile(r"[ \t]*[\\^`][ \t]*\r?\n[ \t]*")
_PASTED = re.compile(r"[ \t]*\r?\n[ \t]*(?=--[a-zA-Z])")
"""As web pages have commands, whose ends of lines are lost."""
_LINE = re.compile(
    r"^[ \t]*(?:(?:export|declare|local|readonly)[ \t]+(?:-a[ \t]+)?)?(?P<array>\w+)(?P<more>\+?)=\("
    r"""(?P<items>(?:"(?:[^"\\]|\\.)*"|'[^']*'|\$\([^()]*\)|(?<!\S)#[^\n]*|(?<=\S)#|[^"'#()])*)\)[ \t]*(?:#[^\n]*)?$"""
    r"|^[^\n]*$",
    re.MULTILINE | re.DOTALL,
)
_ASSIGNED = {
    "cmd": re.compile(r'(?P<before>.*?)\bset\s+"?(?P<name>\w+)=(?P<value>.*?)"?\s*$', re.IGNORECASE),
    "powershell": re.compile(r"(?P<before>.*?)\$(?:\w+:)?(?P<name>\w+)\s*\+?=(?P<value>.*)$"),
}
_OF_BASH = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_BRANCHES = {
    "cmd": (r"\(\s*$", r"^\s*\)"),
    "powershell": (r"\{\s*$", r"^\s*\}"),
    "bash": (r"(?:^|;)\s*(?:if|for|while|until|case)\b", r"(?:^|;)\s*(?:fi|done|esac)\b"),
}
"""How a branch or loop begins and ends."""
_LEADING = frozenset(("then", "do", "else", "export", "declare", "local", "readonly", "{", "!"))
_ANSWER = r"\$\((?:[^()]|\([^()]*\))*\)"
_WHOLE = rf"{_ANSWER}|\$\{{[^}}]*\}}"
_OUTSIDE = r"""(?P<space>\s+)|(?P<file>\d?(?:>>?|<)\s*&?[^\s;|)]*)|'(?P<single>[^']*)'"""
_PIECE = re.compile(
    rf"""{_OUTSIDE}|(?P<end>&&?|\|\|?|[;()])|"(?P<double>(?:[^"\\]|\\.)*)"|"""
    rf"""(?P<bare>(?:{_WHOLE}|\\.|[^\s"';|&<>()\\])+)|(?P<other>.)""",
    re.DOTALL,
)
_PIECE_OF_WINDOWS = re.compile(  # whose \ is a part of paths
    rf"""{_OUTSIDE}|(?P<end>&&?|\|\|?|;)|"(?P<double>[^"]*)"|(?P<bare>(?:{_WHOLE}|[^\s"';|&<>])+)|(?P<other>.)""",
    re.DOTALL,
)
_DOLLAR = re.compile(
    rf"(?P<answer>{_ANSWER}|`[^`]*`)|"
    r"\$\{(?:env:)?(?P<braced>\w+|[@*])(?:\[[@*]\])?(?::?[-=](?P<otherwise>[^}]*)|(?P<other>[^}]*))\}|"
    r"\$(?:env:)?(?P<bare>\w+|[@*])",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"%(?P<bare>\w+)%")
_ARRAY = re.compile(r"\$\{(\w+)\[@\]\}")


def commands(text: str, ending: str) -> Iterator[list[str]]:
    """The words of each command. ending: of the script's name, which tells the shell; bash's where it tells none."""
    if ending == ".txt":
        text = _PASTED.sub(" ", _CONTINUED.sub(" ", text))
    return _Script({".bat": "cmd", ".cmd": "cmd", ".ps1": "powershell"}.get(ending, "bash"), ending).read(text)


class _Script:
    """What was set so far of a script that is read line by line."""

    def __init__(self, shell: str, ending: str) -> None:
        self.shell = shell
        self.has_escapes = shell == "bash" and ending != ".txt"  # in which a command of any shell may be kept
        self.assigned = _ASSIGNED.get(shell) or (_ASSIGNED["cmd"] if ending == ".txt" else None)
        self.has_percent = self.assigned is _ASSIGNED["cmd"]
        self.variables: dict[str, list[str]] = {}

    def read(self, text: str) -> Iterator[list[str]]:
        opens, closes = _BRANCHES[self.shell]
        depth = 0
        for found in _LINE.finditer(_CONTINUED.sub(" ", text).replace("\r\n", "\n")):
            line = found[0]
            begins, ends = len(re.findall(opens, line)), len(re.findall(closes, line))
            in_branch = depth + begins + ends > 0
            depth = max(0, depth + begins - ends)
            if found["array"]:
                words = [word for each in found["items"].splitlines() for words in self.split(each) for word in words]
                self.set(found["array"], words, in_branch=in_branch, more=bool(found["more"]))
            elif re.match(r"\s*(?:#|::|@?rem\b)", line, re.IGNORECASE):
                continue
            elif self.assigned and (told := self.assigned.match(line)) and "--" not in told["before"]:
                self.set(
                    told["name"], self.value(told["value"]), in_branch=in_branch or bool(told["before"].strip(" @"))
                )
            else:
                yield from self.run(line, in_branch=in_branch)

    def run(self, line: str, *, in_branch: bool) -> Iterator[list[str]]:
        """The commands of a line but for those that only set variables, which are set."""
        for words in self.split(line):
            while words and words[0] in _LEADING:
                words = words[1:]
            told = [found for word in words if self.shell == "bash" and (found := _OF_BASH.fullmatch(word))]
            if len(told) < len(words):
                yield words
                continue
            for each in told:
                self.set(each[1], [each[3]], in_branch=in_branch, more=bool(each[2]))

    def value(self, written: str) -> list[str] | None:
        """The value that a line of cmd or PowerShell gives; None for what is computed, or several values."""
        if self.has_percent:
            return [self.filled(written.strip().strip('"'))]
        if re.match(r"\s*[\[@(&]", written):
            return None
        found = [*self.split(written)]
        return found[0] if len(found) == 1 and len(found[0]) == 1 else None

    def set(self, name: str, words: list[str] | None, *, in_branch: bool, more: bool = False) -> None:
        """Set a variable, or say that it is unknown."""
        before = self.variables.get(self.called(name), []) if more else []
        known = None if in_branch or words is None else [*before, *words]
        self.variables[self.called(name)] = [f"{UNSET}{name}{UNSET}"] if known is None else known

    def called(self, name: str) -> str:
        return name if self.shell == "bash" and not self.has_percent else name.lower()

    def split(self, line: str) -> Iterator[list[str]]:
        """The words of each command of a line."""
        words: list[str] = []
        word: str | None = None
        for piece in (_PIECE if self.has_escapes else _PIECE_OF_WINDOWS).finditer(line):
            kind, text = piece.lastgroup, piece[piece.lastgroup or 0]
            if kind in ("space", "end", "file") or (kind == "bare" and word is None and text.startswith("#")):
                words += [] if word is None else [word]
                word = None
                if kind == "bare":
                    break
                if kind == "end":
                    yield words
                    words = []
            elif array := _ARRAY.fullmatch(text) if word is None and kind in ("double", "bare") else None:
                words += self.variables.get(self.called(array[1]), [f"{UNSET}{array[1]}{UNSET}"])
            elif kind == "double":
                text = self.filled(text)
                word = (word or "") + (re.sub(r'\\(["\\$`])', r"\1", text) if self.has_escapes else text)
            elif kind == "bare":
                filled = self.filled(text)
                parts = [filled]
                if self.shell != "bash":  # which hands on a value whole, unless it holds options
                    parts = filled.split() if filled.startswith("-") and not text.startswith("-") else parts
                elif word is not None or not _OF_BASH.match(text):
                    parts = re.findall(r"(?:\\.|\S)+", filled)
                parts = [re.sub(r"\\(.)", r"\1", part) for part in parts] if self.has_escapes else parts
                if parts:
                    *done, word = [(word or "") + parts[0], *parts[1:]]
                    words += done
            else:
                word = (word or "") + text
        words += [] if word is None else [word]
        if words:
            yield words

    def filled(self, text: str) -> str:
        """The text with the values of its variables; of arguments that the script is given, none is there."""
        if self.has_percent:
            text = _PERCENT.sub(lambda found: " ".join(self.of(found["bare"])), text)
        if self.shell == "cmd":
            return text
        return _DOLLAR.sub(self.of_dollar, text)

    def of_dollar(self, found: re.Match[str]) -> str:
        name = found["braced"] or found["bare"]
        if found["answer"] or found["other"]:
            return f"{UNSET}{found[0]}{UNSET}"
        if found["otherwise"] is not None and self.called(name) not in self.variables:
            return os.environ.get(name) or self.filled(found["otherwise"].strip("\"'"))
        return " ".join(self.of(name))

    def of(self, name: str) -> list[str]:
        if name.isdecimal() or name in ("@", "*"):
            return []
        known = os.environ.get(name)
        return self.variables.get(self.called(name), [f"{UNSET}{name}{UNSET}" if known is None else known])
