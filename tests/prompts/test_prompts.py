"""Prompts as people write them: tags, weights, any length."""

import pytest
import torch
from torch.testing import assert_close

from sfumato.adapters.blocks import Blocks
from sfumato.adapters.prompt_tags import split_flags, split_tags
from sfumato.errors import ConfigError
from sfumato.models import load_base
from sfumato.models.prompts.editing import prompt_stages
from sfumato.models.prompts.encoding import encode_prompts, encode_stages
from sfumato.models.prompts.syntax import (
    check_no_trailing_weight,
    checked_syntax,
    escape_emphasis,
    parse_prompt_attention,
)
from tests.tiny import CPU, tiny_pocket_folder


def test_tags_are_taken_out_with_their_weights():
    """One weight is for both; two are text encoders, then U-Net, as A1111 has them; ours are U-Net, then text."""
    tagged = split_tags("a crab <lora:line:0.8>, <lora:my otter:0.4:0.6> at sea <lora:plain>")
    assert tagged.prompt == "a crab , at sea"
    assert tagged.adapters == (("line", 0.8), ("my otter", (0.6, 0.4)), ("plain", 1.0))


def test_capitals_and_the_older_name_of_a_tag_are_read_too():
    assert split_tags("a crab <LoRA:line:0.8> <lyco:otter>").adapters == (("line", 0.8), ("otter", 1.0))


def test_a_prompt_without_tags_keeps_its_very_blanks():
    assert split_tags("a  crab <3 ").prompt == "a  crab <3 "


def test_a_hypernetwork_is_told():
    with pytest.raises(ConfigError, match="<hypernet:ink:1>: a hypernetwork, which is not read here"):
        split_tags("a crab <hypernet:ink:1>")


@pytest.mark.parametrize(
    ("tag", "weight"),
    [
        ("<lora:a:te=0.2:unet=0.7>", (0.7, 0.2)),
        ("<lora:a:0.5:unet=0.7>", (0.7, 0.5)),
        ("<lora:a:0.8:lbw=MIDD>", Blocks.parse(0.8, "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0")),
        ("<lora:a:0.8:OUTALL>", Blocks.parse(0.8, "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1")),
        ("<lora:a:1:0.5,0,0,0,0,0,0,0,0,0,0,1>", Blocks.parse(1.0, "0.5,0,0,0,0,0,0,0,0,0,0,1")),
        ("<lora:a:0.2:0.7:lbw=b-lora-style>", Blocks.parse((0.7, 0.2), "b-lora-style")),
        ("<lora:a:0.8:lbw=down:0,up.1:1.2>", Blocks(0.8, {"down": 0.0, "up.1": 1.2})),
        ("<lora:a:0.5:te=0.2>", 0.2),
        ("<lora:a:0.5:UNet=0.7>", (0.7, 0.5)),
        ("<lora:a:lbw=up:0.5,rest:0:te=0:unet=1>", Blocks((1.0, 0.0), {"up": 0.5}, rest=0.0)),
    ],
)
def test_a_tag_may_have_names_and_weights_by_block(tag, weight):
    assert split_tags(f"a crab {tag}").adapters == (("a", weight),)


@pytest.mark.parametrize(
    ("prompt", "weights"),
    [
        ("<lora:a:0.5> <lora:b:1> <lora:a:0.25>", {"a": 0.75, "b": 1.0}),
        ("<lora:a:0.5:1> <lora:a:0.25>", {"a": (1.25, 0.75)}),
        ("<lora:a:1> <lora:a:-1>", {"a": 0.0}),
    ],
)
def test_weights_of_a_name_that_is_tagged_twice_are_added(prompt, weights):
    assert dict(split_tags(prompt).adapters) == weights
    assert len(split_tags(prompt).adapters) == len(weights)


