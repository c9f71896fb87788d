"""ai-toolkit's sliders as configs of ours: one with targets, and its window's, with one concept and its images."""

import json

import pytest
from converting import TEDDY, written

from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.interop.recipes import convert

NETWORK = {"type": "lierla", "linear": 8, "linear_alpha": 4}
MODEL = {"name_or_path": "some/sd15"}
OLD = {
    "type": "slider",
    "network": NETWORK,
    "train": {"steps": 500, "lr": 2e-4, "max_denoising_steps": 40, "min_snr_gamma": 5.0, "batch_size": 1},
    "model": MODEL,
    "sample": {"prompts": ["a woman --m -3", "a woman --m 3"]},
    "slider": {
        "resolutions": [[512, 512]],
        "batch_full_slide": True,
        "targets": [
            {"target_class": "", "positive": "detailed", "negative": "blurry", "weight": 1.0, "shuffle": False},
            {"target_class": "cat", "positive": "a detailed cat", "negative": "a blurry cat"},
        ],
        "anchors": [{"prompt": "a dog", "neg_prompt": "", "multiplier": 1.0}],
    },
}
NEW = {
    "type": "concept_slider",
    "network": {"type": "lora", "linear": 32, "linear_alpha": 32, "conv": 16, "conv_alpha": 16},
    "train": {"steps": 300, "lr": 1e-4, "train_text_encoder": True},
    "model": MODEL,
    "datasets": [{"folder_path": str(TEDDY), "caption_dropout_rate": 0.05, "resolution": [512]}],
    "slider": {
        "guidance_strength": 4.0,
        "anchor_strength": 0.5,
        "positive_prompt": "person who is happy",
        "negative_prompt": "person who is sad",
        "target_class": "person",
        "anchor_class": "landscape",
    },
}


def of_slider(home, process, **slider):
    process = {**process, "slider": {**process["slider"], **slider}}
    text = json.dumps({"job": "train", "config": {"name": "x", "process": [process]}})
    return convert(written(home / "job.json", text), home / "mine-images.toml")


def test_targets_are_concepts_with_their_ends(home):
    training = of_slider(home, OLD)
    recipe, told = training.recipe, training.recipe.told
    assert (recipe.program, recipe.ask, training.images) == ("slider", (), None)
    assert (told["concept"], told["more"], told["less"]) == (
        ["", "cat"],
        ["detailed", "a detailed cat"],
        ["blurry", "a blurry cat"],
    )
    assert (told["prior_prompts"], told["resolution"], told["rank"], told["alpha"]) == (["a dog"], 512, 8, 4.0)
    assert (told["steps"], told["learning_rate"], told["min_snr"]) == (500, 2e-4, 5.0)
    assert not {"min_timestep", "strength", "images", "caption_dropout"} & recipe.values.keys()
    assert recipe.values["targets"] == "transformers"
    assert told["sample_prompts"] == ["a woman"]
    assert list(training.notes) == [f"prompts: --m {m} has no counterpart and is left out" for m in (-3, 3)]


def test_what_of_targets_has_no_counterpart_is_noted(home):
    targets = [{"positive": "a, b", "negative": "c", "weight": 0.5, "shuffle": True}]
    anchors = [{"prompt": "a dog", "multiplier": 0.2}]
    training = of_slider(home, OLD, targets=targets, anchors=anchors, resolutions=[[512, 768], [768, 768]])
    assert training.recipe.told["resolution"] == 627
    said = "\n".join(training.notes)
    for part in ("weight of its targets", "shuffle of its targets", "anchors: their", "resolutions = [[512, 768]"):
        assert part in said


def test_its_window_s_slider_learns_on_images_of_the_concept(home):
    training = of_slider(home, NEW)
    told = training.recipe.told
    assert (told["concept"], told["more"], told["less"]) == (["person"], ["person who is happy"], ["person who is sad"])
    assert (told["strength"], told["prior_prompts"], told["prior_weight"]) == (4.0, ["landscape"], 0.5)
    assert told["images"] == (home / "mine-images.toml").as_posix()
    assert (told["conv_rank"], "train_text_encoder" in told) == (16, False)
    assert any(note.startswith("train_text_encoder: `slider` has") for note in training.notes)
    assert of_slider(home, NEW, guidance_strength=None).recipe.usual["strength"] == 3.0


@pytest.mark.parametrize(
    ("process", "said"),
    [
        ({**OLD, "network": None}, "a slider without a network"),
        ({**OLD, "slider": {"targets": []}}, "slider: neither a positive nor a negative prompt is in it"),
        ({**NEW, "slider": {"target_class": "cat"}}, "slider: neither a positive nor a negative prompt is in it"),
    ],
)
def test_what_is_no_slider_is_refused(process, said, home):
    with pytest.raises(ConfigError, match=said):
        of_slider(home, process)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("process", [OLD, pytest.param(NEW, marks=pytest.mark.slow)])
def test_it_trains(process, home, pocket_folder):
    process = {**process, "model": {"name_or_path": str(pocket_folder)}}
    process["train"] = {**process["train"], "steps": 1}
    process.pop("sample", None)
    (home / "job.json").write_text(json.dumps({"job": "train", "config": {"name": "x", "process": [process]}}))
    assert cli.main(["recipe", str(home / "job.json"), "-o", str(home / "mine.toml")]) == 0
    words = ["--output", str(home / "run"), "--resolution", "64", "--sample-every", "0", "--measure-every", "0"]
    words += ["--drawn", "2"] if process["type"] == "slider" else []
    assert cli.main(["train", "slider", str(home / "mine.toml"), *words]) == 0
    assert (home / "run/x.safetensors").is_file()
