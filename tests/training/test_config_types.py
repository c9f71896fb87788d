"""A config that is made in Python has the types that its fields declare, or is refused in one line."""

from pathlib import Path

import numpy as np
import pytest
from sfumato.trainers import dreambooth, lora

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


@pytest.mark.parametrize("given", [None, {"images": "pictures"}, lora.Config])
def test_a_training_wants_a_config(given):
    with pytest.raises(ConfigError, match="train wants a Config of its own module"):
        lora.train(given)