@pytest.mark.parametrize("tags", ["<lora:a:1:lbw=MIDD> <lora:a:1>", "<lora:a:1> <lora:a:1:lbw=MIDD>"])
def test_a_second_tag_of_weights_by_block_is_refused(tags):
    with pytest.raises(ConfigError, match=r"<lora:a:.*>: this adapter has another tag in the prompt"):
        split_tags(tags)


@pytest.mark.parametrize(
    "prompt",
    [
        *("<lora:a:strong>", "<lora:a:9> <lora:a:2>", "<lora:a:1:2:3>"),
        *("<lora:a:1:lbw=1,0,1>", "<lora:a:1:lbw=UPS>", "<lora:a:1:start=5>"),
    ],
)
def test_a_tag_whose_weight_is_none_is_refused(prompt):
    with pytest.raises(ConfigError, match=r"<lora:a"):
        split_tags(prompt)


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a (crab:1.4), at sea", [("a ", 1), ("crab", 1.4), (", at sea", 1)]),
        ("a (crab) [at sea]", [("a ", 1), ("crab", 1.1), ("at sea", 1 / 1.1)]),
        ("((crab))", [("crab", 1.21)]),
        ("(a (crab:2) there:0.5)", [("a ", 0.5), ("crab", 1), (" there", 0.5)]),
        ("(crab:-0.5)(crab:1.)( crab : +1.2 )", [("crab", -0.5), ("crab", 1), (" crab ", 1.2)]),
        ("(masterpiece:1.2)1girl", [("masterpiece", 1.2), ("1girl", 1)]),
        ("(cat)(fish)", [("catfish", 1.1)]),
        ("(cat) (fish)", [("cat", 1.1), ("fish", 1.1)]),
        ("cat(fish:1.0) [(s)]", [("catfish s", 1)]),
        ("no brackets: none", [("no brackets: none", 1)]),
        ("[a:b]", [("a:b", 1 / 1.1)]),
        (r"[a\|b]", [("a|b", 1 / 1.1)]),
        (r"a \(crab\) \[at sea\] \\", [("a (crab) [at sea] \\", 1)]),
        (" ", []),
        (
            "a (crab BREAK sea:1.2)BREAK BREAKS",
            [("a ", 1), ("crab", 1.2), ("BREAK", 1.2), ("sea", 1.2), ("BREAK", 1), ("BREAKS", 1)],
        ),
    ],
)
def test_emphasis_of_a1111_is_texts_and_weights(prompt, pieces):
    found = parse_prompt_attention(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    "text",
    [
        *(r"a (crab:1.2) \o/ [red|blue:0.5] \(", "a [v] BREAK and AND", "(", "a: b | c"),
        *("in 16:9", "a : -.5 ", "a:2."),
    ],
)
def test_an_escaped_text_says_itself_in_a1111s_syntax(text):
    """AND and BREAK are words in small letters, as the text encoder reads them."""
    read = text.replace("AND", "and").replace("BREAK", "break")
    check_no_trailing_weight(escape_emphasis(text))
    assert parse_prompt_attention(escape_emphasis(text)) == [(read, 1)]
    assert prompt_stages(escape_emphasis(text), 20) == [(20, escape_emphasis(text))]


@pytest.mark.parametrize("prompt", ["(crab", "crab)", "[crab)", "crab:1.2)"])
def test_brackets_that_do_not_pair_are_refused(prompt):
    with pytest.raises(ConfigError, match=r"bracket '(.)'; write \\\1 for the character"):
        parse_prompt_attention(prompt)


@pytest.mark.parametrize("prompt", ["a [crab:lobster:0.5]", "[crab:10]", "[crab|lobster]", "[(crab:1.2)|lobster]"])
def test_words_that_change_are_refused_where_there_are_no_steps(prompt):
    with pytest.raises(ConfigError, match="words that change between the steps"):
        parse_prompt_attention(prompt)


def test_several_prompts_in_one_are_refused():
    assert parse_prompt_attention("sand and SANDY land") == [("sand and SANDY land", 1.0)]
    with pytest.raises(ConfigError, match="AND adds up the predictions of several prompts in A1111"):
        parse_prompt_attention("a crab :1.2 AND fog :0.5")


