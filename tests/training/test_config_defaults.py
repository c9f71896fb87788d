"""What fills the rates that a config leaves open."""

from pathlib import Path

import pytest
from sfumato.trainers import dreambooth, finetune, lora, textual_inversion

from sfumato.data import ExampleSet
from sfumato.models.loading import base_skeleton
from sfumato.training import config_defaults
from tests.tiny import CPU


def filled(trainer, **settings):
    base = base_skeleton("pocket", precision=CPU)
    config = trainer.Config(images=Path("pictures"), output=Path("run"), **settings)
    return config_defaults.resolve(config, base, ExampleSet(()), 1, learning_rate=1e-4)[0]


def test_lion_takes_smaller_steps_unless_told_otherwise():
    of_word = {"placeholder": ("<x>",)}
    for trainer, needed in ((dreambooth, {}), (finetune, {}), (lora, {}), (textual_inversion, of_word)):
        assert filled(trainer, optimizer="lion", **needed).learning_rate == 2.5e-5
        assert filled(trainer, optimizer="lion", learning_rate=3e-4, **needed).learning_rate == 3e-4


def test_muon_takes_a_rate_three_times_adamws_unless_told_otherwise():
    assert filled(lora, optimizer="muon").learning_rate == 3e-4
    assert filled(lora, optimizer="muon", learning_rate=5e-4).learning_rate == 5e-4


@pytest.mark.parametrize(
    ("trainer", "settings", "share"),
    [
        (lora, {}, 0.1),
        (dreambooth, {"method": "lora"}, 0.1),
        (dreambooth, {"method": "full"}, 0.4),
        (finetune, {}, 0.4),
    ],
)
def test_text_encoders_learn_by_a_share_of_the_unets_rate(trainer, settings, share):
    """Whole weights take small steps as it is."""
    config = filled(trainer, train_text_encoder=True, **settings)
    assert config.text_learning_rate == pytest.approx(share * 1e-4)
