"""Which modules a word names."""

import pytest

from sfumato.adapters.blocks import select_modules
from sfumato.errors import AdapterError

INNER = "attentions.1.transformer_blocks.0.attn2.to_k"
TARGETS = [
    ("unet", f"down_blocks.0.{INNER}"),
    ("unet", f"down_blocks.1.{INNER}"),
    ("unet", f"mid_block.{INNER}"),
    ("unet", f"up_blocks.0.{INNER}"),
    ("unet", "up_blocks.0.resnets.0.conv1"),
    ("text_encoder", "encoder.layers.1.mlp.fc1"),
    ("text_encoder_2", "text_model.encoder.layers.1.mlp.fc1"),
]


@pytest.mark.parametrize(
    ("words", "places"),
    [
        ("down", [0, 1]),
        ("down.1", [1]),
        ("mid, up.0.resnets", [2, 4]),
        ("attn2", [0, 1, 2, 3]),
        ("te", [5]),
        ("te2", [6]),
        ("unet,!up", [0, 1, 2]),
        ("!unet", [5, 6]),
        ("b-lora-style", [3]),
        ("layers.1.mlp", [5, 6]),
    ],
)
def test_words_name_runs_of_a_path(words, places):
    assert select_modules(TARGETS, words) == {TARGETS[place] for place in places}


@pytest.mark.parametrize("word", ["dwon", "down.7", "to", "attn"])
def test_a_word_that_names_nothing_is_refused(word):
    with pytest.raises(AdapterError, match="names none of the 7 modules"):
        select_modules(TARGETS, word)
