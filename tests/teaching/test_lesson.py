"""Style, subject or word: the rule, on names, captions and file names."""

import pytest

from sfumato.errors import ConfigError
from sfumato.training.teach.lesson import lesson_of, named_pictures, own_identifier, slug_of, unseen_prompts

THINGS = ["bug", "camel", "red-apple", "lion", "hot-dog", "violin", "trophy", "grapes"]
FLAMINGO = ["sks flamingo, flat style", "sks flamingo, noto style", "sks flamingo, twemoji style"]


def pictures(captions=None, stems=None):
    captions = captions or [""] * len(stems)
    return named_pictures(captions, stems or [f"IMG_{number:04d}" for number in range(len(captions))])


@pytest.mark.parametrize(
    ("name", "of", "kind", "trigger"),
    [
        ("line", pictures(stems=THINGS), "style", ""),
        ("line style", pictures(stems=["00", "01"]), "style", ""),
        ("zwx", pictures(["a crab, zwx style", "an owl in zwx style"]), "style", ""),
        ("flamingo", pictures(FLAMINGO), "subject", "sks flamingo"),
        ("my flamingo", pictures(FLAMINGO), "subject", "sks flamingo"),
        ("sks flamingo", pictures(FLAMINGO), "subject", "sks flamingo"),
        ("zwx dog", pictures(["zwx dog on a beach", "a photo of zwx dog"]), "subject", "zwx dog"),
        ("dog", pictures(stems=["dog-01", "dog-02", "my dog"]), "subject", "sks dog"),
        ("<otter>", pictures(stems=["00", "01"]), "word", "<otter>"),
    ],
)
def test_the_name_and_what_pictures_are_called_tell_what_is_taught(name, of, kind, trigger):
    lesson = lesson_of(name, of, None)
    assert (lesson.kind, lesson.trigger) == (kind, trigger)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("rex", pictures(stems=["00", "01", "02"])),  # numbers say nothing
        ("otter", pictures(stems=["noto", "flat", "twemoji", "openmoji"])),  # one thing by four hands, or four things
        (
            "rex",
            pictures(stems=[f"dog {place}" for place in THINGS]),
        ),
        ("ink", pictures(stems=[*THINGS[:-1], "IMG_0001"])),
    ],
)
def test_what_cannot_be_told_is_not_guessed(name, of):
    assert lesson_of(name, of, None) is None
    assert lesson_of(name, of, "subject").kind == "subject"


def test_a_word_stands_for_what_all_captions_say():
    assert lesson_of("flamingo", pictures(FLAMINGO), "word").of_class == "sks flamingo"
    assert lesson_of("<bird>", pictures(FLAMINGO), None).of_class == "bird"


def test_the_word_that_captions_have_before_the_class_is_found():
    of = pictures(["ohwx dog on a beach", "ohwx dog"])
    lesson = lesson_of("dog", of, None)
    assert own_identifier(lesson, of) == "ohwx"
    assert own_identifier(lesson_of("flamingo", pictures(FLAMINGO), None), pictures(FLAMINGO)) == ""


def test_the_sheet_asks_for_nothing_that_was_trained():
    style = lesson_of("line", pictures(stems=[*THINGS, "crab", "owl"]), None)
    assert not {"crab", "owl"} & set(unseen_prompts(style, [*THINGS, "crab", "owl"], "pocket"))
    subject = lesson_of("flamingo", pictures(FLAMINGO), None)
    prompts = unseen_prompts(subject, FLAMINGO, "pocket", ["penguin"])
    assert prompts[:2] == ["sks flamingo", "sks flamingo, blob style"]
    assert not {*FLAMINGO, "penguin"} & set(prompts)
    every = ["crab", "penguin", "bus", "guitar", "owl", "castle", "tulip", "cat", "teapot", "train", "snail", "key"]
    assert len(unseen_prompts(style, every, "pocket")) == 5


def test_a_name_becomes_a_folder_on_every_system():
    assert [slug_of(name) for name in ("Line Style", "<otter>", 'a:b/c\\d"', "été")] == [
        "line-style", "otter", "a-b-c-d", "été",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="no letter"):
        slug_of("??")
