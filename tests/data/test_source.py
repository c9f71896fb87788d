"""A dataset.toml: several folders with their own options."""

import pytest
from made_up import FakeBase, noise_picture

from sfumato.data import prepare, read_folder
from sfumato.errors import ConfigError, DataError


@pytest.fixture
def two(tmp_path):
    """Folders `dogs` (2 pictures, captions) and `style` (1 picture, none)."""
    for folder, count in (("dogs", 2), ("style", 1)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            noise_picture(seed=number).save(tmp_path / folder / f"red-thing-{number}.png")
    for number in range(2):
        (tmp_path / "dogs" / f"red-thing-{number}.txt").write_text(f"sks dog, tag {number}")
    return tmp_path


def toml(folder, text):
    (folder / "dataset.toml").write_text(text)
    return folder / "dataset.toml"


def test_a_source_may_lie_from_home_on(two, monkeypatch):
    monkeypatch.setenv("HOME", str(two))
    path = toml(two / "style", '[[source]]\npath = "~/dogs"')
    assert [example.caption for example in read_folder(path)] == ["sks dog, tag 0", "sks dog, tag 1"]


@pytest.mark.parametrize("key", ["caption_dropout", "tag_dropout"])
def test_what_is_dropped_of_every_source_is_not_dropped_of_the_class(key, two):
    sources = ['path = "style"\ncaption = "{caption}"', 'path = "dogs"\nclass = true']
    path = toml(two, f"{key} = 0.5\n" + "".join(f"[[source]]\n{source}\n" for source in sources))
    first, *others = read_folder(path)
    assert getattr(first.options, key) == 0.5
    assert {getattr(other.options, key) for other in others} == {None}


def test_sources_come_in_their_order_with_their_options(two):
    path = toml(
        two,
        """
        caption_dropout = 0.1
        [[source]]
        path = "style"
        repeats = 4
        caption = "{caption}, {trigger} style"
        trigger = "zwx"
        flip = true
        crop = "pad"
        weight = 0.5
        [[source]]
        path = "dogs"
        class = true
        shuffle_tags = true
        keep_tags = 1
        tag_dropout = 0.2
        """,
    )
    folder = read_folder(path)
    assert [e.caption for e in folder] == ["red thing 0, zwx style", "sks dog, tag 0", "sks dog, tag 1"]
    assert [e.repeats for e in folder] == [4, 1, 1]
    assert folder.samples == 6
    first, second = folder[0].options, folder[1].options
    assert (first.flip, first.crop, first.weight, first.caption_dropout) == (True, "pad", 0.5, 0.1)
    assert (second.shuffle_tags, second.keep_tags, second.tag_dropout, second.flip) == (True, 1, 0.2, None)
    assert [len(folder.in_group(group)) for group in ("instance", "class")] == [1, 2]


def test_the_command_line_s_template_is_for_sources_without_one_and_never_for_the_class(two):
    path = toml(
        two,
        """
        [[source]]
        path = "style"
        [[source]]
        path = "style"
        caption = "own"
        [[source]]
        path = "dogs"
        class = true
        """,
    )
    folder = read_folder(path, caption_template="{trigger} {caption}", trigger="zwx")
    assert [e.caption for e in folder] == ["zwx red thing 0", "own", "sks dog, tag 0", "sks dog, tag 1"]


def test_words_and_other_endings_give_captions(two):
    (two / "style" / "red-thing-0.wd14").write_text("from wd14")
    text = '[[source]]\npath = "style"\nwords = "a drawing"\n'
    assert read_folder(toml(two, text))[0].caption == "a drawing"
    assert read_folder(toml(two, text + 'caption_suffix = ".wd14"'))[0].caption == "from wd14"


def test_an_ending_of_two_parts_is_read_in_capitals_too(two):
    (two / "style" / "red-thing-0.Tags.txt").write_text("from Tags.txt")
    text = '[[source]]\npath = "style"\nwords = "a drawing"\ncaption_suffix = ".Tags.txt"\n'
    assert read_folder(toml(two, text))[0].caption == "from Tags.txt"


def test_repeats_multiply_those_of_a_folder_s_name(tmp_path):
    (tmp_path / "10_dog").mkdir()
    noise_picture().save(tmp_path / "10_dog" / "a.png")
    assert read_folder(toml(tmp_path, '[[source]]\npath = "."\nrepeats = 3'))[0].repeats == 30


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[source]]\npath = "dogs"\nrepeat = 3', r"source 1: unknown key 'repeat'; did you mean repeats\?"),
        ('flipp = true\n[[source]]\npath = "dogs"', r"unknown key 'flipp'; did you mean flip\?"),
        ('[[source]]\npath = "dogs"\nrepeats = "3"', "repeats is '3'; wanted a whole number"),
        ('[[source]]\npath = "dogs"\nflip = 1', "flip is 1; wanted true or false"),
        ('[[source]]\npath = "dogs"\nrepeats = true', "repeats is True; wanted a whole number"),
        ('[[source]]\npath = "dogs"\ncrop = "middle"', "crop is 'middle'; wanted one of center, random, pad"),
        ('[[source]]\npath = "dogs"\ntag_dropout = 2.0', "tag dropout is 2.0"),
        ('[[source]]\npath = "dogs"\nweight = 0', "weight is 0"),
        ('[[source]]\npath = "dogs"\nmask = "all"', "mask is 'all'"),
        ("[[source]]\nrepeats = 2", "source 1: no path"),
        ("repeats = 2", r"no sources in it; write \[\[source\]\]"),
        (
            '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "dogs"',
            r"sfumato dataset .*\.toml -o dataset\.toml converts",
        ),
        ("[[source]", "not readable as TOML"),
    ],
)
def test_what_makes_no_sense_is_one_line(two, text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        read_folder(toml(two, text))
    assert "\n" not in str(caught.value)


def test_a_source_that_is_not_there_is_named(two):
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        read_folder(toml(two, '[[source]]\npath = "nowhere"'))
    with pytest.raises(DataError, match="no such file"):
        read_folder(two / "other.toml")


def test_weights_of_sources_reach_the_batch(two):
    path = toml(two, '[[source]]\npath = "dogs"\n[[source]]\npath = "style"\nwords = "x"\nweight = 0.25')
    batch = prepare(read_folder(path), FakeBase(), resolution=64).batch(0, 0, 3)
    assert [batch.weights[batch.indices.index(i)].item() for i in range(3)] == [1, 1, 0.25]


def test_a_folder_that_is_a_source_itself_is_not_called_ignored(tmp_path):
    for name in ("dogs", "dogs/more", "dogs/other"):
        (tmp_path / name).mkdir()
        noise_picture().save(tmp_path / name / "a.png")
    listed = '[[source]]\npath = "dogs"\n[[source]]\npath = "dogs/more"\n'
    (tmp_path / "dataset.toml").write_text('caption = "{caption}"\n' + listed)
    folder = read_folder(tmp_path / "dataset.toml")
    assert [entry.name for entry in folder.ignored] == ["dogs/other"]
    assert len(folder) == 2
