"""Whatever is typed: no traceback, exit code 2, and one line that names what is wrong and where."""

import dataclasses
import importlib
import json
import typing
from pathlib import Path

import pytest

from sfumato import cli

PROGRAMS = {f"train {name}": f"sfumato.trainers.{name}" for name in cli.TRAINERS}
PROGRAMS |= {name: module for name, (module, _) in cli.PIPELINES.items()}
SLOW = ("train dreambooth", "train finetune", "train textual_inversion")
"""Of programs that take as long as another of their kind."""

FILES = {
    "empty.safetensors": b"",
    "short.safetensors": b"\x10\x00\x00",
    "page.safetensors": b"<!DOCTYPE html><html><body>404</body></html>",
    "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "zip.safetensors": b"PK\x03\x04" + bytes(60),
    "pickle.safetensors": b"\x80\x04\x95" + bytes(60),
    "text.txt": b"only words",
    "noise.png": bytes(range(256)),
}


def options(module):
    """(option, type) of each field of the program's Config."""
    config = importlib.import_module(module).Config
    hints = typing.get_type_hints(config, include_extras=False)
    return [(f"--{f.name.replace('_', '-')}", hints[f.name]) for f in dataclasses.fields(config) if f.name != "_"]


def required(module):
    """Words for the fields that have no default."""
    config = importlib.import_module(module).Config
    missing = dataclasses.MISSING
    fields = [f for f in dataclasses.fields(config) if f.default is missing and f.default_factory is missing]
    return {f"--{f.name.replace('_', '-')}": "x" for f in fields if f.name != "_"}


def scalar(hint):
    """The type inside an optional or a tuple."""
    inner = [part for part in typing.get_args(hint) if part not in (type(None), Ellipsis)]
    return scalar(inner[0]) if inner and typing.get_origin(hint) is not typing.Literal else hint


def wrong_values(hint):
    kind = scalar(hint)
    if typing.get_origin(kind) is typing.Literal:
        return ["nonsense", ""]
    return {int: ["x", ""], float: ["x", "1,5"], bool: ["maybe"]}.get(kind, [])


def wrong_commands():
    """(program, words, what the line must name)."""
    for program, module in PROGRAMS.items():
        needed = required(module)
        yield program, [*(f"{option}={value}" for option, value in needed.items()), "--no-such-option=1"], "--no-such"
        yield program, ["--config", "nowhere.toml"], "nowhere.toml"
        # For check and caption a TOML file is the data set itself.
        other = [f"{option}={value}" for option, value in needed.items() if option not in ("--images", "--file")]
        yield program, ["nowhere.toml", *other], "nowhere.toml"
        yield program, ["--config", "broken.toml"], "broken.toml"
        yield program, ["--config", "unknown.toml"], "no_such_key"
        yield program, ["--config", "folder.toml"], "folder.toml"
        yield program, ["--config", "latin.toml"], "latin.toml"
        for option, hint in options(module):
            for value in wrong_values(hint):
                rest = [f"{other}={text}" for other, text in needed.items() if other != option]
                yield program, [*rest, f"{option}={value}"], option.removeprefix("--")


COMMANDS = list(wrong_commands())


def train(*words):
    """Options of a training that would work but for these."""
    given = {"--images": "pictures", "--output": "run", "--base": "pocket-tiny", "--caption": "{caption}"}
    flags = [word for word in words if word in ("--resume", "--overwrite")]
    pairs = [word for word in words if word not in flags]
    given |= dict(zip(pairs[::2], pairs[1::2], strict=True))
    return [word for pair in given.items() for word in pair] + flags


