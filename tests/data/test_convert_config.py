"""kohya's and ai-toolkit's configs as a dataset.toml."""

import json
import tomllib

import pytest
from made_up import noise_picture
from sfumato.pipelines.dataset_config import main

from sfumato.data import read_folder
from sfumato.errors import ConfigError
from sfumato.interop.datasets import convert
from sfumato.interop.datasets.settings import parsed_scalars

KOHYA = """
[general]
enable_bucket = true
shuffle_caption = true
keep_tokens = 1
caption_extension = ".txt"

[[datasets]]
resolution = 768
batch_size = 2
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "dogs"
  num_repeats = 10
  class_tokens = "sks dog"
  flip_aug = true
  color_aug = true
  caption_prefix = "best, "

  [[datasets.subsets]]
  image_dir = "/elsewhere/dogs"
  is_reg = true
  keep_tokens = 0
  shuffle_caption = false
  caption_extension = ".wd14"
  caption_dropout_rate = 0.1
  caption_tag_dropout_rate = 0.2
  random_crop = true
  alpha_mask = true
"""
TOOLKIT = """
job: extension
config:
  name: x
  process:
    - type: sd_trainer
      trigger_word: p3r5on
      datasets:
        - folder_path: "dogs"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: true
          cache_latents_to_disk: true
          resolution: [512, 768]
          num_repeats: 2
          flip_x: true
          mask_path: "masks"
          flip_y: true
"""


@pytest.fixture
def home(tmp_path):
    (tmp_path / "dogs").mkdir()
    noise_picture().save(tmp_path / "dogs" / "a.png")
    (tmp_path / "kohya.toml").write_text(KOHYA)
    (tmp_path / "toolkit.yaml").write_text(TOOLKIT)
    return tmp_path


def test_kohya_s_subsets_become_sources_with_what_they_inherit(home):
    first, second = tomllib.loads(convert(home / "kohya.toml").text)["source"]
    assert first == {
        "path": "dogs",
        "repeats": 10,
        "words": "sks dog",
        "caption": "best,  {caption}",
        "shuffle_tags": True,
        "keep_tags": 2,
        "flip": True,
    }
    assert second == {
        "path": "/elsewhere/dogs",
        "class": True,
        "caption_suffix": ".wd14",
        "caption_dropout": 0.1,
        "tag_dropout": 0.2,
        "crop": "random",
        "mask": "alpha",
    }


def test_ai_toolkit_s_data_sets_become_sources(home):
    (source,) = tomllib.loads(convert(home / "toolkit.yaml").text)["source"]
    assert source == {
        "path": "dogs",
        "repeats": 4,
        "caption": "{trigger}, {caption}",
        "trigger": "p3r5on",
        "shuffle_tags": True,
        "keep_tags": 1,
        "caption_dropout": 0.05,
        "resolution": [512, 768],
        "flip": True,
    }


def test_ai_toolkit_s_captions_in_json_are_told(home):
    text = (home / "toolkit.yaml").read_text()
    (home / "toolkit.yaml").write_text(text.replace('caption_ext: "txt"', 'caption_ext: "json"'))
    found = convert(home / "toolkit.yaml")
    assert "caption_suffix" not in tomllib.loads(found.text)["source"][0]
    assert any('captions in .json files are not read; list them as "text"' in note for note in found.notes)


def test_kohya_s_masks_are_told_where_they_go(home):
    text = (home / "kohya.toml").read_text()
    (home / "kohya.toml").write_text(text.replace("[general]", '[general]\nconditioning_data_dir = "masks"'))
    assert any(
        'masks go to masks/ in the image folder, with mask = "files"' in n for n in convert(home / "kohya.toml").notes
    )


def test_ai_toolkit_walks_through_the_folders_below(home):
    """But for hidden ones, and for the controls that it keeps beside the pictures."""
    for name in ("dogs/close", "dogs/far/away", "dogs/_controls", "dogs/.cache"):
        (home / name).mkdir(parents=True)
        noise_picture().save(home / name / "a.png")
    found = tomllib.loads(convert(home / "toolkit.yaml").text)["source"]
    assert [source["path"] for source in found] == ["dogs", "dogs/close", "dogs/far/away"]
    assert {source["repeats"] for source in found} == {4}


def test_ai_toolkit_s_data_sets_keep_their_shares(home):
    """There a mirrored one holds each image twice, and num_repeats below 2 repeats nothing."""
    own = "{folder_path: dogs, num_repeats: 0}, {folder_path: dogs, flip_x: true}, {folder_path: dogs}"
    (home / "toolkit.yaml").write_text(f"config: {{process: [{{datasets: [{own}]}}]}}")
    found = tomllib.loads(convert(home / "toolkit.yaml").text)["source"]
    assert [source.get("repeats", 1) for source in found] == [1, 2, 1]


