"""A file with another tool's training -> its settings: a config of one of them, or a command in a script.

A script for bash, cmd or PowerShell -> the words of its commands, with its variables filled in.

No shell is run. What only a running one knows, such as a variable that is set in a branch or what a program answers,
stays in its word as a name between two UNSET.
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfumato.errors import ConfigError
from sfumato.interop import ai_toolkit, kohya_ss
from sfumato.interop.datasets.settings import read_values, without_empty
from sfumato.interop.settings import ForeignSettings, text_of

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


def parse_commands(text: str, ending: str) -> Iterator[list[str]]:
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


SD_SCRIPTS = (
    "train_network.py", "sdxl_train_network.py", "train_db.py", "fine_tune.py", "sdxl_train.py",
    "train_textual_inversion.py", "sdxl_train_textual_inversion.py",
)  # fmt: skip
DIFFUSERS = (
    "train_text_to_image.py", "train_text_to_image_sdxl.py", "train_text_to_image_lora.py",
    "train_text_to_image_lora_sdxl.py", "train_dreambooth.py", "train_dreambooth_lora.py",
    "train_dreambooth_lora_sdxl.py", "textual_inversion.py", "textual_inversion_sdxl.py",
)  # fmt: skip
SCRIPTS = (*SD_SCRIPTS, *DIFFUSERS)
ONETRAINER = "OneTrainer"
AI_TOOLKIT = "ai-toolkit"
SIMPLETUNER = "SimpleTuner"
_ENDS = (".toml", ".sh", ".bat", ".ps1", ".txt", ".command", "")


def read_training(path: Path) -> ForeignSettings:
    """The training that a file asks for. Raises ConfigError for a file that asks for none that is known."""
    ending = path.suffix.lower()
    if ending in (".json", ".yaml", ".yml"):
        return _of_values(path, read_values(path))
    if ending not in _ENDS:
        raise ConfigError(
            f"{path.name}: wanted a .toml of sd-scripts, a .yaml of ai-toolkit, a .json of OneTrainer or SimpleTuner, "
            "or a .sh, .bat or .txt with a command."
        )
    text = text_of(path)
    return _of_config(path, text) if ending == ".toml" else _of_command(path, text)


def _of_values(path: Path, values: Any) -> ForeignSettings:
    """A config of OneTrainer, ai-toolkit, SimpleTuner or kohya_ss, by what is in it."""
    config = values.get("config") if isinstance(values, dict) else None
    if isinstance(config, dict) and isinstance(config.get("process"), list):
        return _of_ai_toolkit(path, without_empty(config))
    plain = _plain(values) if isinstance(values, dict) else {}
    if "model_family" in plain:
        return ForeignSettings(path.name, SIMPLETUNER, plain, path.resolve().parent)
    if kohya_ss.is_saved(plain):
        return _of_kohya_ss(path, plain)
    if not {"training_method", "base_model_name"} & plain.keys():
        raise ConfigError(
            f"{path.name}: neither config.process of ai-toolkit, model_family of SimpleTuner, training_method of "
            "OneTrainer nor what kohya_ss saves is in it. Name the config of a training."
        )
    return ForeignSettings(path.name, ONETRAINER, values, path.resolve().parent)


def _of_kohya_ss(path: Path, values: dict[str, Any]) -> ForeignSettings:
    """What one of its windows saves, with the options that it adds to the command."""
    script, settings = kohya_ss.settings(values, path.name)
    more = str(values.get("additional_parameters") or "")
    try:
        settings |= _options(shlex.split(more))
    except ValueError as error:
        raise ConfigError(f"{path.name}: additional_parameters {more!r:.60}: {error}.") from None
    return ForeignSettings(path.name, script, settings, path.resolve().parent)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The settings without the dashes of a command, with which older configs of SimpleTuner name them."""
    return {str(key).lstrip("-").replace("-", "_"): value for key, value in values.items()}


def _of_ai_toolkit(path: Path, config: dict[str, Any]) -> ForeignSettings:
    """The first of its processes that trains, with the name of the whole, which [name] stands for."""
    processes = [each for each in config["process"] if isinstance(each, dict)]
    trainings = [each for each in processes if each.get("type") in ai_toolkit.KINDS]
    if not trainings:
        kinds = ", ".join(str(each.get("type")) for each in processes)
        raise ConfigError(
            f"{path.name}: its process is {kinds or 'none'}, which has no counterpart; wanted one of "
            f"{', '.join(sorted(ai_toolkit.KINDS))}."
        )
    name = str(config.get("name", ""))
    values = _with_name({"name": name, **trainings[0]}, name)
    asked = ForeignSettings(path.name, AI_TOOLKIT, values, path.resolve().parent)
    if len(processes) > 1:
        asked.notes.append(f"{path.name}: the first training of its {len(processes)} processes")
    return asked


