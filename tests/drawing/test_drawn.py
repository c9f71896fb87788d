"""What is said of prompts, words and files before a picture is drawn."""

import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sfumato.errors import ConfigError
from sfumato.generation.adapter_files import find_adapter
from sfumato.generation.image_options import PictureRequest
from sfumato.generation.notes import (
    base_mismatch_notes,
    misread_word_notes,
    unknown_word_notes,
    unread_syntax_notes,
    unused_word_notes,
)
from sfumato.generation.placement import AdapterPlacement
from sfumato.generation.session import DrawingSession

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


@pytest.mark.parametrize("text", ["(a:" + "1" * LONG, "[a:" + "1" * LONG, "[" + "|" * LONG, "{" + "|" * LONG])
def test_a_long_prompt_without_marks_is_read_once(text):
    assert unread_syntax_notes([text], "plain") == []


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("a (crab:1.2) b", "(crab:1.2)"),
        ("(a:b: .5 )", "(a:b: .5 )"),
        ("[a:0.4]", "[a:0.4]"),
        ("an [owl|crab|] b", "[owl|crab|]"),
        ("((a))", "((a))"),
        ("a \\( b", "\\("),
        ("a BREAK b", "BREAK"),
        ("{red|blue|}", "{red|blue|}"),
        ("an __animal__", "__animal__"),
    ],
)
def test_what_other_programs_read_as_marks_is_told(text, mark):
    (line,) = unread_syntax_notes([text], "plain")
    assert line.startswith(f"{mark} is drawn as letters")


@pytest.mark.parametrize("text", ["(a:1.)", "(a 1:2)", "(3:2)", "[a]", "{a}", "a: 1.2"])
def test_what_is_no_mark_is_not_told(text):
    assert unread_syntax_notes([text], "plain") == []


@pytest.mark.parametrize("syntax", ["a1111", "compel"])
def test_where_marks_are_read_they_are_not_told(syntax):
    assert unread_syntax_notes(["a (crab:1.2) BREAK"], syntax) == []
    assert unread_syntax_notes(["a {red|blue} crab"], syntax) != []


def test_a_word_is_loaded_whatever_its_capitals_and_zero_layers_are_a_setting(base):
    base.tokenizers[0]._sfumato_words = [SimpleNamespace(tokens=["<Otter>"])]
    told = {"sfumato.config": json.dumps({"train_words": ["<oTTER>", "<fox>"], "clip_skip": 0})}
    (line,) = base_mismatch_notes({"line": told}, base)
    assert line.startswith("line: its word <fox> is not loaded")
    base.clip_skip = 1
    assert "line: learned with --clip-skip 0, and drawn with 1." in base_mismatch_notes({"line": told}, base)


def test_on_a_sheet_seeds_are_told_where_there_are_several():
    def labels(*seeds):
        pictures = [PictureRequest("a crab", seed, None, {}) for seed in seeds]
        return DrawingSession(None, None, pictures, {}, None, None, AdapterPlacement(), {}).labels()

    assert labels(1, 2) == ["a crab (1)", "a crab (2)"]
    assert labels(1, 1) == ["a crab"] * 2


@pytest.mark.parametrize(("learned", "drawn", "told"), [("v", "epsilon", True), ("epsilon", "epsilon", False)])
def test_an_adapter_of_a_base_that_predicts_otherwise_is_told(learned, drawn, told, base):
    base.prediction_type = drawn
    lines = base_mismatch_notes({"line": {"modelspec.prediction_type": learned, "sfumato.clip_skip": "0"}}, base)
    assert [line.endswith("--prediction-type v_prediction draws as it was learned.") for line in lines] == [True] * told


def test_a_word_of_the_bases_own_vocabulary_needs_no_file(base):
    base.tokenizers[0].get_vocab = lambda: {"<own>": 3}
    assert unknown_word_notes(["an <own> crab"], [], base) == []


def adapter_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.ones(1)}, folder / name)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["caf\u00e9", "cafe\u0301"])
def test_a_tag_names_a_file_however_accents_are_written(form, name, tmp_path):
    file = f"{unicodedata.normalize(form, name)}.safetensors"
    adapter_files(tmp_path, file)
    assert find_adapter(name, tmp_path) == tmp_path / file


def test_a_tag_names_the_nearest_of_several_files_or_none(tmp_path):
    adapter_files(tmp_path, "line.safetensors", "a/line.safetensors", "a/pen.safetensors", "b/pen.safetensors")
    adapter_files(tmp_path, "my line, v2, .safetensors")
    assert find_adapter("line", tmp_path) == tmp_path / "line.safetensors"
    assert find_adapter("my line v2", tmp_path) == tmp_path / "my line, v2, .safetensors"
    assert find_adapter("pen", tmp_path / "b") == tmp_path / "b/pen.safetensors"
    with pytest.raises(ConfigError, match="<lora:pen>: 2 files are called that"):
        find_adapter("pen", tmp_path)
    with pytest.raises(ConfigError, match="<lora:ink>: no file is called that"):
        find_adapter("ink", tmp_path)


def test_words_that_no_file_brings_are_told(base):
    lines = unknown_word_notes(["<" + "a" * LONG, "<otter> <-> <fox> <otter> <a b>"], ["<fox>"], base)
    assert [line.split(":")[0] for line in lines] == ["<otter>"]


def test_two_pairs_of_angle_brackets_may_be_one_word(base):
    lines = unknown_word_notes(["a <s0><s1> dog, <S0><S1>", "<otters> <s0>"], ["<s0><s1>", "otter"], base)
    assert [line.split(":")[0] for line in lines] == ["<otters>", "<s0>"]


def test_what_a_file_says_does_not_reach_the_terminal(base):
    told = {"l": {"sfumato.config": json.dumps({"clip_skip": HOSTILE, "steps": 1, "train_words": [HOSTILE]})}}
    lines = base_mismatch_notes(told, base)
    lines += unused_word_notes([(Path("a.pt"), [HOSTILE])], ["a"], "plain")
    lines += misread_word_notes([f"({HOSTILE})"], [f"({HOSTILE})"], "a1111")
    lines += unknown_word_notes([f"<{HOSTILE}>"], [], base)
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)


def test_a_config_that_cannot_be_read_says_nothing(base):
    assert base_mismatch_notes({"l": {"sfumato.config": "[" * LONG}}, base) == []
