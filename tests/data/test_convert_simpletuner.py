"""SimpleTuner's data backends as a dataset.toml."""

import json
import tomllib

import pytest
from made_up import noise_picture
from sfumato.pipelines.dataset_config import main

from sfumato.data import read_folder
from sfumato.errors import ConfigError
from sfumato.interop.datasets import convert

DOGS = {
    "id": "dogs-512",
    "type": "local",
    "dataset_type": "image",
    "instance_data_dir": "dogs",
    "crop": True,
    "crop_style": "random",
    "crop_aspect": "preserve",
    "minimum_image_size": 128,
    "maximum_image_size": 1024,
    "target_downsample_size": 768,
    "resolution": 512,
    "resolution_type": "pixel_area",
    "repeats": 4,
    "metadata_backend": "discovery",
    "caption_strategy": "textfile",
    "prepend_instance_prompt": True,
    "instance_prompt": "photo of",
    "caption_shuffle": {"enable": True, "count": 3, "position_start": 1},
    "cache_dir_vae": "cache/vae-512",
    "text_embeds": "texts",
    "probability": 1.0,
    "start_epoch": 1,
    "vae_cache_clear_each_epoch": True,
    "disabled": False,
}
CLASS = {
    "id": "class",
    "instance_data_dir": "others",
    "caption_strategy": "instanceprompt",
    "instance_prompt": "dog",
    "repeats": 0,
    "is_regularisation_data": True,
}
CACHES = [
    {"id": "texts", "dataset_type": "text_embeds", "default": True, "type": "local", "cache_dir": "cache/text"},
    {"id": "latents", "dataset_type": "image_embeds", "type": "local"},
]
NAMED = {"id": "dogs", "instance_data_dir": "dogs", "caption_strategy": "textfile"}