@pytest.mark.parametrize(("more", "kept"), [("", 0), (", keep_tokens: 1", 1), (", token_dropout_rate: 0.5", 1)])
def test_ai_toolkit_s_trigger_is_dropped_with_no_tag(more, kept, home):
    """It puts the word before a caption after it has dropped tags."""
    own = "config:\n  process:\n  - trigger_word: zwx\n    datasets:\n"
    (home / "toolkit.yaml").write_text(f"{own}    - {{folder_path: dogs{more}}}\n")
    (source,) = tomllib.loads(convert(home / "toolkit.yaml").text)["source"]
    assert source.get("keep_tags", 0) == kept


@pytest.mark.parametrize(("more", "told"), [("shuffle_tokens: true", True), ("token_dropout_rate: 0.5", False)])
def test_ai_toolkit_s_tags_that_are_shuffled_although_kept_are_told(more, told, home):
    (home / "toolkit.yaml").write_text(
        f"config: {{process: [{{datasets: [{{folder_path: dogs, keep_tokens: 2, {more}}}]}}]}}"
    )
    assert any("these tags stay in front here" in note for note in convert(home / "toolkit.yaml").notes) == told


def test_ai_toolkit_s_trigger_is_not_for_the_pictures_of_the_class(home):
    """Which would learn the class under the subject's own word, where they are there to keep it from that."""
    (home / "reg").mkdir()
    noise_picture().save(home / "reg" / "a.png")
    for folder in ("dogs", "reg"):
        (home / folder / "a.txt").write_text("a dog")
    own = "config:\n  process:\n  - trigger_word: zwx\n    datasets:\n    - folder_path: dogs\n"
    (home / "toolkit.yaml").write_text(own + "    - {folder_path: reg, is_reg: true, shuffle_tokens: true}\n")
    (home / "dataset.toml").write_text(convert(home / "toolkit.yaml").text)
    examples = read_folder(home / "dataset.toml")
    assert [(e.caption, e.group, e.trigger) for e in examples] == [
        ("zwx, a dog", "instance", "zwx"),
        ("a dog", "class", None),
    ]
    assert examples[1].options.keep_tags is None


@pytest.mark.parametrize("in_sections", [False, True])
def test_a_whole_training_s_folders_become_sources(tmp_path, in_sections):
    folders = 'train_data_dir = "img"\nreg_data_dir = "reg"\n'
    rest = 'caption_extension = ".txt"\nshuffle_caption = true\nkeep_tokens = "1"\nprior_loss_weight = 0.5\n'
    sections = ("[dataset]\n", "[model]\n") if in_sections else ("", "")
    (tmp_path / "kohya.toml").write_text(
        sections[0] + folders + rest + "color_aug = true\n" + sections[1] + 'network_dim = 16\nresolution = "512,512"\n'
    )
    for folder in ("img/10_sks dog", "reg/1_dog"):
        (tmp_path / folder).mkdir(parents=True)
        noise_picture().save(tmp_path / folder / "a.png")
    converted = convert(tmp_path / "kohya.toml")
    assert tomllib.loads(converted.text)["source"] == [
        {"path": "img", "shuffle_tags": True, "keep_tags": 1},
        {"path": "reg", "class": True, "shuffle_tags": True, "keep_tags": 1, "weight": 0.5},
    ]
    notes = "\n".join(converted.notes)
    assert "color_aug = True: has no counterpart" in notes
    assert "resolution = 512,512: --resolution" in notes
    assert "network_dim" not in notes
    (tmp_path / "dataset.toml").write_text(converted.text)
    examples = read_folder(tmp_path / "dataset.toml")
    assert [(e.caption, e.repeats, e.group) for e in examples] == [("sks dog", 10, "instance"), ("dog", 1, "class")]


@pytest.mark.parametrize(("own", "told"), [("", True), ('caption_extension = ".txt"\n', False)])
@pytest.mark.parametrize("of_a_training", [False, True])
def test_captions_that_kohya_s_own_default_does_not_read_are_told(of_a_training, own, told, home):
    (home / "img/10_dog").mkdir(parents=True)
    for folder in ("dogs", "img/10_dog"):
        (home / folder / "a.txt").write_text("a dog on a beach")
    named = 'train_data_dir = "img"\n' if of_a_training else '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "dogs"\n'
    (home / "kohya.toml").write_text(named + own)
    notes = "\n".join(convert(home / "kohya.toml").notes)
    assert ("caption_extension is unset, and sd-scripts reads .caption files alone then" in notes) is told


