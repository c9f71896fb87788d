"""What is said of a picture while the pocket base learns."""

import pytest

from sfumato.pocket.captions import caption, other_caption

SHARES = {"empty_share": 0.1, "group_share": 0.06, "plain_share": 0.25}


@pytest.mark.parametrize(
    ("draw", "form", "text"),
    [
        (0.05, 0.2, ""),
        (0.12, 0.2, "a fruit, noto style"),
        (0.12, 0.7, "a fruit"),
        (0.5, 0.2, "red apple, noto style"),
        (0.5, 0.6, "a noto style picture of a red apple"),
        (0.5, 0.9, "red apple"),
    ],
)
def test_captions(draw, form, text):
    assert caption("red apple", "noto", "a fruit", draw=draw, form=form, **SHARES) == text


def test_fewer_captions_are_plain_on_request():
    told = {"draw": 0.5, **SHARES, "plain_share": 0.1}
    forms = {form: caption("crab", "flat", "an animal", form=form, **told) for form in (0.55, 0.65, 0.89, 0.91)}
    styled = "a flat style picture of a crab"
    assert forms == {0.55: "crab, flat style", 0.65: styled, 0.89: styled, 0.91: "crab"}


@pytest.mark.parametrize(
    ("draw", "form", "text"), [(0.05, 0.2, ""), (0.5, 0.2, "noto style"), (0.5, 0.6, "red heart, noto style")]
)
def test_captions_of_what_the_base_is_not_asked_for(draw, form, text):
    assert other_caption("red heart", "noto", draw=draw, form=form, empty_share=0.1) == text
