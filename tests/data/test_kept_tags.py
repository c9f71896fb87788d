"""||| in a caption: tags that stay in front and at the end, whatever else is shuffled or dropped."""

import tomllib
from collections import Counter

import pytest
from made_up import FakeBase, noise_picture

from sfumato.data import Example, Options, prepare, read_folder
from sfumato.data.placeholder_captions import insert_placeholders
from sfumato.data.tags import caption_forms, count_forms, strip_keep_separator, vary_caption
from sfumato.errors import ConfigError
from sfumato.interop.datasets import convert

MARKED = "zwx, portrait ||| hat, red hair, smile ||| ink, paper"
PLAIN = "zwx, portrait, hat, red hair, smile, ink, paper"


@pytest.fixture
def folder(tmp_path):
    noise_picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(MARKED)
    return tmp_path


def toml(folder, text):
    (folder / "dataset.toml").write_text(f'[[source]]\npath = "."\n{text}')
    return folder / "dataset.toml"


def fixed_and_flex(caption, keep_tokens, mark="|||"):
    """sd-scripts' library/train_util.py, `process_caption`: (fixed tokens, flex tokens, fixed suffix tokens)."""
    fixed, suffix = [], []
    if mark in caption:
        fixed_part, flex_part = caption.split(mark, 1)
        if mark in flex_part:
            flex_part, suffix_part = flex_part.split(mark, 1)
            suffix = [token.strip() for token in suffix_part.split(",") if token.strip()]
        fixed = [token.strip() for token in fixed_part.split(",") if token.strip()]
        flex = [token.strip() for token in flex_part.split(",") if token.strip()]
    else:
        tokens = [token.strip() for token in caption.strip().split(",")]
        fixed, flex = tokens[:keep_tokens], tokens[keep_tokens:]
    return fixed, flex, suffix


@pytest.mark.parametrize(
    "caption", [MARKED, "zwx ||| hat, wet", "||| hat, wet ||| ink", "zwx, a |||", "a, b,c", "zwx|||a,b|||c", "||| a, b"]
)
@pytest.mark.parametrize("keep", [0, 1])
def test_the_same_tags_stay_as_in_sd_scripts(caption, keep):
    fixed, flex, suffix = fixed_and_flex(caption, keep)
    options = Options(shuffle_tags=True, tag_dropout=0.3, keep_tags=keep)
    text, kept = strip_keep_separator(caption, options)
    drawn = [vary_caption(text, options, 0, step, 0, kept=kept).split(", ") for step in range(300)]
    ends = [(tags[: len(fixed)], tags[len(tags) - len(suffix) :]) for tags in drawn if any(tags)]
    assert all(end == (fixed, suffix) for end in ends)
    middles = {tuple(tags[len(fixed) : len(tags) - len(suffix)]) for tags in drawn if any(tags)}
    assert {tag for middle in middles for tag in middle} == set(flex)
    assert len({middle for middle in middles if len(middle) == len(flex)}) == max(
        1, {0: 1, 1: 1, 2: 2}.get(len(flex), 6)
    )


@pytest.mark.parametrize("options", [Options(shuffle_tags=True), Options(shuffle_tags=True, tag_dropout=0.5)])
def test_the_forms_are_all_that_is_drawn(options):
    text, kept = strip_keep_separator(MARKED, options)
    possible = list(caption_forms(text, options, kept))
    assert len(possible) == count_forms(text, options, kept)
    assert {vary_caption(text, options, 0, step, 0, kept=kept) for step in range(1000)} == set(possible)


def test_what_is_learned_has_no_signs_in_it(folder):
    (example,) = read_folder(folder)
    assert example.captions == (PLAIN,)
    base = FakeBase()
    base.token_limit = 99
    assert set(prepare([example], base, resolution=64).batch(0, 0, 4).captions) == {PLAIN}
    data = prepare([example], base, resolution=64, shuffle_tags=True, keep_tags=1)
    drawn = Counter(caption for step in range(60) for caption in data.batch(0, step, 4).captions)
    assert len(drawn) == 6
    assert all(caption.startswith("zwx, portrait, ") and caption.endswith(", ink, paper") for caption in drawn)
    assert set(drawn) == set(base.prompts) - {""}


def test_a_template_and_a_trigger_are_put_in_first(folder):
    (folder / "a.txt").write_text("[trigger] ||| hat, wet")
    (example,) = read_folder(folder, caption_template="drawing, {caption}, {trigger}", trigger="zwx")
    assert example.captions == ("drawing, zwx, hat, wet, zwx",)
    assert example.kept_tags == {example.caption: (2, 0)}


def test_each_of_several_captions_has_its_own(folder):
    (folder / "a.txt").write_text(f"{MARKED}\na sentence\nb ||| c")
    (example,) = read_folder(folder, caption_lines=True)
    assert example.captions == (PLAIN, "a sentence", "b, c")
    assert example.kept_tags == {PLAIN: (2, 2), "b, c": (1, 0)}


def test_a_new_word_in_a_caption_leaves_them_as_they_are(folder):
    examples = insert_placeholders(read_folder(folder), ["<fox>"], ["red hair"])
    caption = PLAIN.replace("red hair", "<fox>")
    assert examples[0].kept_tags == {caption: (2, 2)}
    assert examples[0].caption == caption


def test_a_source_names_other_signs(folder):
    (folder / "a.txt").write_text("zwx ### a ||| b, c")
    (example,) = read_folder(toml(folder, 'keep_tags_separator = "###"'))
    assert example.caption == "zwx, a ||| b, c"
    assert example.kept_tags == {example.caption: (1, 0)}
    for signs, said in ((",", "','"), (" ", "' '")):
        with pytest.raises(ConfigError, match=f"keep_tags_separator is {said}; wanted what parts no tags"):
            read_folder(toml(folder, f'keep_tags_separator = "{signs}"'))


def test_the_fingerprint_knows_what_stays(folder):
    def fingerprint(caption):
        (folder / "a.txt").write_text(caption)
        return prepare(read_folder(folder), FakeBase(), resolution=64).fingerprint

    assert len({fingerprint(caption) for caption in (PLAIN, MARKED, PLAIN.replace(", hat", " ||| hat"))}) == 3
    (example,) = read_folder(folder)
    by_hand = [Example(example.path, PLAIN)]
    assert prepare(by_hand, FakeBase(), resolution=64).fingerprint == fingerprint(PLAIN)


def test_a_config_of_sd_scripts_says_it_too(folder):
    subset = '[[datasets.subsets]]\nimage_dir = "."\nshuffle_caption = true\nkeep_tokens_separator = "{}"\n'
    for signs, given in (("|||", {}), ("###", {"keep_tags_separator": "###"})):
        (folder / "kohya.toml").write_text("[[datasets]]\n" + subset.format(signs))
        converted = convert(folder / "kohya.toml")
        assert tomllib.loads(converted.text)["source"] == [{"path": ".", "shuffle_tags": True, **given}]
        assert not any("keep_tokens_separator" in note for note in converted.notes)
