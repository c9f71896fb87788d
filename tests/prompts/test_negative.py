"""Which prompts have the negative prompt that a file asks for."""

import pytest

from sfumato.prompts.negative import negative_for


@pytest.mark.parametrize(
    ("prompt", "asked", "negative"),
    [
        ("<otter>, flat style", ["<otter>"], "<otter>"),
        ("a Sks Otter on the beach", ["sks otter"], "sks otter"),
        ("<otter>", ["<otter>"], ""),  # guidance would have nothing to go on
        ("an <otter>, the.", ["<otter>"], ""),
        ("a crab, flat style", ["<otter>"], ""),
        ("sks otters, flat style", ["sks otter"], ""),
        ("<otter> and <cat>", ["<otter>", "<cat>", "<otter>", "<dog>", ""], "<otter>, <cat>"),
        ("a crab", [], ""),
    ],
)
def test_a_text_counts_where_the_prompt_holds_it_and_says_more(prompt, asked, negative):
    assert negative_for(prompt, asked) == negative
