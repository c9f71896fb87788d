"""A config comes from defaults, a TOML file and options; what does not fit is one line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import pytest
from cyclopts import Parameter
from sfumato.trainers import lora

from sfumato.config import expand_home, fill_unset, panels_of, parse, to_dict, to_toml
from sfumato.errors import ConfigError
from sfumato.generation.arguments.base import DrawingBaseOptions


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train something."""

    images: Path
    """Folder of pictures."""
    rank: int | None = None
    """Inner dimension."""
    mode: Literal["a", "b"] = "a"
    """Which way."""
    prompts: tuple[str, ...] = ()
    """What to draw."""


def read(*argv: str) -> Config:
    return parse(Config, argv, program="train test")


def test_options_become_fields():
    config = read("--images", "d", "--rank", "3", "--prompts", "a crab", "--prompts", "a house")
    assert config == Config(images=Path("d"), rank=3, prompts=("a crab", "a house"))


def test_a_file_fills_what_the_options_leave(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('images = "d"\nrank = 3\nmode = "b"\n')
    assert read(str(file)) == Config(images=Path("d"), rank=3, mode="b")
    assert read("--rank", "5", "--config", str(file)) == Config(images=Path("d"), rank=5, mode="b")


@dataclass(frozen=True, kw_only=True)
class Lasting:
    """Train for a while."""

    steps: int | None = None
    epochs: int | None = None
    rank: int = 1


def test_what_says_the_same_on_the_command_line_is_in_place_of_a_files(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("steps = 8\nrank = 2")
    for words, found in ((["--epochs", "3"], (None, 3)), (["--steps=3"], (3, None)), ([], (8, None))):
        config = parse(Lasting, [str(file), *words], program="train test")
        assert (config.steps, config.epochs, config.rank) == (*found, 2)


def test_a_path_from_home_is_found_wherever_no_shell_has_read_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.toml"
    file.write_text('images = "~/a dog"\nprompts = ["~/is no path"]')
    assert read("--config=~/c.toml") == Config(images=tmp_path / "a dog", prompts=("~/is no path",))
    assert read("--images=~/x~/~").images == tmp_path / "x~/~"
    assert read("--images", "~dog").images == Path("~dog")
    assert expand_home("line=~/line.safetensors:0.8") == f"line={tmp_path}/line.safetensors:0.8"


def test_an_option_that_comes_first_is_no_config_file(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("rank = 3")
    assert read("--images=dataset.toml", f"--config={file}") == Config(images=Path("dataset.toml"), rank=3)
    assert read(f"--config={file}", "--images", "d").rank == 3


@pytest.mark.parametrize("named", ["slider-flat.toml", "trainers/configs/slider-flat.toml"])
def test_a_shipped_config_is_found_from_any_folder_and_said(named, tmp_path, monkeypatch, capsys):
    slider = import_module("sfumato.trainers.slider")
    monkeypatch.chdir(tmp_path)
    config = parse(slider.Config, [named, "--output", "o"], program="train slider")
    assert config.concept
    assert capsys.readouterr().err.endswith("trainers/configs/slider-flat.toml\n")
    own = tmp_path / named
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text('concept = "mine"')
    assert parse(slider.Config, [named, "--output", "o"], program="train slider").concept == ("mine",)
    assert capsys.readouterr().err == ""


def test_toml_and_back_is_identity(tmp_path):
    config = Config(images=Path("a b"), rank=3, prompts=('say "x"', "ünï"))
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert read(str(file)) == config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--images", "d", "--rnk", "3"], ["--rnk", "--rank"]),
        (["--images", "d", "--rank", "x"], ["--rank x: wanted a whole number. See sfumato train test --help."]),
        (["--images", "d", "--mode", "c"], ['"c"', '"a", "b"']),
        (["--images", "my", "dogs"], ["'dogs': belongs to no option. Put a name with spaces into quotes."]),
        (
            ["--images", "my", __file__],
            ["more files than are taken at once. Name fewer, and run it again"],
        ),
        (["my-dogs"], ["--images is needed, and 'my-dogs' belongs to no option."]),
        ([], ["--images"]),
        (["nowhere.toml"], ["nowhere.toml", "no such config file; name an existing one, or give options alone."]),
        (["lora-stile.toml"], ["lora-stile.toml: there is no such config file; did you mean lora-style.toml?"]),
        (["away/lora-style.toml"], ["no such config file; sfumato's own is /", "/trainers/configs/lora-style.toml."]),
    ],
)
def test_what_does_not_fit_is_one_line(argv, words):
    with pytest.raises(ConfigError) as error:
        read(*argv)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("words", [["--images", "d", "--output", "o"], []])
def test_a_recipe_without_its_ending_is_told_it(words):
    with pytest.raises(ConfigError) as error:
        parse(lora.Config, ["lora-style", *words], program="train lora")
    end = "the config's name ends in .toml; write lora-style.toml. See sfumato train lora --help."
    assert str(error.value) == f"lora-style: {end}"
    with pytest.raises(ConfigError, match="'my-style' belongs to no option"):
        parse(lora.Config, ["my-style"], program="train lora")


def test_an_unknown_key_names_its_neighbour(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("rnak = 3\n")
    with pytest.raises(ConfigError, match=r"unknown key 'rnak'; did you mean rank\?"):
        read(str(file))


def test_broken_toml_names_the_line(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("rank = \n")
    with pytest.raises(ConfigError, match="line 1"):
        read(str(file))


def test_help_is_the_text_under_the_field(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "Inner dimension." in shown
    assert "Train something." in shown


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How it is drawn."""

    steps: int = 25
    """Of the sampler."""


@dataclass(frozen=True, kw_only=True)
class Inheriting(Drawing, Config):
    """Do both."""

    deep: bool = False
    """Whether deep."""


def test_headings_of_the_trainers_fit_a_narrow_terminal():
    for program in ("lora", "dreambooth", "finetune", "textual_inversion"):
        panels = panels_of(import_module(f"sfumato.trainers.{program}").Config, f"train {program}")
        assert max(map(len, panels.values())) <= 58


def test_a_base_that_is_a_number_is_the_name_of_a_base(tmp_path):
    (tmp_path / "c.toml").write_text("base = 3")
    assert parse(DrawingBaseOptions, [str(tmp_path / "c.toml")], program="generate").base == "3"


def test_help_has_each_group_of_options_under_its_own_heading(capsys):
    with pytest.raises(SystemExit):
        parse(Inheriting, ["--help"], program="train test")
    panels = [panel.partition(" ─")[::2] for panel in capsys.readouterr().out.split("╭─ ")[1:]]
    options = [(title, re.findall(r"--(?!no-)[a-z]+", text)) for title, text in panels]
    assert options == [
        ("Needed", ["--images"]),
        ("Of test", ["--deep"]),
        ("How it is drawn", ["--steps"]),
        ("Train something", ["--rank", "--mode", "--prompts"]),
    ]


def test_a_public_config_tells_no_path():
    assert to_dict(Config(images=Path("/home/someone/pictures")), public=True)["images"] == "pictures"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/someone/a.safetensors:0.8", "a.safetensors:0.8"),
        ("LINE=/home/someone/a.safetensors:0.8:0.4", "LINE=a.safetensors:0.8:0.4"),
        ("../secret/a.safetensors", "a.safetensors"),
        ("secret\\a.safetensors:1", "a.safetensors:1"),
        ("/home/someone/lr=1e-4/a.safetensors:0.8", "a.safetensors:0.8"),
        ("/home/someone/run=3/base", "base"),
        ("line=/home/someone/a=b/folder:0.8", "line=folder:0.8"),
        ("../models/sd15/", "sd15"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("line=down:0,up.1:1.2", "line=down:0,up.1:1.2"),
        ("a cat / a dog", "a cat / a dog"),
    ],
)
def test_a_public_config_tells_no_folder_within_a_text(text, told):
    assert to_dict(Config(images=Path("d"), prompts=(text,)), public=True)["prompts"] == [told]


def test_unset_fields_are_filled_and_named():
    config, filled = fill_unset(Config(images=Path("d")), {"rank": 16, "mode": "b", "other": 1})
    assert (config.rank, config.mode, filled) == (16, "a", ["rank"])


@pytest.mark.parametrize("words", [["--rank", "1.5"], ["--rank=2.0"], ["--rank", "1.55E1"]])
def test_a_whole_number_with_a_fraction_is_refused_and_not_rounded(words):
    with pytest.raises(ConfigError, match=r"--rank .*whole number"):
        read("--images", "d", *words)


def test_a_fraction_in_a_file_is_refused_too(tmp_path):
    (tmp_path / "c.toml").write_text("rank = 1.5\n")
    with pytest.raises(ConfigError, match=r"rank is 1.5; wanted a whole number"):
        read(str(tmp_path / "c.toml"), "--images", "d")


def test_a_value_of_another_type_in_a_file_is_not_read_as_what_it_may_mean(tmp_path):
    @dataclass(frozen=True)
    class Typed:
        """Train."""

        learning_rate: float | None = None
        ema: bool = False
        trigger: str | None = None
        output: Path = Path("run")
        crop: Literal["center", "pad"] = "center"
        seed: tuple[int, ...] = ()

    def parsed(text):
        (tmp_path / "c.toml").write_text(text)
        return parse(Typed, [str(tmp_path / "c.toml")], program="train test")

    for text, said in [
        ('learning-rate = "1e-4"', 'learning-rate is "1e-4"; wanted a number, without quotes.'),
        ("learning_rate = true", "learning_rate is true; wanted a number."),
        ("[learning_rate]\nunet = 1e-4", 'learning_rate is {"unet": 0.0001}; wanted a number.'),
        ("ema = 1", "ema is 1; wanted true or false."),
        ('ema = "no"', 'ema is "no"; wanted true or false, without quotes.'),
        ("trigger = true", "trigger is true; wanted a text."),
        ("trigger = 2026-11-28", "trigger is 2026-11-28; wanted a text."),
        ('trigger = ["a", "b"]', 'trigger is ["a", "b"]; wanted a text.'),
        ("output = 3", "output is 3; wanted a path."),
        ('crop = "middle"', 'crop is "middle"; wanted one of "center", "pad".'),
        ("seed = [1, true]", "seed is [1, true]; wanted a list of which each is a whole number."),
        ("seed = [[1]]", "seed is [[1]]; wanted a list of which each is a whole number."),
        ("[training]\nema = true", "[training] is a table; wanted the options by themselves, such as learning_rate ="),
        ("learning-rate = 1\nlearning_rate = 2", "learning_rate is there twice, with - and with _; keep one."),
    ]:
        with pytest.raises(ConfigError) as error:
            parsed(text)
        assert f"c.toml: {said}" in str(error.value)
    assert parsed("learning-rate = 1\nema = true\ntrigger = 512\nseed = 3\n") == Typed(
        learning_rate=1.0, ema=True, trigger="512", seed=(3,)
    )


def test_a_fraction_is_refused_however_the_option_is_spelt():
    @dataclass(frozen=True)
    class Every:
        """Save."""

        save_every: int = 1

    with pytest.raises(ConfigError, match=r"--save_every 1\.5: wanted a whole number"):
        parse(Every, ["--save_every", "1.5"], program="train test")


def test_a_file_of_windows_notepad_is_read(tmp_path):
    (tmp_path / "C.TOML").write_bytes(b'\xef\xbb\xbfimages = "d"\r\nrank = 3\r\n')
    assert read(str(tmp_path / "C.TOML")) == Config(images=Path("d"), rank=3)


@pytest.mark.parametrize(
    ("text", "argv", "said"),
    [
        ("", [], "--images is needed. See sfumato train test --help."),
        ("", ["--imges=x"], "--images is needed, and --imges is no option. See sfumato train test --help."),
        ("", ["--images"], "--images wants a value. See sfumato train test --help."),
        ("", ["--images=d", "--rank", ""], '--rank "": wanted a whole number.'),
        ('rank = "3"', ["--images", "d"], '{file}: rank is "3"; wanted a whole number, without quotes.'),
        ('[[source]]\npath = "d"', [], "{file}: this is a dataset.toml; pass it with --images."),
        (
            '[model]\npretrained_model_name_or_path = "d"\n[run]\noutput_dir = "o"',
            [],
            "{file}: [model] is a table; wanted",
        ),
    ],
)
def test_what_is_wrong_is_said_where_it_stands(tmp_path, text, argv, said):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read(str(file), *argv)
    assert said.format(file=file) in str(error.value)


@pytest.mark.parametrize("argv", [["--images", ""], ["--images="], ["--rank", "3", "--images", ""], [""]])
def test_a_path_of_no_letters_is_not_the_present_folder(argv):
    with pytest.raises(ConfigError, match=r"--images is empty; wanted a path, where \. is the present folder"):
        read(*argv)


def test_a_path_of_no_letters_in_a_file_neither(tmp_path):
    (tmp_path / "c.toml").write_text('images = ""\n')
    with pytest.raises(ConfigError, match=r"c\.toml: images is empty"):
        read(str(tmp_path / "c.toml"))
    assert read("--images", ".", "--prompts", "").prompts == ("",)


def test_a_public_config_tells_no_folder_that_is_here(tmp_path, monkeypatch):
    """What is no folder may be a hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clients/acme/secret").mkdir(parents=True)
    prompts = ("clients/acme/secret", "line=clients/acme:0.8", "a/b")
    told = to_dict(Config(images=Path("d"), prompts=prompts), public=True)
    assert told["prompts"] == ["secret", "line=acme:0.8", "a/b"]


def test_paths_of_windows_in_a_file(tmp_path):
    file = tmp_path / "run.toml"
    for text, found in (
        (r'images = "C:\new\teddy"', r"images 'C:\\new\\teddy' is no path: in double quotes \\ begins a sign\. Write"),
        (r'images = "C:\pictures"', r"Unescaped '\\' in a string .*; mend that line\. Write paths with /"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=found):
            read(str(file))
    for encoding in ("utf-16", "utf-8-sig"):  # as PowerShell and Notepad write them
        file.write_text(r"images = 'C:\new'", encoding=encoding)
        assert read(str(file)).images == Path(r"C:\new")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Draw something."""

    output: Annotated[Path, Parameter(alias="-o")] = Path("pictures")
    """Where."""


def test_an_output_of_no_letters_is_refused_under_its_short_name():
    with pytest.raises(ConfigError, match=r"^-o is empty; wanted a path"):
        parse(Drawing, ["-o", ""], program="test")


@pytest.mark.parametrize(
    ("text", "is_theirs"),
    [
        ('[model]\npretrained_model_name_or_path = "d"\n', True),
        ('pretrained_model_name_or_path = "d"\noutput_dir = "o"\n', True),
        ('pretrained_model_name_or_path = "d"\n', False),
    ],
)
def test_a_training_of_sd_scripts_is_told_what_converts_it(text, is_theirs, tmp_path):
    file = tmp_path / "theirs.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse(import_module("sfumato.trainers.lora").Config, [str(file)], program="train lora")
    assert ("sfumato recipe" in str(error.value)) == is_theirs
