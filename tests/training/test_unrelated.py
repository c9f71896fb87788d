"""Plain things beside what is learned, in samples."""

import pytest

from sfumato.training.unrelated import UNRELATED, default_prompts


@pytest.mark.parametrize(
    ("template", "trigger", "prompts"),
    [
        (None, None, ["one", "two", "{}", "{}"]),
        (None, "zwx", ["one", "two", "{}, zwx", "{}, zwx"]),
        ("{caption} in {trigger}", "zwx", ["one", "two", "{} in zwx", "{} in zwx"]),
    ],
)
def test_samples_show_what_was_learned_and_what_was_not(template, trigger, prompts):
    expected = [*prompts[:2], *(form.format(thing) for form, thing in zip(prompts[2:], UNRELATED, strict=False))]
    assert default_prompts(["one", "two", "three"], template, trigger) == expected
    assert default_prompts(["one", "one", "three"], template, trigger) == [expected[0], *expected[2:]]
