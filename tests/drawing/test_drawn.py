"""What is said of prompts, words and files before a picture is drawn."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sfumato.drawing.notes import learned_otherwise, misread_words, unknown_words, unread_marks, unused_words

LONG = 100_000  # letters, of which the square is minutes
HOSTILE = "otter\x1b[2J\x07"


@pytest.fixture
def base():
    tokenizer = SimpleNamespace(get_vocab=dict)
    return SimpleNamespace(
        name="pocket",
        tokenizers=[tokenizer],
        clip_skip=None,
        prediction_type="epsilon",
        is_another_release=lambda metadata: False,
    )


@pytest.mark.parametrize("text", ["(a:" + "1" * LONG, "[a:" + "1" * LONG, "{" + "|" * LONG])
def test_a_long_prompt_without_marks_is_read_once(text):
    assert unread_marks([text], "plain") == []


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("a (crab:1.2) b", "(crab:1.2)"),
        ("(a:b: .5 )", "(a:b: .5 )"),
        ("[a:0.4]", "[a:0.4]"),
        ("((a))", "((a))"),
        ("a \\( b", "\\("),
        ("a BREAK b", "BREAK"),
        ("{red|blue|}", "{red|blue|}"),
        ("an __animal__", "__animal__"),
    ],
)
def test_what_other_programs_read_as_marks_is_told(text, mark):
    (line,) = unread_marks([text], "plain")
    assert line.startswith(f"{mark} is drawn as letters")


@pytest.mark.parametrize("text", ["(a:1.)", "(a 1:2)", "(3:2)", "[a]", "{a}", "a: 1.2"])
def test_what_is_no_mark_is_not_told(text):
    assert unread_marks([text], "plain") == []


@pytest.mark.parametrize("syntax", ["a1111", "compel"])
def test_where_marks_are_read_they_are_not_told(syntax):
    assert unread_marks(["a (crab:1.2) BREAK"], syntax) == []
    assert unread_marks(["a {red|blue} crab"], syntax) != []


def test_a_word_is_loaded_whatever_its_capitals_and_zero_layers_are_a_setting(base):
    base.tokenizers[0]._sfumato_words = [SimpleNamespace(tokens=["<Otter>"])]
    told = {"sfumato.config": json.dumps({"train_words": ["<oTTER>", "<fox>"], "clip_skip": 0})}
    (line,) = learned_otherwise({"line": told}, base)
    assert line.startswith("line: its word <fox> is not loaded")
    base.clip_skip = 1
    assert "line: learned with --clip-skip 0, and drawn with 1." in learned_otherwise({"line": told}, base)


def test_words_that_no_file_brings_are_told(base):
    lines = unknown_words(["<" + "a" * LONG, "<otter> <-> <fox> <otter> <a b>"], ["<fox>"], base)
    assert [line.split(":")[0] for line in lines] == ["<otter>"]


def test_what_a_file_says_does_not_reach_the_terminal(base):
    told = {"l": {"sfumato.config": json.dumps({"clip_skip": HOSTILE, "steps": 1, "train_words": [HOSTILE]})}}
    lines = learned_otherwise(told, base)
    lines += unused_words([(Path("a.pt"), [HOSTILE])], ["a"], "plain")
    lines += misread_words([f"({HOSTILE})"], [f"({HOSTILE})"], "a1111")
    lines += unknown_words([f"<{HOSTILE}>"], [], base)
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)


def test_a_config_that_cannot_be_read_says_nothing(base):
    assert learned_otherwise({"l": {"sfumato.config": "[" * LONG}}, base) == []
