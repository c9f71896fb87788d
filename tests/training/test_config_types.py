"""A config that is made in Python has the types that its fields declare, or is refused in one line."""

from pathlib import Path

import numpy as np
import pytest
from sfumato.pipelines import clash, convert, extract, generate, grid, merge, resize, verify
from sfumato.trainers import dreambooth, lora, textual_inversion

from sfumato.errors import ConfigError

GIVEN = {"images": Path("pictures"), "output": Path("run")}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"schedule": "Cosine"}, 'schedule is \'Cosine\'; wanted one of "constant", "cosine", "linear"'),
        ({"optimizer": "x"}, "optimizer is 'x'; wanted one of "),
        ({"steps": "3"}, "steps is '3'; wanted a whole number."),
        ({"steps": 2.5}, "steps is 2.5; wanted a whole number."),
        ({"rank": True}, "rank is True; wanted a whole number."),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4'; wanted a number."),
        ({"train_text_encoder": "no"}, "train_text_encoder is 'no'; wanted true or false."),
        ({"seed": None}, "seed is None; wanted a whole number."),
        ({"trigger": 5}, "trigger is 5; wanted a text."),
        ({"prior_prompts": ("a cat", 5)}, "prior_prompts is ('a cat', 5); wanted a text."),
        ({"over_steps": (0, 0.8)}, "over_steps is (0, 0.8); wanted a text."),
        ({"images": None}, "images is None; wanted a path."),
    ],
)
def test_another_type_is_one_line(given, said):
    with pytest.raises(ConfigError) as refused:
        lora.Config(**{**GIVEN, **given})
    assert str(refused.value).startswith(said)


def test_what_is_of_its_type_or_stands_for_it_is_taken():
    config = lora.Config(images="pictures", output="run", steps=np.int64(3), alpha=np.float32(0.5), clip=1)
    assert (config.images, config.steps, config.alpha, config.clip) == (Path("pictures"), 3, 0.5, 1)
    assert type(config.steps) is int
    assert lora.Config(**GIVEN, prior_prompts="a cat").prior_prompts == ("a cat",)
    assert lora.Config(**GIVEN, max_tokens=150, rank=None).max_tokens == 150
    assert dreambooth.Config(**GIVEN, class_images="dogs").class_images == Path("dogs")
    assert lora.Config(**GIVEN, base=Path("models") / "sd15").base == str(Path("models", "sd15"))


def test_programs_that_python_calls_take_texts_for_paths_and_paths_for_texts():
    output = {"output": "mix.safetensors"}
    for config in (
        merge.Config([Path("a.safetensors")], **output),
        merge.Config(Path("a.safetensors"), **output),
        convert.Config("a.safetensors", **output),
        resize.Config("a.safetensors", **output),
        extract.Config(Path("tuned"), base=Path("base"), **output),
        clash.Config("a.safetensors", **output),
        generate.Config("a cat", lora=[Path("a.safetensors")], **output),
        grid.Config(x="seed=1,2", lora=Path("a.safetensors"), **output),
    ):
        assert config.output == Path("mix.safetensors")
    assert generate.Config("a cat", seed=np.int64(3)).seed == generate.Config("a cat", seed=[3]).seed == (3,)
    assert generate.Config("a cat", seed=range(3)).seed == (0, 1, 2)
    assert verify.Config("a.safetensors", "b.safetensors").against == Path("b.safetensors")
    assert merge.Config(Path("a.safetensors")).adapters == ("a.safetensors",)
    assert extract.Config(Path("tuned"), base=Path("base"), **output).base == "base"
    with pytest.raises(ConfigError, match="method is 'tie'; wanted one of "):
        merge.Config("a.safetensors", method="tie")


@pytest.mark.parametrize("given", [None, {"images": "pictures"}, lora.Config])
def test_a_training_wants_a_config(given):
    with pytest.raises(ConfigError, match="train wants a Config of its own module"):
        lora.train(given)


def test_a_training_refuses_the_config_of_another():
    config = textual_inversion.Config(**GIVEN, placeholder="<x>")
    with pytest.raises(ConfigError) as refused:
        lora.train(config)
    assert str(refused.value) == (
        "train of sfumato.trainers.lora wants a Config of its own module; got one of "
        "sfumato.trainers.textual_inversion, which has no algo."
    )
