"""{a|b} in a caption: one of its alternatives, drawn anew for each sample, before tags are shuffled and dropped."""

import re
import tomllib
from collections import Counter
from itertools import permutations, product

import pytest
from made_up import FakeBase, noise_picture
from sfumato.pipelines.check import main as check

from sfumato.data import Example, Options, prepare, read_folder
from sfumato.data import captions as wildcards
from sfumato.data.placeholder_captions import insert_placeholders
from sfumato.data.tags import caption_forms, count_forms, unshuffled_captions, vary_caption
from sfumato.errors import ConfigError, DataError
from sfumato.interop.datasets import convert
from sfumato.training.loss.validation import default_prompts
from sfumato.training.methods.subject import Subject, read_subject, with_caption

ON = Options(wildcards=True)
AS_LETTERS = (
    "1 caption has braces that are read as letters, such as '{red|blue}' of a.png; with --wildcards each sample has "
    "one of the alternatives"
)
NOTHING = "wildcards changes nothing: no caption holds any, such as {red|blue}"


@pytest.fixture
def folder(tmp_path):
    """Two pictures, of which the first has a wildcard in its caption."""
    for number, name in enumerate("ab"):
        noise_picture(seed=number).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a {red|blue} crab")
    (tmp_path / "b.txt").write_text("a house")
    return tmp_path


def read(folder, **options):
    return read_folder(folder, wildcards=True, **options)


def drawn(data, samples, seed=0):
    """How often each caption comes in so many samples."""
    return Counter(caption for step in range(samples // 4) for caption in data.batch(seed, step, 4).captions)


def of_sd_scripts(caption, choose):
    """library/train_util.py, `process_caption`: what stands where enable_wildcard is given."""
    opened, closed = "⦅", "⦆"
    caption = caption.replace("{{", opened).replace("}}", closed)
    caption = re.sub(r"\{([^}]+)\}", lambda match: choose(match.group(1).split("|")), caption)
    return caption.replace(opened, "{").replace(closed, "}")


def all_of_sd_scripts(caption):
    counts = []
    of_sd_scripts(caption, lambda parts: counts.append(len(parts)) or parts[0])
    for choice in product(*map(range, counts)):
        picks = iter(choice)
        yield of_sd_scripts(caption, lambda parts: parts[next(picks)])  # noqa: B023


@pytest.mark.parametrize(
    "caption",
    [
        "a crab",
        "a {red|blue} crab",
        "{a|b|c}{1|2}",
        "a {red|} crab",
        "a {red} crab {} | {{|}} {a {{b}}|c}",
        "{{a|b}}, {c|d} }} {{",
        "{a, b|c}, {d|d|e}",
        "{ a | b }",
    ],
)
def test_the_forms_are_those_of_sd_scripts(caption):
    wanted = list(all_of_sd_scripts(caption))
    assert Counter(wildcards.expand_wildcards(caption)) == Counter(wanted)
    assert wildcards.count_choices(caption) == len(wanted)
    assert wildcards.choose_alternatives(caption, lambda count: 0) == wanted[0]
    assert wildcards.choose_alternatives(caption, lambda count: count - 1) == wanted[-1]
    assert max(map(len, wanted)) == len(wildcards.longest_form(caption, len))


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("{photo|{ink|pen} drawing} of {1|2}", "photo of 1|photo of 2|ink drawing of 1|ink drawing of 2"
         "|pen drawing of 1|pen drawing of 2"),
        ("{a|{b|c}}", "a|b|c"),
        ("{ {a|b}|c}", " a| b|c"),
        ("{{{a|b}}}", "{a}|{b}"),
        ("{a|{{x}}}", "a|{x}"),
        ("{a|{b {{x}}|c}}", "a|b {x}|c"),
    ],
)  # fmt: skip
def test_an_alternative_may_hold_wildcards(caption, wanted):
    assert list(wildcards.expand_wildcards(caption)) == wanted.split("|")
    assert wildcards.count_choices(caption) == wanted.count("|") + 1


@pytest.mark.parametrize("caption", ["{a|b} {c|d|e}", "{a|{b|{c|d}}} {1|2}", "a", "", "{a|b}{c|d}{e|f}{g|h}{i|j}{k|l}"])
def test_few_forms_have_each_alternative(caption):
    few = wildcards.covering_forms(caption)
    assert set(few) <= set(wildcards.expand_wildcards(caption))
    assert few[0] == next(wildcards.expand_wildcards(caption))
    assert all(any(letter in text for text in few) for letter in re.findall(r"[a-z0-9]", caption))
    assert len(few) <= 4


