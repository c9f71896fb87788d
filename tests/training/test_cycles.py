"""The rates that each trainer takes where the learning rate falls several times."""

import pytest

from sfumato import cli
from tests.logged import log_in

QUIET = ("--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "0", "--batch", "2", "--steps", "4")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("lora", ("--caption", "{caption}", "--rank", "1")),
        ("dreambooth", ("--class-name", "square", "--prior", "none", "--method", "lora", "--rank", "1")),
        ("finetune", ("--caption", "{caption}")),
        ("textual_inversion", ("--placeholder", "<x>")),
    ],
)
def test_the_rate_falls_from_its_peak_in_each_cycle(program, options, pocket_folder, pictures, tmp_path):
    words = ["--images", pictures, "--output", tmp_path / "run", "--base", pocket_folder, *QUIET, *options]
    words += ["--learning-rate", "1e-3", "--schedule", "linear", "--cycles", "2"]
    assert cli.main(["train", program, *map(str, words)]) == 0
    rows = log_in(tmp_path / "run")
    assert [row["rate"] for row in rows if "loss" in row] == pytest.approx([1e-3, 5e-4] * 2)