def test_the_ending_that_kohya_reads_is_the_one_that_is_read(home):
    """Beside a .txt, which would be read first."""
    (home / "dogs" / "a.txt").write_text("another tool's")
    (home / "dogs" / "a.caption").write_text("a dog")
    own = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "dogs"\ncaption_extension = ".caption"\n'
    (home / "kohya.toml").write_text(own)
    main([str(home / "kohya.toml"), "-o", str(home / "dataset.toml")])
    assert [example.caption for example in read_folder(home / "dataset.toml")] == ["a dog"]


def test_folders_are_looked_for_where_the_other_tool_is_started_too(home, monkeypatch):
    """kohya's and ai-toolkit's configs often lie in a folder of their own."""
    (home / "configs").mkdir()
    (home / "kohya.toml").rename(home / "configs" / "kohya.toml")
    text = (home / "configs" / "kohya.toml").read_text().replace("/elsewhere/dogs", "C:\\\\dogs")
    (home / "configs" / "kohya.toml").write_text(text)
    monkeypatch.chdir(home)
    near = convert(home / "configs" / "kohya.toml", home / "dataset.toml")
    assert [entry["path"] for entry in tomllib.loads(near.text)["source"]] == ["dogs", "C:/dogs"]
    assert [note.partition("; ")[0] for note in near.notes if "dogs" in note] == [
        "C:/dogs: neither beside the config nor below the present folder"
    ]
    apart = convert(home / "configs" / "kohya.toml")
    assert tomllib.loads(apart.text)["source"][0]["path"] == (home / "dogs").resolve().as_posix()


def test_a_folder_with_0_repeats_is_left_out_as_in_sd_scripts(home):
    (home / "kohya.toml").write_text(KOHYA.replace("num_repeats = 10", "num_repeats = 0"))
    converted = convert(home / "kohya.toml")
    assert [entry["path"] for entry in tomllib.loads(converted.text)["source"]] == ["/elsewhere/dogs"]
    assert "dogs: 0 repeats, so it is left out" in converted.notes
    assert converted.sources == 1


def test_what_is_not_carried_over_is_named(home):
    kohya, toolkit = "\n".join(convert(home / "kohya.toml").notes), "\n".join(convert(home / "toolkit.yaml").notes)
    assert "color_aug = True: has no counterpart" in kohya
    assert "resolution = 768: --resolution" in kohya
    assert "flip_y = True: has no counterpart" in toolkit
    assert "mask_path: move the masks" in toolkit
    assert "cache_latents_to_disk = True: --cache" in toolkit


def test_the_written_file_is_read(home, capsys):
    assert main([str(home / "toolkit.yaml"), "-o", str(home / "new" / "dataset.toml")]) == 0
    assert "1 source from ai-toolkit" in capsys.readouterr().err
    # The new file lies elsewhere, and still names the same folder.
    example = read_folder(home / "new" / "dataset.toml")[0]
    assert (example.path.resolve(), example.caption) == (home / "dogs" / "a.png", "p3r5on, a")


def test_a_toml_may_be_the_first_word_and_is_printed(home, capsys):
    assert main([str(home / "kohya.toml")]) == 0
    assert tomllib.loads(capsys.readouterr().out)["source"][0]["path"] == "dogs"


def test_nothing_is_written_over(home):
    with pytest.raises(ConfigError, match="not written over"):
        main([str(home / "toolkit.yaml"), "-o", str(home / "kohya.toml")])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "x = 1", "neither kohya's"),
        ("a.yaml", "- 1", "neither kohya's"),
        ("a.json", '[{"folder": "dogs"}]', "neither kohya's .* nor SimpleTuner's data sets are in it"),
        ("a.yaml", "a: [", "cannot be parsed"),
        ("a.json", '{"datasets": []}', "is empty"),
        ("a.toml", "[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 1", "no image_dir"),
        ("a.toml", 'dataset_config = "data.toml"', "convert that file"),
        ("a.txt", "", "wanted kohya's .toml"),
    ],
)
def test_what_is_neither_is_one_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        convert(tmp_path / name)


def test_a_config_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(ConfigError, match=r"kohya\.toml: cannot be read \(No such file or directory\)"):
        convert(tmp_path / "kohya.toml")


def test_what_names_nothing_is_as_if_left_out(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "config:\n  process:\n  - trigger_word: zwx\n    datasets:\n    - folder_path: dogs\n"
        "      shuffle_tokens: true\n      keep_tokens:\n      num_repeats:\n      caption_dropout_rate: null\n"
    )
    (source,) = tomllib.loads(convert(tmp_path / "a.yaml").text)["source"]
    assert source["keep_tags"] == 1
    assert not {"repeats", "caption_dropout"} & source.keys()


