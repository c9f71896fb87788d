"""A new word in the captions, in the place of the phrase that it stands for."""

from pathlib import Path
from unicodedata import normalize

import pytest

from sfumato.data.folder import Example, ExampleSet
from sfumato.data.placeholder_captions import insert_placeholders
from sfumato.errors import DataError


@pytest.mark.parametrize("stands_for", [("otter", "sks otter"), ("sks otter", "<a>")])
def test_of_two_phrases_each_takes_its_own_place(stands_for):
    """The longer one first, and what one has become is not taken by another."""
    folder = ExampleSet((Example(Path("a.png"), f"{stands_for[1]} and {stands_for[0]}"),))
    (example,) = insert_placeholders(folder, ["<a>", "<b>"], stands_for)
    assert example.caption == "<b> and <a>"


def test_a_phrase_takes_no_place_within_another_word():
    examples = ExampleSet(tuple(Example(Path("a.png"), caption) for caption in ("a ring on a string", "a ring.")))
    captions = [example.caption for example in insert_placeholders(examples, ["<x>"], ["ring"]).examples]
    assert captions == ["a <x> on a string", "a <x>."]


def test_a_phrase_is_found_in_capitals_as_the_text_encoder_reads_it():
    folder = ExampleSet((Example(Path("a.png"), "Sks otter in fog"), Example(Path("b.png"), "a SKS otter")))
    captions = [example.caption for example in insert_placeholders(folder, ["<x>"], ["sks Otter"])]
    assert captions == ["<x> in fog", "a <x>"]


@pytest.mark.parametrize(("written", "said"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_phrase_is_found_whether_its_accents_are_apart_or_not(written, said):
    folder = ExampleSet((Example(Path("a.png"), normalize(written, "a café cat in fog")),))
    (example,) = insert_placeholders(folder, ["<x>"], [normalize(said, "café cat")])
    assert example.caption == "a <x> in fog"


def test_a_phrase_that_is_in_no_caption_is_refused_also_where_the_template_has_the_word():
    folder = ExampleSet((Example(Path("a.png"), "<x>, an otter", template="<x>, {caption}"),))
    with pytest.raises(DataError, match=r"^--stands-for 'sks otter' is in none of 1 caption, first '<x>, an otter'"):
        insert_placeholders(folder, ["<x>"], ["sks otter"])


def test_a_word_for_caption_leaves_the_place_of_the_caption_in_the_template():
    folder = ExampleSet((Example(Path("a.png"), "a caption of it", template="{caption}, caption of it"),))
    (example,) = insert_placeholders(folder, ["<x>"], ["caption"])
    assert (example.caption, example.template) == ("a <x> of it", "{caption}, <x> of it")


def test_a_caption_with_the_word_within_another_word_has_it_not():
    folder = ExampleSet((Example(Path("a.png"), "a Totoro"),))
    with pytest.raises(DataError, match="1 of 1 captions hold no placeholder"):
        insert_placeholders(folder, ["totor"])


def test_a_caption_may_spell_its_placeholder_in_capitals():
    """Samples and the card, which diffusers reads, have it in the spelling that finds all of its vectors."""
    folder = ExampleSet((Example(Path("a.png"), "an <Otter>", template="an <Otter>"),))
    (example,) = insert_placeholders(folder, ["<otter>"])
    assert (example.caption, example.template) == ("an <otter>", "an <otter>")
