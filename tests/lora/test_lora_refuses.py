"""Wrong use of the LoRA trainer is one line, and leaves no adapter."""

import dataclasses
from types import SimpleNamespace

import pytest

from sfumato import cli, data
from sfumato.errors import ConfigError
from sfumato.models.family import FAMILIES

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "nowhere"], "nowhere"),
        (["--rank", "0"], "--rank is 0"),
        (["--rank", "65"], "--rank 65: the widest layer has 64 directions"),
        (["--conv-rank", "0"], "--conv-rank is 0"),
        (["--conv-alpha", "1"], "--conv-rank and --conv-alpha are for convolutions of more than 1x1, and none is"),
        (["--rank-of", "te=1"], "--rank-of te=1: names none of the"),
        (["--rank-of", "mid=65"], "--rank-of mid=65: the widest layer has 64 directions"),
        (["--rate-of", "mid"], "--rate-of 'mid': wanted PATTERN=FACTOR, such as up.1=0.5, or mid=0 to leave it out"),
        (
            ["--rate-of", "mid=0.5", "--optimizer", "prodigy"],
            "--rate-of mid=0.5 with --optimizer prodigy: it finds one",
        ),
        (["--learning-rate", "-1"], "--learning-rate is -1"),
        (["--dropout", "1"], "--dropout is 1"),
        (["--rank-dropout", "1"], "--rank-dropout is 1.0; it must be at least 0 and below 1"),
        (["--module-dropout", "-0.1"], "--module-dropout is -0.1; it must be at least 0 and below 1"),
        (
            ["--module-dropout", "0.1", "--targets", r"mid_block.*attn2\.to_q", "--rank", "2"],
            "--module-dropout 0.1: one layer is adapted, and it is never left out; leave the option out, or",
        ),
        (["--steps", "2", "--epochs", "2"], "--steps and --epochs"),
        (["--targets", "nothing"], "matches none"),
        (["--init-from", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--base", "nowhere/at-all.safetensors"], "at-all.safetensors"),
        (["--resolution", "4"], "--resolution 4"),
        (["--resolution", "1000000"], "--resolution 1000000: is the side of a square in pixels; wanted at most 8192"),
        (["--sample-prompts", "a --s 5000", "--sample-every", "1"], "--s 5000 in a prompt: 5000 steps"),
        (["--sample-prompts", "a --d -1", "--sample-every", "1"], "--d -1 in a prompt: seed -1"),
        (["--caption-dropout", "1", "--caption", "<x>", "--train-words", "<x>"], "--caption-dropout 1 drops the new"),
        (["--tag-dropout", "1", "--caption", "<x>", "--train-words", "<x>"], "--tag-dropout 1 drops the new word from"),
        (["--attention", "xformers"], "xformers"),
        (["--precision", "fp16", "--device", "cpu"], "fp16"),
        (["--warmup", "50"], "--warmup 50"),
        (["--min-timestep", "900", "--max-timestep", "300"], "--min-timestep 900, --max-timestep 300: the base's"),
        (["--max-timestep", "1001"], "a larger end of at most 1000"),
        (["--over-steps", "0.8"], "--over-steps 0.8: wanted START-END, progress from 0 to 1, such as 0-0.5"),
        (["--own-negative", "--no-overwrite"], "--own-negative: give the words of the subject by --trigger"),
        (
            ["--own-negative", "--no-overwrite", "--trigger", "zwx"],
            "--own-negative: no caption holds the trigger 'zwx'; pass --caption",
        ),
        (["--prior-weight", "2"], "--prior-weight is for what shall draw as before; name it with --prior-prompts, or"),
        (["--text-learning-rate", "1e-4"], "--text-learning-rate has no effect without --train-text-encoder"),
        (["--prior-prompts", "a cat", "--prior-weight", "-1"], "--prior-weight is -1"),
        (["--prior-prompts", "an <x>", "--caption", "<x>", "--train-words", "<x>"], "holds <x>"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_no_adapter(options, said, pocket_folder, pictures, tmp_path, capsys):
    words = {"--images": str(pictures), "--output": str(tmp_path / "run"), "--base": str(pocket_folder)}
    words |= {"--learn": "plain", "--caption": "{caption}", "--steps": "2", "--sample-every": "0"}
    words |= dict(zip(options[::2], options[1::2], strict=True))
    capsys.readouterr()
    assert cli.main(["train", "lora", *(word for pair in words.items() for word in pair)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfumato: ")]
    assert len(error) == 1
    assert said in error[0]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_crossing_of_no_sample_is_refused(tmp_path):
    """It would cost the base's drawings, and no step would see one."""
    from trainers.lora import Config, resolve

    family = FAMILIES["sd1"]
    base = SimpleNamespace(family=family, defaults=family.defaults, alpha_bar=range(1000))
    config = Config(images=tmp_path, output=tmp_path, learn="plain", crossed_share=0.5, max_timestep=301)
    assert resolve(config, base, data.ExampleSet(()), 1, kinds=1)
    with pytest.raises(ConfigError, match="samples are crossed from timestep 300 on, and --max-timestep 300 leaves"):
        resolve(dataclasses.replace(config, max_timestep=300), base, data.ExampleSet(()), 1, kinds=1)
