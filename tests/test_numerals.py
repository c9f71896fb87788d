"""Numbers as texts."""

import pytest

from sfumato.numerals import pluralize, shortened


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((1, "picture"), "1 picture"),
        ((0, "picture"), "0 pictures"),
        ((1200, "picture"), "1,200 pictures"),
        ((1, "image has", "images have"), "1 image has"),
        ((2, "image has", "images have"), "2 images have"),
    ],
)
def test_what_is_counted_is_in_the_plural_where_it_is_not_one(words, said):
    assert pluralize(*words) == said


def test_of_a_long_text_the_beginning_is_shown():
    assert (shortened("a" * 60), shortened("a" * 61)) == ("a" * 60, "a" * 57 + "...")
