"""The front door: short helps, the groups of all options, and the pages made of the same texts."""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

from sfumato import cli
from sfumato.config import panels_of, parse
from sfumato.utils import option_groups

ROOT = Path(__file__).parents[1]
PROGRAMS = {f"train {name}": f"sfumato.trainers.{name}" for name in cli.TRAINERS}
PROGRAMS |= {name: module for name, (module, _) in cli.PIPELINES.items()}


def config_of(program):
    return importlib.import_module(PROGRAMS[program]).Config


def names_of(program):
    return [field.name for field in dataclasses.fields(config_of(program))]


def helped(program, option, monkeypatch):
    """The options that a help shows, and its last line."""
    monkeypatch.setenv("COLUMNS", "200")
    with contextlib.redirect_stdout(out := io.StringIO()), pytest.raises(SystemExit):
        parse(config_of(program), [option], program=program)
    lines = out.getvalue().rstrip().splitlines()
    found = [re.match(r"│[ *]{1,4}(?:[A-Z_]+ )?--([a-z0-9-]+)", line) for line in lines]
    return [match[1].replace("-", "_") for match in found if match and not match[1].startswith("no-")], lines[-1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_short_help_has_sixteen_options_at_most_and_leads_to_the_others(program, monkeypatch):
    shown, last = helped(program, "--help", monkeypatch)
    wanted = option_groups.shown(program, names_of(program))
    assert sorted(shown) == sorted(wanted)
    assert len(wanted) <= option_groups.MOST
    assert f"docs/options/{option_groups.page(program)}" in last
    assert ("--help-all" in last) == (len(wanted) < len(names_of(program)))
    required = [f.name for f in dataclasses.fields(config_of(program)) if f.default is dataclasses.MISSING]
    assert set(required) <= set(wanted)


@pytest.mark.parametrize("program", option_groups.SHORT)
def test_all_options_are_in_one_group_each(program, monkeypatch):
    shown, _ = helped(program, "--help-all", monkeypatch)
    assert sorted(shown) == sorted(names_of(program))
    tables = [name for group in option_groups.groups_of(program).values() for name in group]
    assert len(tables) == len(set(tables))
    assert option_groups.OTHERS not in panels_of(config_of(program), program).values()
    assert set(option_groups.SHORT[program]) - set(option_groups.SHORT["train lora"]) <= set(names_of(program))


def test_options_that_no_trainer_has_are_in_no_table():
    known = {name for program in PROGRAMS if program.startswith("train ") for name in names_of(program)}
    assert {name for group in option_groups.TRAINERS.values() for name in group} <= known


def test_an_option_that_a_copy_of_a_program_adds_is_shown(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(config_of("train lora")):
        mine: int = 3
        """My own."""

    assert option_groups.shown("train lora", ["mine", "accumulate", "images"]) == ["mine", "images"]
    assert panels_of(Config, "train lora")["mine"] == option_groups.OTHERS


def test_the_first_help_fits_a_screen_and_names_every_command():
    lines = cli.usage().splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 100
    grouped = [name for names in cli.GROUPS.values() for each in names for name in each.split(", ")]
    assert len(grouped) == len(set(grouped))
    assert {*cli.PIPELINES, "resume", "ls", "cp"} <= set(grouped)
    words = set(re.findall(r"\w+", cli.usage()))
    assert {*cli.TRAINERS, *cli.PIPELINES} <= words
    rows = cli.usage_of_train().splitlines()
    assert all(any(row.startswith(f"  {name} ") for row in rows) for name in cli.TRAINERS)


def test_the_pages_of_options_are_those_that_are_generated():
    """python docs/generate_options.py writes them."""
    spec = importlib.util.spec_from_file_location("generate_options", ROOT / "docs" / "generate_options.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    wanted = generate.pages()
    assert sorted(path.name for path in generate.FOLDER.glob("*.md")) == sorted(wanted)
    for name, text in wanted.items():
        assert (generate.FOLDER / name).read_text(encoding="utf-8") == text, name