@pytest.fixture
def home(tmp_path):
    for name in ("dogs/a", "dogs/more/b", "others/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_picture().save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"sks dog, {name[-1]}")
    return tmp_path


def converted(home, *backends):
    """What a list of these becomes: (its sources, its notes)."""
    (home / "multidatabackend.json").write_text(json.dumps(backends))
    result = convert(home / "multidatabackend.json", home / "dataset.toml")
    (home / "dataset.toml").write_text(result.text)
    assert result.tool == "SimpleTuner"
    *notes, elsewhere = result.notes
    assert elsewhere == "caption_dropout_probability is not in this file but in config.json: --caption-dropout"
    return tomllib.loads(result.text)["source"], notes


def learned(home):
    """(picture, caption, how often an epoch holds it) of each that the written file names."""
    return [(each.path.name, each.caption, each.repeats) for each in read_folder(home / "dataset.toml")]


def test_data_backends_become_sources_with_all_that_they_say(home):
    """4 repeats there are 5 times, 0 are once."""
    sources, notes = converted(home, DOGS, CLASS, *CACHES)
    dogs = {"repeats": 5, "caption": "photo of {caption}", "shuffle_tags": True, "keep_tags": 1, "crop": "random"}
    assert sources == [
        {"path": "dogs", **dogs, "resolution": 512},
        {"path": "dogs/more", **dogs, "resolution": 512},
        {"path": "others", "class": True, "caption": "dog"},
    ]
    assert [note.partition(":")[0] for note in notes] == [
        "caption_shuffle.count = 3",
        "target_downsample_size = 768",
        "minimum_image_size = 128",
        "cache_dir_vae = cache/vae-512",
        "class",
    ]
    assert "--prior-prompts" in notes[-1]
    assert learned(home) == [
        ("a.png", "photo of sks dog, a", 5),
        ("b.png", "photo of sks dog, b", 5),
        ("d.png", "dog", 1),
    ]


def test_nothing_is_said_of_a_plain_one(home):
    assert converted(home, NAMED, *CACHES) == ([{"path": "dogs"}, {"path": "dogs/more"}], [])


@pytest.mark.parametrize(
    ("own", "captions"),
    [
        ({"caption_strategy": "textfile"}, ["sks dog, a", "sks dog, b"]),
        ({"caption_strategy": "instanceprompt", "instance_prompt": " sks "}, ["sks", "sks"]),
        ({"caption_strategy": "textfile", "only_instance_prompt": True, "instance_prompt": "sks"}, ["sks", "sks"]),
    ],
)
def test_captions_come_from_where_the_strategy_says(own, captions, home):
    converted(home, {**NAMED, **own})
    assert [caption for _, caption, _ in learned(home)] == captions


@pytest.mark.parametrize("own", [{"caption_strategy": "filename"}, {"caption_strategy": None}])
def test_captions_come_from_names_of_files(own, home):
    """Which they do there where nothing is said."""
    for text in home.glob("dogs/**/*.txt"):
        text.unlink()
    (home / "dogs" / "a.png").rename(home / "dogs" / "sks_dog.png")
    _, notes = converted(home, {**NAMED, **own})
    assert [caption for _, caption, _ in learned(home)] == ["sks dog", "b"]
    assert any("move it away" in note for note in notes)
    assert any("no caption_strategy" in note for note in notes) == (own["caption_strategy"] is None)
    converted(home, {**NAMED, **own, "prepend_instance_prompt": True, "instance_prompt": "a"})
    assert [caption for _, caption, _ in learned(home)] == ["a sks dog", "a b"]


def test_several_prompts_come_equally_often(home):
    prompts = {**CLASS, "instance_prompt": ["a dog", "dog"], "is_regularisation_data": False}
    _, notes = converted(home, prompts, NAMED)
    assert learned(home) == [
        *(("d.png", "a dog", 1), ("d.png", "dog", 1)),
        *(("a.png", "sks dog, a", 2), ("b.png", "sks dog, b", 2)),
    ]
    assert notes == ["repeats are whole numbers, so that an epoch here is 2 of SimpleTuner's"]


@pytest.mark.parametrize(
    ("shuffle", "own", "keys", "note"),
    [
        ({"enable": False, "position_start": 2}, {}, {}, ""),
        ({"enable": True}, {}, {"shuffle_tags": True}, "caption_shuffle.count = 1: tags come in a new order"),
        (
            {"enable": True, "split_on": "period", "position_start": 2},
            {},
            {"shuffle_tags": True, "keep_tags": 2, "separator": "."},
            "caption_shuffle.count",
        ),
        ({"enable": True, "split_on": "space"}, {}, {}, "words are not shuffled here"),
        (
            {"enable": True},
            {"prepend_instance_prompt": True, "instance_prompt": "sks"},
            {"caption": "sks {caption}", "shuffle_tags": True, "keep_tags": 1},
            "the first tag stays behind instance_prompt",
        ),
    ],
)
def test_tags_are_shuffled_as_there_or_a_note_says_how_not(shuffle, own, keys, note, home):
    sources, notes = converted(home, {**NAMED, **own, "caption_shuffle": shuffle})
    assert sources[0] == {"path": "dogs", **keys}
    assert note in "\n".join(notes)
    assert bool(notes) == bool(note)


@pytest.mark.parametrize(
    ("own", "crop", "notes"),
    [
        ({"crop_style": "random"}, None, []),
        ({"crop": True, "crop_aspect": "preserve", "crop_style": "centre"}, None, []),
        ({"crop": True, "crop_aspect": "preserve"}, "random", []),
        ({"crop": True, "crop_style": "face"}, None, ["crop_aspect = square", "crop_style = face"]),
    ],
)
def test_crops_are_as_near_as_they_can_be(own, crop, notes, home):
    sources, said = converted(home, {**NAMED, **own})
    assert sources[0].get("crop") == crop
    assert [note.partition(":")[0] for note in said] == notes


@pytest.mark.parametrize(
    ("own", "note"),
    [
        ({"resolution": 1.0, "resolution_type": "area"}, "resolution = 1.0, area: --resolution 1024"),
        ({"resolution": 0.25, "resolution_type": "area"}, "resolution = 0.25, area: --resolution 512"),
        ({"resolution": 512, "resolution_type": "pixel"}, "--resolution 512, which is by area here"),
        ({"minimum_image_size": 512}, "minimum_image_size = 512: smaller images are enlarged"),
        ({"maximum_aspect_ratio": 2.0}, "maximum_aspect_ratio = 2.0: such images are left in"),
        ({"probability": 0.5}, "probability = 0.5: sources come in shuffled order"),
        ({"max_num_samples": 1}, "max_num_samples = 1: all images are learned"),
        ({"start_step": 300}, "start_step = 300: every source"),
        ({"end_epoch": 1}, "end_epoch = 1: every source"),
        ({"delete_unwanted_images": True}, "nothing is deleted here"),
        ({"slider_strength": -0.5}, "slider_strength = -0.5: has no counterpart"),
        ({"conditioning": {"type": "canny"}}, "has no counterpart"),
        ({"caption_strategy": "parquet"}, "caption_strategy = parquet: list the captions in metadata.jsonl"),
    ],
)
def test_what_is_not_carried_over_is_named(own, note, home):
    _, notes = converted(home, {**NAMED, **own})
    assert len(notes) == 1
    assert note in notes[0]


def test_of_captions_of_several_lines_a_sample_takes_one(home):
    (home / "dogs" / "a.txt").write_text("a dog\na cat\n")
    sources, notes = converted(home, NAMED)
    assert sources[0]["caption_lines"] is True
    assert notes == []
    sources, notes = converted(home, {**NAMED, "disable_multiline_split": True})
    assert "caption_lines" not in sources[0]
    assert notes == []


def test_a_set_for_evaluation_is_held_out(home):
    sources, _ = converted(home, NAMED, {**NAMED, "id": "x", "instance_data_dir": "others", "dataset_type": "eval"})
    assert [(source["path"], source.get("validation")) for source in sources] == [
        ("dogs", None),
        ("dogs/more", None),
        ("others", True),
    ]


@pytest.mark.parametrize(
    ("own", "note"),
    [
        ({"disabled": True}, "x: is disabled"),
        ({"disable": True}, "x: is disabled"),
        ({"probability": 0}, "x: probability = 0"),
        ({"dataset_type": "conditioning", "conditioning_type": "mask"}, "x: holds masks; move them as PNG to masks/"),
        ({"dataset_type": "conditioning"}, "x: is for conditioning by controlnet"),
        ({"dataset_type": "video"}, "x: dataset_type = video: images only"),
        ({"type": "huggingface", "dataset_name": "a/b"}, "x: type = huggingface: its images are in no folder"),
        (
            {"dataset_type": "text_embeds", "caption_filter_list": ["arafed"]},
            "x: caption_filter_list: captions are not filtered",
        ),
    ],
)
def test_what_is_not_trained_from_here_is_left_out_and_said(own, note, home):
    sources, notes = converted(home, NAMED, {"id": "x", "instance_data_dir": "others", **own})
    assert [source["path"] for source in sources] == ["dogs", "dogs/more"]
    assert len(notes) == 1
    assert notes[0].startswith(note)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([{"id": "x"}], "x: has no instance_data_dir"),
        ([{**NAMED, "repeats": -1}], "dogs: repeats is -1; wanted 0, which is once, or more"),
        ([{**NAMED, "repeats": "often"}], "repeats is 'often'; wanted a whole number"),
        ([{**NAMED, "repeats": True}], "repeats is True; wanted a whole number"),
        ([{**NAMED, "caption_strategy": "instance_prompt"}], "caption_strategy is 'instance_prompt'; wanted textfile"),
        ([{**NAMED, "caption_strategy": "instanceprompt"}], "dogs: there is no instance_prompt"),
        ([{**NAMED, "prepend_instance_prompt": True}], "dogs: there is no instance_prompt"),
        ([{**NAMED, "prepend_instance_prompt": True, "instance_prompt": "{a}"}], "data set 1: caption .* unknown"),
        ([{**NAMED, "crop_style": "top"}], "crop_style is 'top'"),
        ([{**NAMED, "crop_aspect": "wide"}], "crop_aspect is 'wide'"),
        ([{**NAMED, "resolution_type": "mm"}], "resolution_type is 'mm'"),
        ([{**NAMED, "resolution": "large"}], "resolution is 'large'; wanted a number above 0"),
        ([{**NAMED, "caption_shuffle": True}], "caption_shuffle is True; wanted a table"),
        ([{**NAMED, "caption_shuffle": {"enable": True, "split_on": []}}], r"split_on is '\[\]'; wanted comma"),
        ([NAMED, "x"], "the list holds 'x'; wanted a table"),
        (CACHES, "there is nothing to convert: its list of data sets is empty"),
        (
            [{"id": "x", "type": "huggingface"}, *CACHES],
            "nothing to convert: x: type = huggingface: its images are in",
        ),
        ({"data_backend_config": "config/multidatabackend.json"}, "config/multidatabackend.json; convert that file"),
        ({"--data_backend_config": "m.json", "--resolution": 512}, "its data sets are in m.json; convert that file"),
    ],
)
def test_wrong_ones_are_one_line(values, what, home):
    (home / "a.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=what):
        convert(home / "a.json")


def test_the_command_writes_it(home, capsys):
    (home / "multidatabackend.json").write_text(json.dumps([DOGS, CLASS, *CACHES]))
    assert main([str(home / "multidatabackend.json"), "-o", str(home / "dataset.toml")]) == 0
    assert "3 sources from SimpleTuner" in capsys.readouterr().err
    assert len(read_folder(home / "dataset.toml")) == 3
