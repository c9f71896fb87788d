"""OneTrainer's concepts as a dataset.toml."""

import json
import tomllib

import pytest
from made_up import noise_picture
from sfumato.pipelines.dataset_config import main

from sfumato.data import read_folder
from sfumato.errors import ConfigError
from sfumato.interop.datasets import convert

IMAGE = {
    "__version": 0,
    "enable_crop_jitter": True,
    "enable_random_flip": True,
    "enable_fixed_flip": True,
    "enable_random_rotate": True,
    "enable_fixed_rotate": False,
    "random_rotate_max_angle": 5.0,
    "enable_random_brightness": False,
    "enable_fixed_brightness": False,
    "random_brightness_max_strength": 0.2,
    "enable_random_hue": True,
    "enable_fixed_hue": False,
    "random_hue_max_strength": 0.0,
    "enable_resolution_override": False,
    "resolution_override": "512",
    "enable_random_circular_mask_shrink": False,
    "enable_random_mask_rotate_crop": False,
}
TEXT = {
    "__version": 0,
    "prompt_source": "sample",
    "prompt_path": "",
    "enable_tag_shuffling": True,
    "tag_delimiter": ",",
    "keep_tags_count": 1,
    "tag_dropout_enable": True,
    "tag_dropout_mode": "RANDOM",
    "tag_dropout_probability": 0.2,
    "tag_dropout_special_tags_mode": "NONE",
    "tag_dropout_special_tags": "",
    "tag_dropout_special_tags_regex": False,
    "caps_randomize_enable": False,
    "caps_randomize_mode": "capslock, title, first, random",
    "caps_randomize_probability": 0.5,
    "caps_randomize_lowercase": False,
}
DOGS = {
    "__version": 2,
    "image": IMAGE,
    "text": TEXT,
    "name": "my dog",
    "path": "dogs",
    "seed": -5,
    "enabled": True,
    "type": "STANDARD",
    "include_subdirectories": True,
    "image_variations": 1,
    "text_variations": 1,
    "balancing": 2.5,
    "balancing_strategy": "REPEATS",
    "loss_weight": 0.8,
    "concept_stats": {"image_count": 2},
}
PLAIN = {"image": {"enable_crop_jitter": False}}
"""Crops vary unless a concept says otherwise."""


