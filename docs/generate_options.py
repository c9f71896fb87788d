"""Write docs/options: a page of options for each program, and index.md with all of them, from the texts of --help.

python docs/generate_options.py
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sfumato import config
from sfumato.cli import PIPELINES, TRAINERS
from sfumato.utils.option_groups import page

FOLDER = Path(__file__).parent / "options"
PROGRAMS = {f"train {name}": f"sfumato.trainers.{name}" for name in TRAINERS}
PROGRAMS |= {name: module for name, (module, _) in PIPELINES.items()}


@dataclass(frozen=True)
class Option:
    """name: as it is typed. kind: what it takes. default: as text, empty where there is none."""

    name: str
    group: str
    kind: str
    default: str
    text: str


def options_of(program: str) -> list[Option]:
    """The options of a program, in the order of its --help-all."""
    found = []
    for each in config.described(importlib.import_module(PROGRAMS[program]).Config, program):
        default = "" if each.default in (None, (), "") or each.default is False else f"{each.default}"
        found.append(Option(each.name, each.group, each.kind, default, " ".join(each.text.split())))
    return found


def page_of(program: str) -> str:
    """A page of Markdown with the options of a program."""
    about = (importlib.import_module(PROGRAMS[program]).Config.__doc__ or "").strip()
    lines = [f"# sfumato {program}", "", *(_escape(line.strip()) for line in about.splitlines())]
    group = ""
    for option in options_of(program):
        if option.group != group:
            group = option.group
            lines += ["", f"## {group}", ""]
        default = f", default `{option.default}`" if option.default else ""
        lines.append(f"- **`{option.name}`** ({option.kind}{default}): {_escape(option.text)}")
    return "\n".join(lines) + "\n"


def index() -> str:
    """A page of Markdown with each option of each program."""
    by_name: dict[str, dict[str, str]] = {}
    for program in PROGRAMS:
        for option in options_of(program):
            by_name.setdefault(option.name, {}).setdefault(option.text, "")
            before = by_name[option.name][option.text]
            link = f"[{program}]({page(program)})"
            by_name[option.name][option.text] = f"{before}, {link}" if before else link
    lines = [
        "# Options",
        "",
        "All options of all programs, from the texts of `--help-all`.",
        "",
        "| Option | Programs | What it does |",
        "|---|---|---|",
    ]
    for name in sorted(by_name):
        lines += [
            f"| `{name}` | {programs} | {_escape(text).replace('|', chr(92) + '|')} |"
            for text, programs in by_name[name].items()
        ]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """What is no Markdown: a sign in < > would be a tag."""
    parts = text.split("`")  # between two of these all is as it stands
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts)


def pages() -> Mapping[str, str]:
    """Name of a page -> its text."""
    return {page(program): page_of(program) for program in PROGRAMS} | {"index.md": index()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