@pytest.mark.parametrize("prompt", ["a crab, fog:1.2", "a crab :.5 ", "in [fog::5] 16:9", "a : -2."])
def test_a_weight_of_the_whole_prompt_is_refused_and_is_text_in_a_negative_one(pocket, prompt):
    """By `re_weight` of A1111's modules/prompt_parser.py, which reads it where there is no AND, too."""
    pytest.importorskip("compel")
    assert checked_syntax(prompt, "a1111", is_negative=True) == prompt
    for read in (lambda: checked_syntax(prompt, "a1111"), lambda: encode_stages(pocket, [prompt], "", 10)):
        with pytest.raises(ConfigError, match=r"by which A1111 weighs the whole prompt.* backslash before the number"):
            read()
    assert encode_stages(pocket, ["a crab"], prompt, 10)


@pytest.mark.parametrize("prompt", ["(a crab:1.2)", "a crab:1.2,", "a crab 1.2", "a crab:1.2.3", "a:b", r"16:\9"])
def test_other_numbers_at_the_end_of_a_prompt_are_no_weights_of_it(prompt):
    assert check_no_trailing_weight(prompt) is None


@pytest.mark.parametrize("weight", ["1.2.3", "9" * 400])
def test_a_weight_of_two_points_or_without_end_is_none(weight):
    with pytest.raises(ConfigError, match=rf"{weight[:40]}.*a weight is a number"):
        parse_prompt_attention(f"(crab:{weight})")


def test_what_is_said_after_some_steps_is_read_before_the_first():
    with pytest.raises(ConfigError, match=r"1\.2\.3.*a weight is a number"):
        checked_syntax("[crab:(owl:1.2.3):10]", "a1111")


@pytest.fixture(scope="module")
def pocket(pocket_folder):
    return load_base(pocket_folder, precision=CPU)


@pytest.fixture(scope="module")
def sdxl(family_folder):
    return load_base(family_folder("sdxl"), precision=CPU)


@pytest.mark.parametrize("name", ["pocket", "sdxl"])
def test_without_weights_compel_encodes_as_the_base_does(name, request):
    pytest.importorskip("compel")
    base = request.getfixturevalue(name)
    prompts = ["red square", "blue circle"]
    text, negative = encode_prompts(base, prompts, "", "compel")
    ours, nothing = base.encode_text(prompts), base.unconditional(2)
    assert_close(text.hidden, ours.hidden)
    assert_close(negative.hidden, nothing.hidden)
    if text.pooled is not None:
        assert_close(text.pooled, ours.pooled)
        assert_close(negative.pooled, nothing.pooled)


def test_a_negative_prompt_is_encoded_as_a_prompt_is(sdxl):
    """Zeros are for none alone."""
    pytest.importorskip("compel")
    _, negative = encode_prompts(sdxl, ["red square", "crab"], "blue circle", "compel")
    ours = sdxl.encode_text(["blue circle"] * 2)
    assert_close(negative.hidden, ours.hidden)
    assert_close(negative.pooled, ours.pooled)


@pytest.mark.parametrize("syntax", ["compel", "a1111"])
def test_a_layer_is_skipped_as_the_base_skips_it(tmp_path, syntax):
    pytest.importorskip("compel")
    base = load_base(tiny_pocket_folder(tmp_path), precision=CPU, clip_skip=1)
    text, _ = encode_prompts(base, ["red square"], "", syntax)
    assert_close(text.hidden, base.encode_text(["red square"]).hidden)


@pytest.mark.parametrize("prompt", ["c++ code", "crab-, house", 'a sign "open"', "a.swap\\(b\\)", "(red:1.0)"])
@pytest.mark.parametrize("name", ["pocket", "sdxl"])
def test_what_compel_would_take_for_its_own_is_text_in_a1111(name, prompt, request):
    pytest.importorskip("compel")
    base = request.getfixturevalue(name)
    text, _ = encode_prompts(base, [prompt], "", "a1111")
    ours = base.encode_text([prompt.replace("\\", "") if prompt[0] != "(" else "red"])
    assert_close(text.hidden, ours.hidden)
    if text.pooled is not None:
        assert_close(text.pooled, ours.pooled)


