"""The LoRA trainer on a tiny base, each option said once."""

import pytest

from sfumato import cli


@pytest.fixture
def train(pocket_folder, pictures, tmp_path):
    """Train with these options on the tiny base; returns the adapter's path."""

    def run(name="run", *options, base=pocket_folder):
        words = {"--images": str(pictures), "--output": str(tmp_path / name), "--base": str(base)}
        words |= {
            "--caption": "{caption}",
            "--learn": "plain",
            "--steps": "4",
            "--batch": "2",
            "--rank": "2",
            "--learning-rate": "1e-2",
        }
        words |= {"--sample-every": "0", "--measure-every": "0", "--checkpoint-every": "0"}
        given = list(options)
        known = ("--train-text-encoder", "--overwrite", "--gradient-checkpointing", "--own-negative")
        flags = [given.pop(given.index(flag)) for flag in known if flag in given]
        unsaid = [word for pair in words.items() if pair[0] not in given for word in pair]
        assert cli.main(["train", "lora", *unsaid, *given, *flags]) == 0
        return tmp_path / name / f"{name}.safetensors"

    return run