BAD_NAMES = [
    "a/b",
    "../a",
    "/a",
    "a\\b",
    "",
    " ",
    ".a",
    "a:b",
    "a*",
    "con",
    "NUL.txt",
    "a.",
    "a\n",
    "\u202ea",
    "a" * 200,
]
WRONG_USE = [
    *[(f"train {trainer}", train(*more, "--name", name), "--name")
      for name in BAD_NAMES for trainer, more in (("lora", []), ("textual_inversion", ["--placeholder", "<x>"]),
                                                  ("dreambooth", ["--class-name", "x"]), ("finetune", []))],
    ("train lora", train("--images", "nowhere"), "nowhere"),
    ("train lora", train("--images", "text.txt"), "text.txt"),
    ("train lora", train("--output", "text.txt"), "text.txt"),
    ("train lora", train("--output", "text.txt/run"), "text.txt"),
    ("train lora", train("--sample-prompts", "none.txt"), "--sample-prompts none.txt: there is no such file; name"),
    ("train lora", train("--init-from", "https://a.b/c.safetensors"), "https://a.b/c.safetensors: this is a web"),
    ("train lora", train("--resume"), "run"),
    ("train lora", train("--resume", "--overwrite"), "--resume and --overwrite"),
    ("train lora", train("--steps", "0"), "--steps is 0"),
    ("train lora", train("--steps", "-3"), "--steps is -3"),
    ("train lora", train("--batch", "0"), "--batch is 0"),
    ("train lora", train("--seed", str(2**64)), f"seed {2**64}: wanted a whole number of 64 bits"),
    ("train lora", train("--accumulate", "0"), "--accumulate is 0"),
    ("train lora", train("--learning-rate", "nan"), "--learning-rate is nan"),
    ("train lora", train("--learning-rate", "inf"), "--learning-rate is inf"),
    ("train lora", train("--clip", "-1"), "--clip is -1"),
    ("train lora", train("--ema", "1"), "--ema is 1"),
    ("train lora", train("--keep", "-1"), "--keep is -1"),
    ("train lora", train("--checkpoint-every", "-1"), "--checkpoint-every is -1"),
    ("train lora", train("--steps", "1", "--epochs", "1"), "--steps and --epochs"),
    ("train lora", train("--base", "text.txt"), "text.txt"),
    ("train lora", train("--base", "nowhere.safetensors"), "nowhere.safetensors"),
    ("train lora", train("--device", "toaster"), "toaster"),
    ("train lora", train("--output", "a\ud800b"), "UTF-8"),
    ("train lora", train("--cache", "text.txt"), "--cache text.txt: text.txt is a file; name a folder"),
    ("train dreambooth", train("--class-name", "x", "--class-cache", "text.txt/a"), "text.txt is a file"),
    ("check", ["pictures", "--base", ""], "--base is empty; name pocket"),
    ("caption", ["pictures", "--model", ""], "--model is empty; name the model's folder"),
    ("train pretrain", ["--data", "nowhere", "--output", "run"], "nowhere"),
    ("train pretrain", ["--stage", "unet", "--output", "run"], "--vae"),
    ("train pretrain", ["--stage", "unet", "--vae", "nowhere", "--output", "run"], "nowhere"),
    ("train pretrain", ["--batch", "0", "--output", "run"], "--batch"),
    ("train pretrain", ["--flip-share", "2", "--output", "run"], "--flip-share"),
    ("train pretrain", ["--fall-at", "-2", "--output", "run"], "--fall-at"),
    ("train pretrain", ["--fall-at", "20", "--steps", "9", "--output", "run"], "9 steps; give a --fall-at of at most"),
    ("train lora", train("--images", ""), "--images is empty"),
    ("train nothing", [], "nothing"),
    ("train", ["loar"], "lora"),
    ("nothing", [], "nothing"),
    ("generat", [], "generate"),
    ("resume", [], "resume"),
    ("resume", ["nowhere"], "nowhere"),
    ("resume", ["text.txt"], "text.txt"),
    ("resume", ["pictures"], "pictures"),
    ("cp", [], "cp"),
    ("cp", ["lora"], "cp"),
    ("cp", ["loar", "mine.py"], "lora"),
    ("cp", ["lora", "text.txt"], "text.txt"),
    ("cp", ["lora", "nowhere/mine.py"], "nowhere"),
    ("generate", ["crab", "--output", "text.txt/a.png"], "text.txt"),
    ("generate", ["crab", "--size", "65"], "--size"),
    ("generate", ["crab", "--sampler", "nonsense"], "nonsense"),
    ("generate", ["crab", "--count", "0"], "--count"),
    ("generate", [], "prompt"),
    *[("inspect", [name], name) for name in FILES],
    ("inspect", ["a", "b"], "'b': belongs to no option"),
    *[("generate", ["crab", "--lora", name], name) for name in FILES],
    *[("train lora", train("--init-from", name), name) for name in FILES if name.endswith("safetensors")],
    *[("train lora", train("--base", name), name) for name in FILES if name.endswith("safetensors")],
    *[("generate", ["crab", "--base", name], name) for name in FILES if name.endswith("safetensors")],
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, pocket_folder, pictures):
    """A folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("place")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "broken.toml").write_text("rank = = 3")
    (folder / "unknown.toml").write_text("no_such_key = 3")
    (folder / "latin.toml").write_bytes("trigger = 'é'".encode("latin-1"))
    (folder / "folder.toml").mkdir()
    (folder / "pictures").symlink_to(pictures)
    (folder / "pocket-tiny").symlink_to(pocket_folder)
    return folder


def said_of(command, words, capsys):
    capsys.readouterr()
    code = cli.main([*command.split(), *words])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfumato: ")]
    assert code == 2, (code, lines)
    assert len(lines) == 1, lines
    return lines[0]


def test_there_are_three_hundred():
    assert len(COMMANDS) + len(WRONG_USE) >= 300


@pytest.mark.parametrize(
    "program", [pytest.param(each, marks=pytest.mark.slow) if each in SLOW else each for each in PROGRAMS]
)
def test_what_does_not_fit_is_one_line_that_names_it(program, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    for _, words, named in [command for command in COMMANDS if command[0] == program]:
        line = said_of(program, words, capsys)
        assert named.replace("_", "-") in line.replace("_", "-"), (words, line)
        assert "Traceback" not in line
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


@pytest.mark.parametrize(("command", "words", "named"), WRONG_USE, ids=str)
def test_wrong_use_is_one_line_that_names_it(command, words, named, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(path for path in place.rglob("*") if "run" not in path.parts)
    line = said_of(command, words, capsys)
    assert named in line
    assert not list(place.rglob("run/*.safetensors"))
    assert sorted(path for path in place.rglob("*") if "run" not in path.parts) == before


def test_a_nul_in_a_config_file_is_one_line(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    for option in ("output", "images", "base", "name"):
        values = {"images": "pictures", "output": "run", "base": "pocket-tiny"} | {option: "a\0b"}
        Path("nul.toml").write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items()))
        assert option in said_of("train lora", ["nul.toml"], capsys) or option == "base"
