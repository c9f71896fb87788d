"""Plain things beside what is learned, in samples."""

import pytest

from sfumato.training.loss.validation import UNRELATED, default_prompts, recognizable_first, unrelated_to


@pytest.mark.parametrize(
    ("template", "trigger", "prompts"),
    [
        (None, None, ["one", "two", "{}", "{}"]),
        (None, "zwx", ["one", "two", "{}, zwx", "{}, zwx"]),
        ("{caption} in {trigger}", "zwx", ["one", "two", "{} in zwx", "{} in zwx"]),
    ],
)
def test_samples_show_what_was_learned_and_what_was_not(template, trigger, prompts):
    expected = [
        *prompts[:2],
        *(form.format(thing) for form, thing in zip(prompts[2:], ("a dog", "a car"), strict=True)),
    ]
    assert default_prompts(["one", "two", "three"], template, trigger) == expected
    assert default_prompts(["one", "one", "three"], template, trigger) == [expected[0], *expected[2:]]


def test_samples_show_first_what_any_base_draws_and_never_what_is_learned():
    assert recognizable_first(unrelated_to(["a sks dog"]))[:2] == ["a car", "a tree"]
    assert recognizable_first(["a ball", "a cup"]) == ["a ball", "a cup"]
    assert sorted(recognizable_first(UNRELATED)) == sorted(UNRELATED)
