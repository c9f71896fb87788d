"""The DreamBooth trainer on a tiny base, each option said once."""

import pytest

from sfumato import cli
from tests.dreambooth.subject import CLASS, PROMPT, STEPS


@pytest.fixture
def train(pocket_folder, pictures, tmp_path):
    """Train with these options on the tiny base; returns what was learned."""

    def run(name="run", *options, base=pocket_folder, status=0):
        words = {
            "--method": "full",
            "--prior-prompts": "",
            "--images": pictures,
            "--output": tmp_path / name,
            "--base": base,
            "--class-name": CLASS,
        }
        words |= {"--instance-prompt": PROMPT, "--steps": STEPS, "--batch": 2, "--learning-rate": "1e-3", "--rank": 2}
        words |= {"--sample-every": 0, "--measure-every": 0, "--checkpoint-every": 0}
        words |= {"--class-count": 3, "--class-cache": tmp_path / "class"}
        given = list(options)
        known = (
            "--train-text-encoder",
            "--overwrite",
            "--resume",
            "--fused",
            "--ema-on-cpu",
            "--gradient-checkpointing",
            "--own-negative",
        )
        flags = [given.pop(given.index(flag)) for flag in known if flag in given]
        asked = dict(zip(given[::2], given[1::2], strict=True))
        if "lora" not in (asked.get("--method"), asked.get("--save")):
            words.pop("--rank")
        if asked.get("--prior") in ("none", "base"):
            words.pop("--class-count")
        words |= asked
        shown = [str(word) for pair in words.items() if pair[1] is not None for word in pair]
        assert cli.main(["train", "dreambooth", *shown, *flags]) == status
        folder = tmp_path / name / name
        return folder if folder.is_dir() else folder.with_suffix(".safetensors")

    return run
