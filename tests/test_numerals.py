"""Numbers as texts."""

import pytest

from sfumato.utils.formatting import format_duration, pluralize, truncate_text


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
    assert (truncate_text("a" * 60), truncate_text("a" * 61)) == ("a" * 60, "a" * 57 + "...")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0123, "0.012 s"),
        (0.3, "0.3 s"),
        (9.44, "9.4 s"),
        (9.6, "10 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (89 * 60, "89 min"),
        (90 * 60, "1.5 h"),
        (260_000, "72.2 h"),
    ],
)
def test_a_time_is_said_in_the_unit_that_one_would_say_it_in(seconds, said):
    assert format_duration(seconds) == said
