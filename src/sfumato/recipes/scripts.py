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
_SHELLS = {".bat": "cmd", ".cmd": "cmd", ".ps1": "powershell", ".txt": "any"}
_BRANCHES = {
    "bash": (r"^\s*(if|for|while|until|case)\b", r"\b(fi|done|esac)\b"),
    "cmd": (r"\(\s*$", r"^\s*\)"),
    "powershell": (r"\{\s*$", r"^\s*\}"),
}
"""How a branch or loop begins and ends."""
_TOKEN = r"""(?P<comment>(?<!\S)#.*)|(?P<file>\d?[<>]+&?\s*\S+)|(?P<end>&&?|\|\|?|;)|(?P<bracket>[()])|"""
_WHOLE = rf"""\$\([^()]*\)|\$\{{[^}}]*\}}|{UNSET}[^{UNSET}]*{UNSET}"""
_WORD = {
    True: re.compile(_TOKEN + rf"""(?P<word>(?:{_WHOLE}|"(?:[^"\\]|\\.)*"|'[^']*'|\\.|[^\s"'();|&<>\\])+)"""),
    False: re.compile(_TOKEN + rf"""(?P<word>(?:{_WHOLE}|"[^"]*"|'[^']*'|[^\s"';|&<>])+)"""),
}
"""By whether \\ is a sign, and not a part of Windows' paths."""
_QUOTED = re.compile(r""""((?:[^"\\]|\\.)*)"|'([^']*)'|\\(.)""", re.DOTALL)
_QUOTED_IN_WINDOWS = re.compile(r""""([^"]*)"|'([^']*)'()""")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_BEFORE_ASSIGNED = frozenset(("export", "declare", "local", "readonly", "-a", "then", "do", "else"))
_LINE_THAT_SETS = {
    "cmd": re.compile(r'(.*?)\bset\s+"?(\w+)=(.*?)"?\s*$', re.IGNORECASE),
    "powershell": re.compile(r"(.*?)\$(?:env:)?(\w+)\s*=(.*)$", re.IGNORECASE),
}
_VARIABLE = re.compile(
    r"(?P<answer>\$\([^()]*\)|`[^`]*`)|\"?\$\{(?P<array>\w+)\[@\]\}\"?|"
    r"\$\{(?:env:)?(?P<braced>\w+|@)(?::?-(?P<otherwise>[^}]*))?\}|\$(?:env:)?(?P<bare>\w+|@)|%(?P<percent>\w+)%",
    re.IGNORECASE,
)


def commands(text: str, ending: str) -> Iterator[list[str]]:
    """The words of each command. ending: of the script's name, which tells the shell; bash's where it tells none."""
    text = _CONTINUED.sub(" ", text)
    return _Script(_SHELLS.get(ending, "bash")).read(_PASTED.sub(" ", text) if ending == ".txt" else text)


class _Script:
    """What was set so far of a script that is read line by line. variables: as they are written, for the text."""

    def __init__(self, shell: str) -> None:
        self.shell = shell
        self.has_escapes = shell == "bash"
        self.variables: dict[str, str] = {}

    def read(self, text: str) -> Iterator[list[str]]:
        opens, closes = _BRANCHES.get(self.shell, _BRANCHES["bash"])
        depth, array = 0, ""
        for line in text.splitlines():
            begins, ends = len(re.findall(opens, line)), len(re.findall(closes, line))
            self.in_branch = depth + begins + ends > 0
            depth = max(0, depth + begins - ends)
            if re.match(r"\s*(::|@?rem\b)", line, re.IGNORECASE) or self.sets(line):
                continue
            for command, bracket in self.split(line):
                words = self.words(command)
                if array or (bracket == "(" and words and re.fullmatch(r"[A-Za-z_]\w*\+?=", words[-1])):
                    name = array or words[-1]
                    items = words if array else []
                    self.set(name.rstrip("+="), " ".join(map(_quoted, items)), more=bool(array) or "+" in name)
                    array = "" if bracket == ")" else name
                elif words:
                    yield from self.run(words)

    def sets(self, line: str) -> bool:
        """Whether a line of cmd or PowerShell sets a variable, which then is set."""
        pattern = _LINE_THAT_SETS.get("cmd" if self.shell == "any" else self.shell)
        told = pattern.match(line) if pattern else None
        if told is None or "--" in told[1]:
            return False
        before, name, value = told.groups()
        self.in_branch |= bool(before.strip(" @"))
        if self.shell == "powershell":
            words = self.words(value)
            self.in_branch |= len(words) != 1 or "[" in value  # then it is computed
            self.set(name, words[0] if words else "")
        else:
            self.set(name, self.filled(value.strip()))
        return True

    def run(self, words: list[str]) -> Iterator[list[str]]:
        """The command, but for one that only sets variables, which are set."""
        told = [word for word in words if word not in _BEFORE_ASSIGNED]
        if self.shell in ("bash", "any") and all(map(_ASSIGNED.fullmatch, told)):
            for name, more, value in (found.groups() for word in told if (found := _ASSIGNED.fullmatch(word))):
                self.set(name, value, more=bool(more))
        else:
            yield words

    def set(self, name: str, value: str, *, more: bool = False) -> None:
        """Set a variable, or say that it is unknown."""
        before = f"{self.variables.get(self.called(name), '')} " if more else ""
        self.variables[self.called(name)] = f"{UNSET}{name}{UNSET}" if self.in_branch else before + value

    def called(self, name: str) -> str:
        return name if self.has_escapes else name.lower()

    def split(self, line: str) -> Iterator[tuple[str, str]]:
        """Each command of a line, or what is before a bracket, and that bracket."""
        begin = 0
        for found in _WORD[self.has_escapes].finditer(line):
            if found.lastgroup in ("end", "bracket", "comment"):
                yield line[begin : found.start()], found["bracket"] or ""
                begin = len(line) if found["comment"] else found.end()
        yield line[begin:], ""

    def words(self, command: str) -> list[str]:
        """The words of a command, without quotation marks and files that it reads and writes."""
        unquoted = _QUOTED if self.has_escapes else _QUOTED_IN_WINDOWS
        words = (found["word"] for found in _WORD[self.has_escapes].finditer(self.filled(command)))
        return [unquoted.sub(lambda part: part[1] or part[2] or part[3] or "", word) for word in words if word]

    def filled(self, text: str) -> str:
        """The text with the values of its variables; of arguments that the script is given, none is there."""
        return _VARIABLE.sub(self.value, text)

    def value(self, found: re.Match[str]) -> str:
        if found["answer"]:
            return f"{UNSET}{found[0]}{UNSET}"
        name = next(filter(None, found.group("array", "braced", "bare", "percent")))
        if found["percent"] and self.shell not in ("cmd", "any"):
            return found[0]
        if name.isdecimal() or name == "@":
            return found["otherwise"] or ""
        known = self.variables.get(self.called(name), os.environ.get(name))
        if known is None:
            known = found["otherwise"]
        if known is None:
            return f"{UNSET}{name}{UNSET}"
        before = found.string[: found.start()]
        # PowerShell hands a value on whole, and bash gives it whole to another variable.
        stays_whole = self.shell == "powershell" or re.search(r"(^|\s)[A-Za-z_]\w*=$", before)
        return _quoted(known) if stays_whole and before.count('"') % 2 == 0 else known


def _quoted(word: str) -> str:
    return f'"{word}"' if re.search(r"\s", word) else word