@pytest.mark.parametrize(
    ("caption", "what"),
    [
        (
            "a {red|blue crab",
            "a { that is never closed, '{red|blue crab'. Close it with }, or write {{ for the letter.",
        ),
        ("a red|blue} crab", "a } that closes nothing, 'a red|blue}'. Open it with {, or write }} for the letter."),
        ("a {red|{{blue} crab}", "a } that closes nothing, 'a {red|{{blue} crab}'. Open it with {, or write }} for"),
        ("{ " * 5000, "wildcards in more than 20 others"),
    ],
)
def test_braces_that_do_not_match_are_refused_by_name(caption, what, folder, capsys):
    (folder / "a.txt").write_text(caption)
    with pytest.raises(DataError) as refused:
        read(folder)
    assert str(refused.value).startswith(f"a.png: its caption has {what}")
    assert check([str(folder), "--wildcards"]) == 1
    assert f"a.png: its caption has {what}" in capsys.readouterr().out
    assert read_folder(folder)[0].caption == caption.strip()
    assert check([str(folder)]) == 0


def test_each_alternative_is_drawn_as_often(folder, base):
    found = drawn(prepare(read(folder), base, resolution=64), 800)
    assert found["a house"] == found["a red crab"] + found["a blue crab"] == 400
    assert 160 < found["a red crab"] < 240


def test_one_within_another_shares_its_chance():
    told = Counter(vary_caption("{a|{b|c}}", ON, 0, step, 1) for step in range(4000))
    assert abs(told["a"] - 2000) < 120
    assert abs(told["b"] - 1000) < 110
    assert abs(told["c"] - 1000) < 110


def test_two_in_a_caption_are_drawn_by_themselves():
    told = Counter(vary_caption("{a|b} {c|d}", ON, 3, step, 0) for step in range(4000))
    assert len(told) == 4
    assert all(abs(count - 1000) < 110 for count in told.values())


def test_which_one_is_a_function_of_seed_step_and_place(folder, base):
    data = prepare(read(folder), base, resolution=64)
    assert data.batch(3, 5, 4, 2, 2).captions == data.batch(3, 5, 4).captions[2:]
    assert drawn(data, 40, 1) == drawn(data, 40, 1)
    one = [data.batch(1, step, 4).captions for step in range(20)]
    assert data.drawn_captions(1, 20, 4) == {caption for batch in one for caption in batch}
    for kind in ("seed", "step", "place"):
        asked = ({"seed": 0, "step": 0, "place": 0, kind: number} for number in range(40))
        assert len({vary_caption("{a|b|c|d|e|f}", ON, **each) for each in asked}) == 6


def test_a_line_is_chosen_before_its_wildcards(folder, base):
    (folder / "a.txt").write_text("{a|b|c|d} crab\na crab that is {red|blue}")
    data = prepare(read(folder, caption_lines=True), base, resolution=64)
    found = drawn(data, 1600)
    assert len(found) == 7
    assert 320 < sum(count for caption, count in found.items() if "that is" in caption) < 480


def shuffled(caption, kept):
    """All orders of the tags of each form, by a plain loop."""
    for text in all_of_sd_scripts(caption):
        tags = [tag.strip() for tag in text.split(",") if tag.strip()]
        yield from (", ".join([*tags[:kept], *rest]) for rest in permutations(tags[kept:]))


def test_tags_of_an_alternative_are_shuffled_like_others(folder, base):
    caption = "zwx, {hat, red hair|cap|}, smile"
    (folder / "a.txt").write_text(caption)
    data = prepare(read(folder), base, resolution=64, shuffle_tags=True, keep_tags=1)
    wanted = set(shuffled(caption, 1)) | {"a house"}
    assert len(wanted) == 10
    assert set(drawn(data, 600)) == wanted
    assert wanted <= set(base.prompts)
    options = Options(wildcards=True, shuffle_tags=True, keep_tags=1)
    assert set(caption_forms(caption, options)) == set(shuffled(caption, 1))
    assert count_forms(caption, options) == len([*shuffled(caption, 1)])