@pytest.mark.parametrize("name", ["pocket", "sdxl"])
def test_what_break_parts_is_encoded_by_itself(name, request):
    pytest.importorskip("compel")
    base = request.getfixturevalue(name)
    whole, _ = encode_prompts(base, ["a (red:1.3) square BREAK blue circle"], "", "a1111")
    parts = [encode_prompts(base, [prompt], "", "a1111")[0] for prompt in ("a (red:1.3) square", "blue circle")]
    assert_close(whole.hidden, torch.cat([part.hidden for part in parts], 1))
    if whole.pooled is not None:
        assert_close(whole.pooled, parts[0].pooled)


@pytest.mark.parametrize(("prompt", "same"), [("red BREAK", "red"), ("(red) BREAK ", "(red)"), ("BREAK", "")])
def test_nothing_is_behind_a_break_that_ends_the_prompt(pocket, prompt, same):
    """As in `tokenize_line` of A1111's modules/sd_hijack_clip.py."""
    pytest.importorskip("compel")
    ours, alone = (encode_prompts(pocket, [text], "", "a1111")[0].hidden for text in (prompt, same))
    assert_close(ours, alone)


def test_one_syntax_weighs_as_the_other(pocket):
    pytest.importorskip("compel")
    (ours, _), (theirs, _) = (
        encode_prompts(pocket, [prompt], "", syntax)
        for prompt, syntax in (
            ("a (red:1.5) square [there]", "a1111"),
            ("a (red)1.5 square (there)0.9090909", "compel"),
        )
    )
    assert_close(ours.hidden, theirs.hidden)


def test_a_weight_changes_the_embedding_and_a_long_prompt_is_seen_to_its_end(pocket):
    pytest.importorskip("compel")
    plain, _ = encode_prompts(pocket, ["a red square"], "", "a1111")
    heavy, _ = encode_prompts(pocket, ["a (red:1.5) square"], "", "a1111")
    assert not torch.equal(plain.hidden, heavy.hidden)
    long, negative = encode_prompts(pocket, ["red square, " * 60], "", "compel")
    assert long.hidden.shape[1] > 77
    assert long.hidden.shape == negative.hidden.shape


def test_what_compel_cannot_read_is_one_line(pocket):
    pytest.importorskip("compel")
    with pytest.raises(ConfigError, match="compel"):
        encode_prompts(pocket, ['("a", "b").blend(1, nothing)'], "", "compel")


def test_sd_scripts_options_are_taken_out_of_a_prompt():
    plain, settings = split_flags("a crab --n blurry, a --- b  --w 512 --H 768 --d 7 --s 20 --l 7.5")
    assert plain == "a crab"
    assert settings == {
        "negative": "blurry, a --- b", "width": 512, "height": 768, "seed": 7, "steps": 20, "guidance": 7.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "prompt", ["a crab", "a crab -- at sea", "a low--key crab--", "--", "a --3 b --no-hat", "(a)--"]
)
def test_dashes_that_are_no_options_stay(prompt):
    assert split_flags(prompt) == (prompt, {})


def test_blanks_are_looked_at_once():
    """20,000 of them: for a quarter of a minute where each is the beginning of a search."""
    blanks = " " * 20_000
    assert parse_prompt_attention(f"a{blanks}b") == [(f"a{blanks}b", 1.0)]
    assert parse_prompt_attention(f"a{blanks}BREAK BREAK{blanks}b") == [
        ("a", 1.0),
        ("BREAK", 1.0),
        ("BREAK", 1.0),
        ("b", 1.0),
    ]
    assert split_flags(f"a{blanks}b{blanks}--w 64") == (f"a{blanks}b", {"width": 64})
