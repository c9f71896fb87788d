"""Which prompts have the negative prompt that a file asks for."""

import pytest

from sfumato.models.prompts.syntax import negative_for


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
        ("(an otter:1.3)", ["otter"], ""),  # weights, and what parts a prompt, say nothing either
        ("[otter:0.4] BREAK", ["otter"], ""),
        ("(otter)1.3", ["otter"], ""),
        ("(an otter:1.3), break", ["otter"], "otter"),
        ("カワウソ otter", ["otter"], "otter"),
    ],
)
def test_a_text_counts_where_the_prompt_holds_it_and_says_more(prompt, asked, negative):
    assert negative_for(prompt, asked) == negative


def test_a_text_with_brackets_is_found_as_the_syntax_writes_it():
    assert negative_for(r"a \(o\) crab", ["(o)"], "a1111") == r"\(o\)"
    assert negative_for("a (o) crab", ["(o)"]) == "(o)"