@pytest.mark.parametrize("options", [Options(wildcards=True, shuffle_tags=True, tag_dropout=0.5), ON])
def test_the_forms_are_all_that_is_drawn(options):
    caption = "{zwx|zwx, new} ||| {a, b|c}, d ||| ink"
    possible = list(caption_forms(caption, options))
    assert count_forms(caption, options) == len(possible)
    assert {vary_caption(caption, options, 0, step, 0) for step in range(3000)} == set(possible)


def test_marks_keep_the_tags_of_the_alternative_that_was_drawn(folder, base):
    (folder / "a.txt").write_text("{zwx, portrait|zwx} ||| hat, smile ||| ink")
    data = prepare(read(folder), base, resolution=64, shuffle_tags=True)
    orders = [("hat", "smile"), ("smile", "hat")]
    wanted = {f"{first}, {', '.join(order)}, ink" for first in ("zwx, portrait", "zwx") for order in orders}
    assert set(drawn(data, 200)) == wanted | {"a house"}


def test_all_are_embedded_beforehand_or_those_that_will_be_drawn(folder, base):
    prepare(read(folder), base, resolution=64)
    assert sorted(base.prompts) == ["a blue crab", "a house", "a red crab"]
    base.prompts.clear()
    known = prepare(read(folder), base, resolution=64, will_draw=(0, 1, 2))
    assert set(base.prompts) == set(known.batch(0, 0, 2).captions)
    assert known.batch(0, 0, 2).text.hidden.flatten().tolist() == [len(text) for text in known.batch(0, 0, 2).captions]


def test_of_too_many_only_some_are_embedded_beforehand_and_that_is_told(folder, base):
    (folder / "a.txt").write_text("{a|b|c|d}" * 20)
    data = prepare(read(folder), base, resolution=64)
    told = f"wildcards make {4**20 + 1:,} captions, more than are embedded beforehand; they are encoded in the loop"
    assert told in data.notes
    assert len(base.prompts) == 5
    assert data.batch(0, 0, 4).text.hidden.flatten().tolist() == [len(text) for text in data.batch(0, 0, 4).captions]


def test_the_cache_keeps_them(folder, tmp_path):
    first, second = FakeBase(), FakeBase()
    for base in (first, second):
        prepare(read(folder), base, resolution=64, cache=tmp_path / "cache")
    assert len(first.prompts) == 3
    assert second.prompts == []


def test_what_is_shown_and_measured_has_the_first(folder, base):
    data = prepare(read(folder), base, resolution=64)
    assert data.captions == ["a red crab", "a house"]
    assert [batch.captions for batch in data.middles(2, 10**6)] == [["a red crab", "a house"]]
    assert read(folder).captions == ["a red crab", "a blue crab", "a house"]


def test_without_it_braces_are_letters_and_all_is_as_it_was(folder, base):
    assert [example.captions for example in read_folder(folder)] == [("a {red|blue} crab",), ("a house",)]
    assert set(drawn(prepare(read_folder(folder), base, resolution=64), 40)) == {"a {red|blue} crab", "a house"}
    assert repr(Options()) == (  # of which the fingerprint is made
        "Options(flip=None, crop=None, caption_dropout=None, shuffle_tags=None, keep_tags=None, tag_dropout=None, "
        "separator=',', weight=1.0)"
    )


def test_the_fingerprint_knows_it(folder, base):
    def fingerprint(**options):
        return prepare(read_folder(folder, **options), base, resolution=64).fingerprint

    before = fingerprint(wildcards=True)
    assert before != fingerprint()
    (folder / "a.txt").write_text("a {red|green} crab")
    assert fingerprint(wildcards=True) != before


def test_letters_are_told_and_wildcards_that_are_none(folder, tmp_path, capsys):
    assert read_folder(folder).notes == (AS_LETTERS,)
    assert read(folder).notes == ()
    check([str(folder)])
    assert AS_LETTERS in capsys.readouterr().out
    assert check([str(folder), "--wildcards"]) == 0
    said = capsys.readouterr().out
    assert "as letters" not in said
    assert "captions 2 different, 3 by their wildcards, such as 'a {red|blue} crab'" in said
    (folder / "a.txt").write_text("a {tiny} crab")
    assert read_folder(folder).notes == read(folder).notes == ()
    (folder / "a.txt").write_text("a crab")
    assert read(folder).notes == (NOTHING,)