def test_texts_that_are_numbers_are_read_as_such(tmp_path):
    """As kohya_ss saves some of its fields."""
    own = {
        "image_dir": "7",
        "shuffle_caption": "true",
        "keep_tokens": "2",
        "caption_dropout_rate": "0.1",
        "is_reg": "false",
    }
    (tmp_path / "a.json").write_text(json.dumps({"datasets": [{"subsets": [own]}]}))
    (source,) = tomllib.loads(convert(tmp_path / "a.json").text)["source"]
    assert source == {"path": "7", "shuffle_tags": True, "keep_tags": 2, "caption_dropout": 0.1}


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"datasets": ["exif"]}, "datasets holds 'exif'; wanted a table"),
        ({"datasets": [{"subsets": [3]}]}, "subsets holds 3; wanted a table"),
        ({"general": [1], "datasets": [{"subsets": [{"image_dir": "a"}]}]}, "general holds .1.; wanted a table"),
        ({"datasets": [{"subsets": [{"image_dir": "a", "num_repeats": "many"}]}]}, "repeats is 'many'; wanted a whole"),
        ({"config": {"process": [{"datasets": [{"folder_path": "a", "keep_tokens": "x"}]}]}}, "keep_tokens is 'x'"),
        ({"config": {"process": [{"datasets": ["a"]}]}}, "datasets holds 'a'; wanted a table"),
        ({"config": {"process": [{"datasets": [{"folder_path": "a", "caption_ext": 5}]}]}}, "caption_ext is 5; wanted"),
        (
            {"datasets": [{"subsets": [{"image_dir": "a", "caption_extension": [".a"]}]}]},
            "caption_extension is .*; want",
        ),
        ({"datasets": [{"image_dir": "a"}]}, "a data set has no subsets"),
        (
            {"datasets": [{"subsets": [{"image_dir": "a", "caption_dropout_rate": 2}]}]},
            "data set 1: caption dropout is 2",
        ),
        (
            {"datasets": [{"subsets": [{"image_dir": "a", "caption_prefix": "{a|b}"}]}]},
            "data set 1: caption .* unknown",
        ),
        ({"datasets": [{"subsets": [{"image_dir": "a", "num_repeats": 0}]}]}, "nothing to convert"),
    ],
)
def test_a_setting_of_another_kind_is_one_line(values, what, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=what):
        convert(tmp_path / "a.json")


def test_the_help_says_that_the_first_word_is_the_other_tools_file(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "sfumato dataset kohya.toml -o dataset.toml" in said
    assert "dataset [CONFIG.toml]" not in said


@pytest.mark.parametrize("at_random", [False, True])
@pytest.mark.parametrize("of_a_training", [False, True])
def test_captions_of_which_kohya_s_tools_take_a_line_are_told(of_a_training, at_random, home):
    (home / "img/10_dog").mkdir(parents=True)
    for folder in ("dogs", "img/10_dog"):
        (home / folder / "a.txt").write_text("a dog\na cat\n")
    named = 'train_data_dir = "img"\n' if of_a_training else '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "dogs"\n'
    (home / "kohya.toml").write_text(named + ("enable_wildcard = true\n" if at_random else ""))
    place = "img/10_dog" if of_a_training else "dogs"
    first_alone = f"{place}: 1 caption has several lines (a.txt), one caption here, where sd-scripts takes the first"
    found = convert(home / "kohya.toml")
    assert any(note.startswith(first_alone) for note in found.notes) is not at_random
    assert ("caption_lines = true" in found.text) is at_random
    assert ("wildcards = true" in found.text) is at_random
    assert not any("enable_wildcard" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bomb.yaml", "a: &a [x]\nb: [*a, *a]"),
        ("self.yaml", "a: &a [*a]"),
        ("deep.json", "[" * 5000),
        ("deep.toml", "a = " + "[" * 5000),
        ("long.toml", "a = " + "9" * 5000),
    ],
)
def test_what_would_fill_the_memory_or_the_stack_is_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"^{name}: cannot be parsed \(.*\)\. Mend it\.$"):
        convert(tmp_path / name)


def test_a_text_of_brackets_is_a_text():
    assert parsed_scalars({"a": "[" * 5000, "b": "True"}, ()) == {"a": "[" * 5000, "b": True}


def test_what_a_config_says_does_not_command_the_terminal(tmp_path, capsys):
    text = KOHYA.replace("color_aug = true", '"color\\u001b[2J" = "\\u0007"')
    (tmp_path / "kohya.toml").write_text(text)
    main([str(tmp_path / "kohya.toml")])
    said = capsys.readouterr().err
    assert r"color\x1b[2J = \x07: has no counterpart" in said
    assert "\x1b" not in said


def test_what_is_wrong_with_a_config_is_told_with_its_name(tmp_path):
    (tmp_path / "kohya.toml").write_text("[[datasets]]\nresolution = 512\n")
    with pytest.raises(ConfigError, match=r"^kohya\.toml: a data set has no subsets"):
        convert(tmp_path / "kohya.toml")