def _with_name(values: Any, name: str) -> Any:
    if isinstance(values, dict):
        return {key: _with_name(value, name) for key, value in values.items()}
    if isinstance(values, list):
        return [_with_name(value, name) for value in values]
    return values.replace("[name]", name) if isinstance(values, str) else values


def _of_config(path: Path, text: str) -> ForeignSettings:
    """sd-scripts' --config_file: its sections mean nothing."""
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name}: not readable as TOML ({' '.join(str(error).split())}); mend it.") from None
    if "model_family" in _plain(values):
        return ForeignSettings(path.name, SIMPLETUNER, _plain(values), path.resolve().parent)
    if "datasets" in values:
        raise ConfigError(
            f"{path.name}: a config of data sets; `sfumato dataset` converts it. Name that of the training."
        )
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    for section in values.values():
        flat |= section if isinstance(section, dict) else {}
    if "pretrained_model_name_or_path" not in flat:
        raise ConfigError(
            f"{path.name}: no pretrained_model_name_or_path in it, so it is no training of sd-scripts. Name its "
            "--config_file, or a script with its command."
        )
    return ForeignSettings(path.name, _script_of(flat), flat, path.resolve().parent)


def _script_of(settings: dict[str, Any]) -> str:
    """The script of sd-scripts whose settings these are."""
    is_sdxl = bool(settings.get("sdxl") or {"learning_rate_te1", "learning_rate_te2", "block_lr"} & settings.keys())
    if "token_string" in settings:
        script = "train_textual_inversion.py"
    elif {"network_module", "network_dim"} & settings.keys():
        script = "train_network.py"
    elif is_sdxl:
        return "sdxl_train.py"
    else:
        return "fine_tune.py" if "in_json" in settings else "train_db.py"
    return f"sdxl_{script}" if settings.get("sdxl") else script


def _of_command(path: Path, text: str) -> ForeignSettings:
    """The first command that runs one of the scripts."""
    runs = [words for words in parse_commands(text, path.suffix.lower()) if _place(words) is not None]
    if not runs:
        raise ConfigError(f"{path.name}: no command in it that is known; wanted one that runs {', '.join(SCRIPTS)}.")
    words, called = runs[0], _place(runs[0]) or 0
    if unset := re.search(f"{UNSET}(.+?){UNSET}", " ".join(words)):
        raise ConfigError(
            f"{path.name}: {unset[1]} of its command has no value that can be read without running the file; write the "
            "value in its place."
        )
    asked = ForeignSettings(path.name, _script(words[called]), _options(words[called + 1 :]), path.resolve().parent)
    if given := asked.text("config_file"):
        whole = _in_config(asked, given)
        asked = ForeignSettings(
            path.name, asked.script, {**whole.values, **asked.values, "config_file": None}, whole.folder
        )
    elif "mixed_precision" not in asked.values:  # which may be told to accelerate
        asked.values.update({k: v for k, v in _options(words[:called]).items() if k == "mixed_precision"})
    if len(runs) > 1:
        asked.notes.append(f"{path.name}: the first of its {len(runs)} trainings; the others need files of their own")
    return asked


def _in_config(asked: ForeignSettings, given: str) -> ForeignSettings:
    config = asked.find(f"{given.removesuffix('.toml')}.toml")
    if config is None:
        raise ConfigError(f"{asked.name}: its --config_file {given} is neither beside it nor in this folder.")
    return _of_config(config, text_of(config))


def _script(word: str) -> str:
    return re.split(r"[\\/]", word)[-1]


def _place(words: list[str]) -> int | None:
    """Where the script stands in a command that runs one; None of another, such as one that downloads it."""
    place = next((place for place, word in enumerate(words) if _script(word) in SCRIPTS), None)
    return place if place is not None and _options(words[place + 1 :]) else None


def _options(words: list[str]) -> dict[str, Any]:
    """--name value, --name=value, --name value value, and --name alone, which is True."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if re.match(r"--?[a-zA-Z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else True
        elif name:
            before = found[name]
            found[name] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    return found