@pytest.mark.parametrize(
    ("text", "captions", "notes"),
    [
        ('[[source]]\npath = "."\nwildcards = true', 3, []),
        ('[[source]]\npath = "."\nwildcards = false', 2, []),
        ('[[source]]\npath = "."', 2, [AS_LETTERS]),
        ('wildcards = true\n[[source]]\npath = "."\n[[source]]\npath = "c"', 4, []),
        ('wildcards = true\n[[source]]\npath = "c"', 1, [NOTHING]),
        ('wildcards = true\n[[source]]\npath = "."\nclass = true\n[[source]]\npath = "c"', 3, [
            AS_LETTERS.replace("--wildcards", "wildcards = true in the source of their class"), NOTHING,
        ]),
    ],
)  # fmt: skip
def test_a_source_says_it_for_itself(text, captions, notes, folder, capsys):
    (folder / "c").mkdir()
    noise_picture(seed=5).save(folder / "c" / "c.png")
    (folder / "c" / "c.txt").write_text("a tree")
    (folder / "dataset.toml").write_text(text)
    found = read_folder(folder / "dataset.toml")
    assert len(found.captions) == captions
    assert [note for note in found.notes if "wildcards" in note] == notes
    check([str(folder / "dataset.toml")])
    said = capsys.readouterr().out
    assert all(note in said for note in notes)
    assert said.count("wildcards changes") + said.count("read as letters") == len(notes)


def test_the_template_takes_them_too(folder):
    (folder / "b.txt").unlink()
    (folder / "b.png").rename(folder / "red-house.png")
    found = read(folder, caption_template="{photo|{ink|pencil} drawing} of {caption}, {trigger}", trigger="zwx")
    ways = ("photo", "ink drawing", "pencil drawing")
    assert set(caption_forms(found[0].caption, ON)) == {
        f"{way} of a {colour} crab, zwx" for way in ways for colour in ("red", "blue")
    }
    assert set(caption_forms(found[1].caption, ON)) == {f"{way} of red house, zwx" for way in ways}
    prompts = default_prompts(["a"], found[0].template, found[0].trigger)
    assert prompts == ["a", "photo of a dog, zwx", "photo of a car, zwx"]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{capton}", "{capton} is unknown"),
        ("{photo|{capton}} of {caption}", "{capton} is unknown"),
        ("{photo|picture of {caption}", "has a { that is never closed"),
        ("photo} of {caption}", "has a } that closes nothing"),
        ("{photo|picture} of {trigger}", "and there is none"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template, what, folder):
    with pytest.raises(ConfigError, match=re.escape(what)):
        read(folder, caption_template=template)


def test_a_template_with_alternatives_names_the_option(folder):
    with pytest.raises(ConfigError, match=r"\{a\|b\} is unknown; .* with --wildcards one of \{a\|b\} is taken\.$"):
        read_folder(folder, caption_template="{a|b} {caption}")


def test_a_long_alternative_counts_in_what_is_cut(folder, base, capsys):
    (folder / "a.txt").write_text("{crab|one two three four five} six {seven|eight nine ten}")
    (note,) = (note for note in prepare(read(folder), base, resolution=64).notes if "longer" in note)
    assert note.startswith("a.png: the caption is longer than 8 tokens; its end is not seen: ... 'ten'")
    (folder / "a.txt").write_text("{a|" + "crab " * 40 + "} and {a|" + "house " * 40 + "}")
    check([str(folder), "--wildcards"])
    assert "a.png: the caption is longer than 75 tokens" in capsys.readouterr().out
    (folder / "a.txt").write_text("{a|" + "crab " * 40 + "|" + "house " * 40 + "}")
    check([str(folder), "--wildcards"])
    assert "longer than" not in capsys.readouterr().out
    check([str(folder)])
    assert "longer than" in capsys.readouterr().out


def test_a_trigger_may_be_in_any_alternative(folder):
    (folder / "a.txt").write_text("a {red crab|{{zwx}}}, {old|sks} dog")
    assert not any("no caption holds" in note for note in read(folder, trigger="sks dog").notes)
    assert any("no caption holds" in note for note in read_folder(folder, trigger="sks dog").notes)
    assert read(folder, trigger="sks dog").triggers == ["sks dog"]


