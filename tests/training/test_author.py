"""Who made what is learned, and its license: in the metadata of every kind of file, and in every card."""

from dataclasses import replace

import pytest

from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.files import read_header
from sfumato.training.checks import check_run
from tests.training.test_options import CONFIG

QUIET = ("--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "0", "--batch", "2", "--steps", "1")
OF_SQUARE = ("--class-name", "square", "--prior", "none")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("lora", ("--caption", "{caption}", "--rank", "1")),
        ("dreambooth", (*OF_SQUARE, "--method", "full", "--save", "difference")),
        ("finetune", ("--caption", "{caption}", "--save", "difference")),
        ("textual_inversion", ("--placeholder", "<x>")),
    ],
)
def test_author_and_license_are_told(program, options, pocket_folder, pictures, tmp_path):
    words = ["--images", pictures, "--output", tmp_path / "run", "--base", pocket_folder, *QUIET, *options]
    words += ["--author", "Ann Übel", "--license", "cc-by-4.0"]
    assert cli.main(["train", program, *map(str, words)]) == 0
    metadata = read_header(tmp_path / "run/run.safetensors").metadata
    assert (metadata["modelspec.author"], metadata["modelspec.license"]) == ("Ann Übel", "cc-by-4.0")
    assert "\nlicense: cc-by-4.0\n" in (tmp_path / "run/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "  ", "a\nb", "a\0"])
def test_what_is_no_line_of_text_is_refused(text):
    for name in ("author", "license"):
        check_run(replace(CONFIG, **{name: "me"}))
        with pytest.raises(ConfigError, match=f"--{name} .*: empty, or not one line of text"):
            check_run(replace(CONFIG, **{name: text}))
