"""The benches as commands: a wrong use of any of them is one line, which names the command whose help tells more."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import bench.real
from sfumato import cli
from sfumato.config import parse

FILES = sorted(Path(bench.real.__file__).parent.glob("*.py"))
BENCHES = [file.stem for file in FILES if "cli.run(main)" in file.read_text(encoding="utf-8")]


def test_all_benches_that_have_a_config_are_among_them():
    assert len(BENCHES) == sum("class Config" in file.read_text(encoding="utf-8") for file in FILES) >= 15


@pytest.mark.parametrize("name", BENCHES)
def test_a_misspelt_option_is_one_line(name, capsys):
    main = importlib.import_module(f"bench.{name}").main
    capsys.readouterr()  # other libraries have their say when they are first imported
    assert cli.guarded(main, ["--no-such-option"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sfumato: ")
    assert printed.err.endswith(f" See python -m bench.{name} --help.\n")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("name", [file.stem for file in FILES if "print_report(Config" in file.read_text("utf-8")])
def test_what_the_report_is_written_to_is_a_file_or_unset(name):
    config = importlib.import_module(f"bench.{name}").Config
    assert get_type_hints(config).get("out", Path | None) == Path | None


ROOT = Path(bench.real.__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "datasets/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
IN_A_LINE = re.compile(r"`(python\s+(?:-m\s+bench\.|bench/)[^`]*)`")
IN_A_BLOCK = re.compile(r"^(?: {4})?((?:[^`#\n]*; )?python (?:-m bench\.|bench/)[^#\n]*)", re.MULTILINE)
STANDS_FOR = {"CLIENT": "comfyui", "...": "--data EMOJI --subjects EMOJI-SUBJECTS"}
"""What a reader puts in place of a word: the dots are the options of the command above."""


def cited():
    """Every command of a bench that the documents give, on one line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for command in [*IN_A_LINE.findall(text), *IN_A_BLOCK.findall(text)]:
            lines = [" ".join(part.split()) for part in command.split(";")]
            found += [line for line in lines if line.startswith("python ") and "bench.NAME" not in line]
    return sorted(set(found))


@pytest.mark.parametrize("command", cited())
def test_a_cited_command_is_one_that_its_bench_understands(command, monkeypatch):
    """Parsed by the bench's own parser, and not run."""
    for word, meaning in STANDS_FOR.items():
        command = re.sub(rf"(?<= ){re.escape(word)}(?= |$)", meaning, command)
    place, *words = shlex.split(command.removeprefix("python ").removeprefix("-m "))
    name = place.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(f"{name}.__main__" if name == "bench.clients" else name)
    if hasattr(module, "Config"):
        assert parse(module.Config, words, program=name)
        return
    understood = argparse.ArgumentParser.parse_args

    class Understood(Exception):
        pass

    def parse_args(self):
        understood(self)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [place, *words])
    with pytest.raises(Understood):
        module.main()


def test_all_benches_of_the_list_are_looked_at():
    assert len(cited()) > 40