def test_a_new_word_stands_in_every_alternative(folder):
    (folder / "b.txt").write_text("{a crab|crab}, ink")
    found = insert_placeholders(read(folder), ["<crab>"], ["crab"])
    assert found[0].caption == "a {red|blue} <crab>"
    assert found.captions == ["a red <crab>", "a blue <crab>", "a <crab>, ink", "<crab>, ink"]
    (folder / "b.txt").write_text("{a crab|an animal}, ink")
    with pytest.raises(DataError, match="1 of 4 captions hold no placeholder, first 'an animal, ink'"):
        insert_placeholders(read(folder), ["<crab>"], ["crab"])


def test_a_subjects_class_has_each_alternative(folder):
    (folder / "a.txt").write_text("sks crab, {flat|glossy}")
    found = read_subject(folder, "sks crab", wildcards=True)
    assert Subject("sks crab", "crab").class_prompts(found.captions) == ["crab", "crab, flat", "crab, glossy"]
    (folder / "dataset.toml").write_text('[[source]]\npath = "."')
    assert read_subject(folder / "dataset.toml", "sks crab", wildcards=True).captions == found.captions
    assert with_caption(found, "{sks|x} crab").captions == ["{sks|x} crab"] * 2


def test_parts_of_a_tag_stay_together(folder, base):
    (folder / "a.txt").write_text("zwx, red hat;;;blue coat;;; boots, smile")
    (folder / "dataset.toml").write_text('[[source]]\npath = "."\nsecondary_separator = ";;;"')
    examples = read_folder(folder / "dataset.toml")
    assert examples.captions == ["zwx, red hat, blue coat, boots, smile", "a house"]
    plain = prepare(examples, base, resolution=64)
    assert set(drawn(plain, 8)) == set(base.prompts) == set(examples.captions)
    together = "red hat, blue coat, boots"
    data = prepare(examples, base, resolution=64, shuffle_tags=True, keep_tags=1)
    assert set(drawn(data, 100)) == {f"zwx, {together}, smile", f"zwx, smile, {together}", "a house"}
    dropping = prepare(examples, base, resolution=64, tag_dropout=0.5)
    assert {text.count("hat") + text.count("coat") + text.count("boots") for text in drawn(dropping, 200)} == {0, 3}
    assert plain.fingerprint != prepare(read_folder(folder), base, resolution=64).fingerprint
    both = Options(wildcards=True, secondary_separator=";;;")
    assert (
        unshuffled_captions("{a;;;b|c};;;d", both) == list(caption_forms("{a;;;b|c};;;d", both)) == ["a, b, d", "c, d"]
    )
    assert {vary_caption("{a;;;b|c};;;d", both, 0, step, 0) for step in range(20)} == {"a, b, d", "c, d"}


@pytest.mark.parametrize("signs", [" ", ",", ";, ", "|||"])
def test_what_parts_tags_parts_no_tag(signs, folder):
    (folder / "dataset.toml").write_text(f'[[source]]\npath = "."\nsecondary_separator = "{signs}"')
    with pytest.raises(ConfigError, match=re.escape(f"secondary_separator is {signs!r}; wanted what parts no tags")):
        read_folder(folder / "dataset.toml")


def test_a_config_of_sd_scripts_says_both(folder):
    (folder / "kohya.toml").write_text(
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "."\nenable_wildcard = true\nsecondary_separator = ";;;"\n'
        'caption_prefix = "{photo|picture} of"\n[[datasets.subsets]]\nimage_dir = "c"'
    )
    (folder / "c").mkdir()
    converted = convert(folder / "kohya.toml")
    first, second = tomllib.loads(converted.text)["source"]
    assert first == {
        "path": ".",
        "caption": "{photo|picture} of {caption}",
        "caption_lines": True,
        "wildcards": True,
        "secondary_separator": ";;;",
    }
    assert second == {"path": "c"}
    assert not any("wildcard" in note or "separator" in note for note in converted.notes)


def test_an_example_by_hand_may_have_them(folder, base):
    example = Example(folder / "a.png", "{a|b}", options=ON)
    assert set(drawn(prepare([example], base, resolution=64), 40)) == {"a", "b"}
    with pytest.raises(DataError, match="never closed"):
        prepare([Example(folder / "a.png", "{a|b", options=ON)], base, resolution=64)
