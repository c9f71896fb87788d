"""Settings by another hand: no option, no command to the terminal, no number that cannot be meant, no long wait."""

import json
import shlex

import pytest
from sfumato.pipelines.generate import Config

from sfumato.config import parse
from sfumato.errors import DataError
from sfumato.generation.metadata.other_tools import read_invoke
from sfumato.generation.metadata.redraw import redraw, render
from tests.drawing.foreign import FROM_INVOKE, picture_of_invoke, picture_with

LONG = 100_000  # letters, of which the square is minutes
HUGE = 10**400
NEAR = int("9" * 4300)  # JSON's longest whole number, and one more is not written


@pytest.mark.parametrize(
    "own",
    [
        {"prompt": 3},
        {"adapters": [{}]},
        {"adapters": [{"label": "a", "weight": "x"}]},
        {"adapters": [{"label": "a", "file": "b", "weight": 10**400}]},
        {"switch": {"every": "--overwrite"}},
    ],
)
def test_our_json_by_another_hand_is_left_aside(own, tmp_path):
    text = "a crab\nSteps: 4, Seed: 1, CFG scale: 7"
    found = redraw(picture_with(text, tmp_path / "a.png", own))
    assert found.words == redraw(picture_with(text, tmp_path / "b.png")).words


def test_long_settings_without_a_colon_are_read_once(tmp_path):
    """Both were read in the square of their length."""
    text = (
        f"a <lora:b:1>\nSteps: 4, Seed: 1, Version: sfumato-1, TI hashes: {'a' * LONG}, Adapter guidance: {'b' * LONG}"
    )
    found = redraw(picture_with(text, tmp_path / "a.png"))
    assert found.words[-2:] == ("--adapter-guidance", "b=0")


def test_long_brackets_of_an_old_picture_of_invokeai_are_read_once():
    found = read_invoke(json.dumps({"image": {"prompt": "a [fog] " + "[" * LONG}}))
    assert (found.prompt, found.negative) == ("a  " + "[" * LONG, "fog")


@pytest.mark.parametrize("name", ["Steps", "CFG scale", "Seed", "Size", "Clip skip", "Denoising strength"])
@pytest.mark.parametrize("value", ["--output=/home/me/.bashrc", "much", "9" * 5000, "nan"])
def test_a_number_that_is_none_is_told_and_not_taken(name, value, tmp_path):
    text = f"a crab\nModel: a, Sampler: Euler, RNG: CPU, {name}: {value}"
    found = redraw(picture_with(text, tmp_path / "a.png"))
    assert found.left_out == ((name, value),)
    assert not [word for word in found.words if value in word]


@pytest.mark.parametrize(
    "text",
    [
        "Model: --overwrite, VAE: --overwrite, Denoising strength: 0.5, Seed: -3",
        'Version: sfumato-1, Model: --overwrite, TI hashes: "--overwrite: ab", Prompt syntax: --overwrite',
    ],
)
def test_a_hostile_setting_is_no_option(text, tmp_path):
    own = {
        "image": "--overwrite",
        "embeddings": ["--overwrite"],
        "adapters": [{"label": "-x", "file": "y", "weight": 1}],
    }
    for each in (None, own, {"prompt_syntax": "--overwrite"}):
        found = redraw(picture_with(f"a crab\nSteps: 4, {text}", tmp_path / "a.png", each))
        config = parse(Config, found.words[2:], program="generate")
        assert not config.overwrite
        assert config.base.startswith("--overwrite")


def test_what_no_terminal_shows_is_told(tmp_path):
    found = redraw(picture_with("a crab\u202e\nSteps: 4, Seed: 1, CFG scale: 7, RNG: CPU", tmp_path / "a.png"))
    assert found.words[2] == "a crab "
    assert [name for name, _ in found.left_out] == ["characters"]


@pytest.mark.parametrize(("name", "value"), [("precision", "--overwrite"), ("overwrite", True), ("partial", [1])])
def test_only_options_of_the_base_with_values_that_they_have_are_taken(name, value, tmp_path):
    found = redraw(picture_with("a\nSteps: 4, Seed: 1, CFG scale: 7", tmp_path / "a.png", {"options": {name: value}}))
    assert not {"--overwrite", "--partial", "--precision"} & {*found.words}


def of_comfy(**inputs):
    sampler = {"sampler_name": "euler", "positive": ["2", 0], "model": ["3", 0]}
    return {"1": {"inputs": sampler}, "2": {"inputs": {"text": "a crab"}}, "3": {"inputs": inputs}}


@pytest.mark.parametrize(
    ("key", "about"),
    [
        ("prompt", of_comfy(lora_name="line", strength_model=HUGE)),
        ("prompt", {"1": {"inputs": {"sampler_name": "a", "positive": ["2", 0], "negative": ["3", 0]}},
                    "2": {"inputs": {"text": "a crab"}}, "3": {"inputs": {"text": 3}}}),
        ("invokeai_metadata", FROM_INVOKE | {"loras": [{"model": {"name": "line"}, "weight": HUGE}]}),
        ("invokeai_metadata", FROM_INVOKE | {"clip_skip": NEAR}),
    ],
)  # fmt: skip
def test_numbers_and_types_that_cannot_be_meant_make_a_picture_that_is_not_understood(key, about, tmp_path):
    with pytest.raises(DataError, match=r"^a\.png: an image without settings as A1111"):
        redraw(picture_of_invoke(about, tmp_path / "a.png", key))


def test_a_hostile_prompt_is_no_option_and_does_not_reach_the_terminal(tmp_path):
    text = "--overwrite '; rm a\x1b[2J\nb\nNegative prompt: --x\nSteps: 4, Seed: 1, CFG scale: 7"
    found = redraw(picture_with(text, tmp_path / "a.png"))
    config = parse(Config, found.words[2:], program="generate")
    assert (config.prompts, config.negative) == (("--overwrite '; rm a [2J b",), "--x")
    assert not config.overwrite
    assert shlex.split(render(found).splitlines()[-1]) == list(found.words)
