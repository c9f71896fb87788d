"""What a training says at its end."""

import shlex

import pytest

from sfumato import cli

QUIET = ("--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "0", "--batch", "2", "--steps", "1")
OF_SQUARE = ("--class-name", "square", "--prior", "none", "--method", "full")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("lora", ("--rank", "1", "--caption", "<x> {caption}", "--train-words", "<x>")),
        ("dreambooth", (*OF_SQUARE, "--save", "difference")),
        ("dreambooth", (*OF_SQUARE, "--save", "folder")),
        ("textual_inversion", ("--placeholder", "<x>")),
        ("slider", ("--concept", "square", "--more", "red", "--drawn", "2", "--rank", "1")),
    ],
)
def test_the_command_at_the_end_draws_with_what_was_learned(
    program, options, pocket_folder, pictures, tmp_path, capsys
):
    run = tmp_path / "my runs" / "my run"
    images = () if program == "slider" else ("--images", pictures)
    words = [*images, "--output", run, "--base", pocket_folder, *QUIET, *options]
    assert cli.main(["train", program, *map(str, words)]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("try "))
    _, called, *command = shlex.split(line)
    assert (called, command[0]) == ("sfumato", "generate")
    assert any(str(run) in word for word in command)
    given = command[command.index("--base") + 1]
    assert given == str(run / "my run" if "folder" in options else pocket_folder)

    assert cli.main([*command, "--steps", "1", "-o", str(tmp_path / "first.png")]) == 0
    assert (tmp_path / "first.png").exists()
