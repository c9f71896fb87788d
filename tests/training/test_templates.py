"""Sentences around captions: a function of the place in the global batch, and none around an empty caption."""

from sfumato.runs.processes import MicroBatch
from sfumato.training.methods.caption_templates import TEMPLATES, fill_templates

SENTENCES = TEMPLATES["object"]


def test_a_sentence_depends_on_the_place_in_the_global_batch_alone():
    whole = fill_templates(["x"] * 4, SENTENCES, 0, MicroBatch(3, 8, 0, 4))
    assert whole[2:] == fill_templates(["x"] * 2, SENTENCES, 0, MicroBatch(3, 8, 2, 2))
    assert whole[2:] != whole[:2]


def test_each_step_and_each_seed_has_its_own_sentences():
    found = {
        tuple(fill_templates(["x"] * 8, SENTENCES, seed, MicroBatch(step, 8, 0, 8)))
        for seed in (0, 1)
        for step in (3, 4)
    }
    assert len(found) == 4


def test_in_time_all_sentences_come():
    found = {
        sentence
        for step in range(30)
        for sentence in fill_templates(["x"] * 8, SENTENCES, 0, MicroBatch(step, 8, 0, 8))
    }
    assert found == {sentence.format("x") for sentence in SENTENCES}


def test_a_caption_that_was_dropped_stays_empty():
    assert fill_templates(["", "x", ""], SENTENCES, 0, MicroBatch(3, 8, 0, 3))[::2] == ["", ""]


def test_without_templates_a_caption_is_as_it_was():
    assert fill_templates(["a {red} x"], TEMPLATES["none"], 0, MicroBatch(3, 8, 0, 1)) == ["a {red} x"]
