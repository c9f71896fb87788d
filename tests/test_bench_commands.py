"""The benches as commands: a wrong use of any of them is one line, which names the command whose help tells more."""

import importlib
from pathlib import Path
from typing import get_type_hints

import pytest

import bench.real
from sfumato import cli

FILES = sorted(Path(bench.real.__file__).parent.glob("*.py"))
BENCHES = [file.stem for file in FILES if "cli.run(main)" in file.read_text(encoding="utf-8")]


def test_all_benches_that_have_a_config_are_among_them():
    assert len(BENCHES) == sum("class Config" in file.read_text(encoding="utf-8") for file in FILES) >= 15


@pytest.mark.parametrize("name", BENCHES)
def test_a_misspelt_option_is_one_line(name, capsys):
    main = importlib.import_module(f"bench.{name}").main
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