@pytest.fixture
def home(tmp_path):
    for name in ("dogs/a", "dogs/more/b", "dogs/.thumbs/c", "others/d", "others/e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_picture().save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"sks dog, {name[-1]}")
    return tmp_path


def converted(home, *concepts, **training):
    """What a config of these concepts becomes: (its sources, its notes)."""
    values = {**training, "concepts": concepts} if training else concepts
    (home / "concepts.json").write_text(json.dumps(values))
    result = convert(home / "concepts.json", home / "dataset.toml")
    (home / "dataset.toml").write_text(result.text)
    assert result.tool == "OneTrainer"
    return tomllib.loads(result.text)["source"], list(result.notes)


def learned(home):
    """(picture, caption, how often an epoch holds it) of each that the written file names."""
    return [(each.path.name, each.caption, each.repeats) for each in read_folder(home / "dataset.toml")]


def test_a_concept_becomes_sources_with_all_that_it_says(home):
    others = {"name": "others", "path": "others", "type": "PRIOR_PREDICTION", **PLAIN}
    sources, notes = converted(home, DOGS, others)
    dogs = {"repeats": 5, "shuffle_tags": True, "keep_tags": 1, "tag_dropout": 0.2, "flip": True}
    dogs |= {"crop": "random", "weight": 0.8}
    assert sources == [
        {"path": "dogs", **dogs},
        {"path": "dogs/more", **dogs},
        {"path": "others", "repeats": 2, "class": True},
    ]
    assert [note.partition(":")[0] for note in notes] == [
        "random_rotate_max_angle = 5.0",
        "others",
        "repeats are whole numbers, so that an epoch here is 2 of OneTrainer's",
    ]
    assert "--prior-prompts" in notes[1]
    assert learned(home) == [
        ("a.png", "sks dog, a", 5),
        ("b.png", "sks dog, b", 5),
        ("d.png", "sks dog, d", 2),
        ("e.png", "sks dog, e", 2),
    ]


def test_what_a_concept_leaves_unsaid_is_as_onetrainer_has_it(home):
    sources, notes = converted(home, {"path": "dogs"})
    assert (sources, notes) == ([{"path": "dogs", "crop": "random"}], [])
    assert learned(home) == [("a.png", "sks dog, a", 1)]


def test_what_is_not_trained_is_left_out_and_said(home):
    sources, notes = converted(home, {"path": "x", "name": "off", "enabled": False}, {"path": "dogs", **PLAIN})
    assert sources == [{"path": "dogs"}]
    assert [note.partition(",")[0] for note in notes] == ["off: is not enabled"]


@pytest.mark.parametrize("kind", [{"validation_concept": True}, {"type": "VALIDATION"}])
def test_a_concept_for_validation_is_held_out_once_whatever_its_balance(kind, home):
    sources, notes = converted(
        home, {"path": "others", "balancing": 0.25, **kind, **PLAIN}, {"path": "dogs", "balancing": 2, **PLAIN}
    )
    assert sources == [{"path": "others", "validation": True}, {"path": "dogs", "repeats": 2}]
    assert notes == []
    assert [each.group for each in read_folder(home / "dataset.toml")] == ["validation", "validation", "instance"]


def test_repeats_and_samples_keep_their_proportions(home):
    """0.5 of one picture, 3 samples of two pictures, once; and an old concept's `repeats`."""
    half = {"path": "dogs", "balancing": 0.5, **PLAIN}
    samples = {"path": "others", "balancing": 3, "balancing_strategy": "SAMPLES", **PLAIN}
    none = {"path": "dogs/more", "balancing": 0, **PLAIN}
    old = {"path": "dogs/more", "repeats": 4, **PLAIN}
    sources, notes = converted(home, half, samples, none, old)
    assert [(source["path"], source.get("repeats", 1)) for source in sources] == [
        ("dogs", 1),
        ("others", 3),
        ("dogs/more", 8),
    ]
    assert "dogs/more: 0 repeats, so it is left out" in notes


@pytest.mark.parametrize(
    ("balancing", "repeats"),
    [(0.004, (1, 250)), (0.0301, (1, 33)), (0.00001, (1, 100_000)), (5e-324, (1, 2 * 10**323))],
)
def test_a_small_share_is_not_none(balancing, repeats, home):
    rare = {"path": "dogs", "balancing": balancing, **PLAIN}
    if repeats[1] > 99_999:
        with pytest.raises(ConfigError, match="repeats"):
            converted(home, rare, {"path": "others", "balancing": 1, **PLAIN})
        return
    sources, _ = converted(home, rare, {"path": "others", "balancing": 1, **PLAIN})
    assert tuple(source.get("repeats", 1) for source in sources) == repeats


def test_samples_of_pictures_that_are_elsewhere_cannot_be_counted(home):
    sources, notes = converted(home, {"path": "gone", "balancing": 30, "balancing_strategy": "SAMPLES", **PLAIN})
    assert sources == [{"path": "gone"}]
    assert "balancing = 30 samples: there are no images here to count; set repeats" in notes


def test_captions_come_from_one_file_s_lines_equally_often(home):
    (home / "one.txt").write_text("a photo of sks dog\n\n")
    (home / "two.txt").write_text("\ufeffsks dog\r\n  a sks dog \n", encoding="utf-8")
    one = {"path": "dogs", "text": {"prompt_source": "concept", "prompt_path": "one.txt"}}
    two = {"path": "others", "text": {"prompt_source": "concept", "prompt_path": str(home / "two.txt")}}
    converted(home, one, two)
    assert learned(home) == [
        ("a.png", "a photo of sks dog", 2),
        *(("d.png", "sks dog", 1), ("e.png", "sks dog", 1)),
        *(("d.png", "a sks dog", 1), ("e.png", "a sks dog", 1)),
    ]


def test_captions_come_from_names_of_files(home):
    noise_picture().save(home / "dogs" / "sks_dog.png")
    (home / "dogs" / "a.txt").unlink()
    _, notes = converted(home, {"path": "dogs", "text": {"prompt_source": "filename"}})
    assert learned(home) == [("a.png", "a", 1), ("sks_dog.png", "sks dog", 1)]
    assert notes[0].startswith("prompt_source = filename: spaces stand for - and _")


@pytest.mark.parametrize(
    ("text", "keys", "note"),
    [
        ({"tag_dropout_mode": "FULL", "keep_tags_count": 0}, {"caption_dropout": 0.3}, None),
        ({"tag_dropout_mode": "FULL"}, {}, "tag_dropout_probability = 0.3, FULL, special tags NONE"),
        ({"tag_dropout_mode": "RANDOM WEIGHTED"}, {}, "tag_dropout_probability = 0.3, RANDOM WEIGHTED"),
        ({"tag_dropout_mode": "RANDOM"}, {"keep_tags": 1, "tag_dropout": 0.3}, None),
        ({"tag_dropout_mode": "RANDOM", "tag_dropout_special_tags_mode": "WHITELIST"}, {}, "special tags WHITELIST"),
        ({"tag_dropout_enable": False}, {}, None),
        (
            {"tag_dropout_enable": False, "enable_tag_shuffling": True, "tag_delimiter": "; "},
            {"shuffle_tags": True, "keep_tags": 1, "separator": ";"},
            None,
        ),
        ({"tag_dropout_enable": False, "enable_tag_shuffling": True, "tag_delimiter": " "}, {}, "is a space"),
        ({"tag_dropout_enable": False, "caps_randomize_enable": True}, {}, None),
        (
            {"tag_dropout_enable": False, "caps_randomize_enable": True, "caps_randomize_probability": 0.1},
            {},
            "caps_randomize_enable = True: captions keep their capitals",
        ),
    ],
)
def test_tags_vary_as_there_or_a_note_says_how_not(text, keys, note, home):
    text = {"tag_dropout_enable": True, "tag_dropout_probability": 0.3, **text}
    sources, notes = converted(home, {"path": "dogs", "text": text, **PLAIN})
    assert sources == [{"path": "dogs", **keys}]
    assert (len(notes) == 0) if note is None else (len(notes) == 1 and note in notes[0])


@pytest.mark.parametrize(
    ("concept", "note"),
    [
        ({"image": {"enable_fixed_flip": True}}, "enable_fixed_flip = True: mirror the files"),
        (
            {"image": {"enable_fixed_hue": True, "random_hue_max_strength": 0.1}},
            "random_hue_max_strength = 0.1: images",
        ),
        (
            {"image": {"enable_resolution_override": True, "resolution_override": "512x768"}},
            "resolution = 624: --resolution",
        ),
        ({"image": {"enable_random_circular_mask_shrink": True}}, "masks are taken as they are"),
        ({"image_variations": 4}, "image_variations = 4: crops"),
        ({"text": {"caps_randomize_lowercase": True}}, "write them in small letters"),
        ({"image": {"enable_random_posterize": True}}, "enable_random_posterize = True: has no counterpart"),
    ],
)
def test_what_is_not_carried_over_is_named(concept, note, home):
    _, notes = converted(home, {"path": "dogs", **concept})
    assert len(notes) == 1
    assert note in notes[0]


def test_sizes_of_concepts_are_those_of_their_sources(home):
    own = {"image": {"enable_resolution_override": True, "resolution_override": "512, 768"}}
    sources, notes = converted(home, {"path": "dogs", **own}, {"path": "others"})
    assert ([source.get("resolution") for source in sources], notes) == ([[512, 768], None], [])
    own["image"]["resolution_override"] = "big"
    with pytest.raises(ConfigError, match="its resolution is 'big'; wanted pixels, such as 512 or 512,768"):
        converted(home, {"path": "dogs", **own})


def test_of_captions_of_several_lines_a_sample_takes_one(home):
    assert "caption_lines" not in converted(home, {"path": "dogs"})[0][0]
    (home / "dogs" / "a.txt").write_text("a dog\n\na cat\n")
    sources, notes = converted(home, {"path": "dogs"})
    assert sources[0]["caption_lines"] is True
    assert notes == []


def test_a_whole_training_s_concepts_are_read_with_its_masks(home):
    noise_picture().save(home / "dogs" / "a-masklabel.png")
    training = {"resolution": "768", "masked_training": True, "unmasked_weight": 0.1, "learning_rate": 1.0}
    training |= {"aspect_ratio_bucketing": True, "text_encoder": {"dropout_probability": 0.05}}
    sources, notes = converted(home, DOGS, **training)
    assert [source.get("mask") for source in sources] == ["files", None]
    assert [note.partition(": ")[0] for note in notes[1:5]] == [
        "resolution = 768",
        "unmasked_weight = 0.1",
        "text_encoder.dropout_probability = 0.05",
        "settings of the training itself are not converted; sfumato recipe converts them, and the images with them",
    ]
    first, _ = read_folder(home / "dataset.toml")
    assert (first.path.name, first.mask) == ("a.png", home / "dogs" / "a-masklabel.png")


def test_masks_beside_a_list_of_concepts_are_said(home):
    """Whether they are learned by is not in it."""
    noise_picture().save(home / "dogs" / "a-masklabel.png")
    sources, notes = converted(home, {"path": "dogs", **PLAIN})
    assert sources == [{"path": "dogs"}]
    assert notes == ['dogs: holds masks; where masked_training was on, set mask = "files"']
    assert learned(home) == [("a.png", "sks dog, a", 1)]


def test_folders_whose_names_say_repeats_here_alone_are_named(home):
    (home / "dogs" / "10_sks dog").mkdir()
    noise_picture().save(home / "dogs" / "10_sks dog" / "f.png")
    (home / "dogs" / "10_sks dog" / "f.txt").write_text("f")
    sources, notes = converted(home, {"path": "dogs", "include_subdirectories": True, **PLAIN})
    assert [source["path"] for source in sources] == ["dogs", "dogs/10_sks dog", "dogs/more"]
    assert notes[0].startswith("dogs: holds 10_sks dog, whose name says repeats here")


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([{"path": ""}], "a concept without a name: has no path"),
        ([{"path": "dogs", "type": "PRIOR"}], "dogs: type is 'PRIOR'; wanted STANDARD"),
        ([{"path": "dogs", "text": "sample"}], "text is 'sample'; wanted a table"),
        ([{"path": "dogs", "text": {"prompt_source": "file"}}], "prompt_source is 'file'; wanted sample"),
        ([{"path": "dogs", "text": {"prompt_source": "concept"}}], "prompt_path '': not readable"),
        (
            [{"path": "dogs", "text": {"prompt_source": "concept", "prompt_path": "gone.txt"}}],
            r"prompt_path 'gone\.txt': not readable as text \(No such file",
        ),
        (
            [{"path": "dogs", "text": {"prompt_source": "concept", "prompt_path": "/dev/null"}}],
            "prompt_path '/dev/null': is no plain file",
        ),
        (
            [{"path": "dogs", "text": {"prompt_source": "concept", "prompt_path": "empty.txt"}}],
            "there is no prompt in it",
        ),
        (
            [{"path": "dogs", "text": {"prompt_source": "concept", "prompt_path": "braces.txt"}}],
            "data set 1: caption .* unknown",
        ),
        ([{"path": "dogs", "balancing": -1}], "balancing is -1; wanted a number that is not negative"),
        ([{"path": "dogs", "balancing": "many"}], "balancing is 'many'"),
        ([{"path": "dogs", "balancing": 1e308}], "balancing is 1e\\+308; wanted at most 99,999 repeats of an image"),
        ([{"path": "dogs", "balancing": 10**400}], "balancing is 1000000.*; wanted at most 99,999 repeats"),
        ([{"path": "dogs", "balancing": float("nan")}], "balancing is nan"),
        ([{"path": "dogs", "balancing_strategy": "ALL"}], "balancing_strategy is 'ALL'"),
        ([{"path": "dogs", "loss_weight": 0}], "data set 1: weight is 0"),
        ([{"path": "dogs", "text": {"keep_tags_count": 1.5}}], "keep_tags_count is 1.5; wanted a whole number"),
        ([{"path": "dogs"}, 3], "concepts holds 3; wanted a table"),
        ({"concepts": {}}, "concepts is {}; wanted a list"),
        ({"concepts": []}, "list of data sets is empty"),
        ({"concepts": None, "concept_file_name": "training_concepts/c.json"}, "training_concepts/c.json; convert that"),
        ([{"path": "dogs", "enabled": False}], "nothing to convert: dogs: is not enabled"),
    ],
)
def test_wrong_concepts_are_one_line(values, what, home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "empty.txt").write_text("\n\n")
    (home / "braces.txt").write_text("a {red|blue} dog")
    (home / "concepts.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=what):
        convert(home / "concepts.json")


def test_the_command_writes_it(home, capsys):
    (home / "concepts.json").write_text(json.dumps([DOGS]))
    assert main([str(home / "concepts.json"), "-o", str(home / "dataset.toml")]) == 0
    assert "2 sources from OneTrainer" in capsys.readouterr().err
    assert len(read_folder(home / "dataset.toml")) == 2
