"""`sfumato generate`: prompts, seeds, adapters and words, and what it says of them."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato import cli
from sfumato.compose import Adapter, adapter_guidance, compose
from sfumato.files import read_header
from sfumato.generation.draw import draw
from sfumato.generation.metadata.png_info import read_picture_info
from sfumato.generation.metadata.redraw import redraw
from tests.generate.shared import pixels


def test_two_adapters_and_a_seed_make_the_picture_that_the_library_makes(generate, base, loras):
    words = ["a cat", "--lora", "line.safetensors:0.8", "--lora", "o=otter.safetensors:0.6", "--seed", "7"]
    code, out, err = generate(*words, "-o", "cat.png")
    assert (code, out, "for nothing" in err) == (0, "cat.png\n", False)
    assert generate(*words, "--adapter-guidance", "2", "--adapter-guidance", "o=0", "-o", "guided.png")[0] == 0
    with compose(base, Adapter(loras / "line.safetensors", 0.8), Adapter(loras / "otter.safetensors", 0.6)) as mix:
        expected = draw(base, "a cat", 7, steps=2)[0]
        with adapter_guidance(mix, {"line": 2.0}, guidance=base.defaults.guidance):
            guided = draw(base, "a cat", 7, steps=2)[0]
    assert np.array_equal(pixels("cat.png"), np.asarray(expected))
    assert np.array_equal(pixels("guided.png"), np.asarray(guided))
    assert not np.array_equal(np.asarray(expected), np.asarray(guided))
    assert read_picture_info(Path("guided.png")).own["adapter_guidance"] == {"line": 2.0}
    assert dict(read_picture_info(Path("guided.png")).parameters.settings)["Adapter guidance"] == "line: 2"
    assert "Adapter guidance" not in dict(read_picture_info(Path("cat.png")).parameters.settings)
    code, _, err = generate(*words, "--adapter-guidance", "2", "--negative", "red", "--guidance", "1", "-o", "one.png")
    nothing = "guidance 1: the negative prompt and --adapter-guidance count for nothing; it takes one above 1."
    assert (code, nothing in err) == (0, True)
    assert read_picture_info(Path("one.png")).own["adapter_guidance"] == {}  # there is nothing to lead away from
    assert not np.array_equal(np.asarray(expected), np.asarray(draw(base, "a cat", 7, steps=2)[0]))


@pytest.mark.slow
def test_prompts_that_say_more_have_the_negative_prompt_that_a_file_asks_for(generate):
    asks = {"sfumato.negatives": '["a cat", "Sks"]'}
    save_file(load_file("otter.safetensors"), "asks.safetensors", read_header("otter.safetensors").metadata | asks)
    words = ["a cat, flat", "a cat", "a dog"]
    for name, more in {
        "said": ["--lora", "o=asks.safetensors"],
        "plain": ["--lora", "o=otter.safetensors"],
        "left": ["--lora", "o=asks.safetensors", "--negative", ""],
        "idle": ["--lora", "o=asks.safetensors:0"],
    }.items():
        code, _, err = generate(*words, *more, "--guidance", "4", "-o", name)
        assert (code, "the negative prompt is 'a cat', as its file asks" in err) == (0, name == "said")
    given = ["a cat, flat", "--lora", "o=otter.safetensors", "--negative", "a cat", "--guidance", "4"]
    assert generate(*given, "-o", "given.png")[0] == 0
    first, *others = sorted(path.name for path in Path("said").iterdir())
    assert np.array_equal(pixels(f"said/{first}"), pixels("given.png"))
    assert not np.array_equal(pixels(f"said/{first}"), pixels(f"plain/{first}"))
    assert read_picture_info(Path("said", first)).parameters.negative == "a cat"
    for name in others:  # in a batch of others, so that rounding differs
        assert np.abs(pixels(f"said/{name}").astype(int) - pixels(f"plain/{name}")).max() <= 1
    assert np.array_equal(pixels(f"left/{first}"), pixels(f"plain/{first}"))
    unguided = ["--lora", "o=asks.safetensors", "--guidance", "1", "-o", "unguided.png"]
    assert "the negative prompt is" not in generate(words[0], *unguided)[2]
    swept = ["--lora", "o=asks.safetensors", "--guidance", "4", "--sweep", "o=0,1"]
    assert generate(*words[:2], *swept, "-o", "s.png")[0] == 0
    assert read_picture_info(Path("s.png")).own["negative"] == "a cat"


def test_the_same_command_twice_gives_equal_bytes(generate):
    words = ["a cat", "--lora", "line.safetensors:0.8", "--seed", "7"]
    generate(*words, "-o", "one.png")
    generate(*words, "-o", "two.png")
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    told = redraw(Path("one.png")).words
    assert cli.main([*told[1:], "-o", "told.png"]) == 0
    assert np.array_equal(pixels("told.png"), pixels("one.png"))


def test_prompts_and_seeds_are_multiplied_into_a_folder(generate):
    Path("list.txt").write_text("# two more\n\na re/d cat\n", encoding="utf-8")
    code, out, _ = generate("a cat", "--prompts-file", "list.txt", "--seed", "7", "--count", "2", "-o", "pictures")
    names = ["001-a-cat-7", "002-a-cat-8", "003-a-re-d-cat-7", "004-a-re-d-cat-8"]
    assert code == 0
    assert [Path(line) for line in out.splitlines()] == [Path("pictures") / f"{name}.png" for name in names]
    assert sorted(path.stem for path in Path("pictures").iterdir()) == names
    assert read_picture_info(Path("pictures/004-a-re-d-cat-8.png")).own["seed"] == 8


def test_options_in_a_prompt_are_its_own(generate, base):
    """As sd-scripts writes them, in a file and on the command line."""
    Path("list.txt").write_text("a cat <lora:line:0.8> --n red, blue --w 64 --h 32 --d 7 --s 3 --l 5.5\n", "utf-8")
    code, _, _ = generate("red", "--prompts-file", "list.txt", "--seed", "1", "--guidance", "2", "-o", "pictures")
    assert code == 0
    assert sorted(path.stem for path in Path("pictures").iterdir()) == ["001-red-1", "002-a-cat-7"]
    with compose(base, Adapter("line.safetensors", 0.8)):
        expected = draw(base, "a cat", 7, negative="red, blue", steps=3, guidance=5.5, width=64, height=32)[0]
    assert np.array_equal(pixels("pictures/002-a-cat-7.png"), np.asarray(expected))
    own = read_picture_info(Path("pictures/002-a-cat-7.png")).own
    said = {
        "prompt": "a cat",
        "negative": "red, blue",
        "seed": 7,
        "steps": 3,
        "guidance": 5.5,
        "width": 64,
        "height": 32,
    }
    assert own | said == own
    other = read_picture_info(Path("pictures/001-red-1.png")).own
    assert (other["negative"], other["steps"], other["guidance"], other["height"]) == ("", 2, 2, 64)
    assert generate("red --d 3", "red", "--before-after", "--lora", "line.safetensors", "-o", "pairs.png")[0] == 0


def test_a_tag_keeps_the_factors_by_block_of_its_label(generate):
    """It says another weight, and of the blocks nothing."""
    words = ["--lora", "line.safetensors:0.8", "--blocks", "line=MIDD", "-o", "out"]
    assert generate("red <lora:line:0.5>", "red <lora:line:0.5:lbw=up:0>", *words)[0] == 0
    first, second = (read_picture_info(file).own["adapters"][0]["weight"] for file in sorted(Path("out").iterdir()))
    assert first["weight"] == 0.5
    assert (len(first["blocks"]), second["blocks"]) == (26, {"up": 0.0})


def test_an_adapter_has_the_weight_of_its_program_where_none_is_named(loras):
    from sfumato.generation.arguments.adapters import parse_adapter

    assert parse_adapter(str(loras / "line.safetensors"), weight=0.3).weight == 0.3
    assert parse_adapter(f"{loras / 'line.safetensors'}:0.8", weight=0.3).weight == 0.8
    assert parse_adapter(str(loras / "line.safetensors")).weight == 1.0


def test_weights_are_read_from_the_end_so_that_a_path_may_hold_colons(loras, tmp_path, monkeypatch):
    from sfumato.generation.arguments.adapters import parse_adapter

    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "C:odd=name:0.5.safetensors"
    odd.hardlink_to(loras / "line.safetensors")
    named = tmp_path / "line:0.5"
    named.hardlink_to(loras / "line.safetensors")
    assert parse_adapter("C:odd=name:0.5.safetensors:0.8") == Adapter("C:odd=name:0.5.safetensors", 0.8)
    assert parse_adapter("C:odd=name:0.5.safetensors:-1:0.25") == Adapter("C:odd=name:0.5.safetensors", (-1.0, 0.25))
    assert parse_adapter("line:0.5") == Adapter("line:0.5", 1.0)
    assert parse_adapter("x=line:0.5:2") == Adapter("line:0.5", 2.0, "x")


def test_tags_in_a_prompt_add_adapters_for_it_alone(generate):
    """The tagged prompt is the mix's picture, the one without tags the base's, whatever their order in the batch."""
    code, _, err = generate("red <lora:line:0.8>", "red", "red <lora:line:0.8>", "-o", "out")
    assert code == 0, err
    first, second, third = (np.asarray(Image.open(file), dtype=int) for file in sorted(Path("out").glob("*.png")))
    assert np.array_equal(first, third)
    assert abs(first - second).max() > 0
    generate("red", "--lora", "line.safetensors:0.8", "-o", "mixed.png")
    assert np.array_equal(first, np.asarray(Image.open("mixed.png"), dtype=int))
    info = read_picture_info(sorted(Path("out").glob("*.png"))[0])
    assert "<lora:line:0.8>" in info.parameters.prompt
    assert info.own["prompt"] == "red"


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [
        ("a (red:1.3) square", "(red:1.3)"),
        ("a ((red)) square", "((red))"),
        ("a [red:blue:0.4] square", "[red:blue:0.4]"),
        (r"red \(paint\)", r"\("),
        ("red BREAK blue", "BREAK"),
        ("red embedding:otter", "embedding:otter"),
        ("a {red|blue} square", "{red|blue}"),
        ("a square on __grounds/light__", "__grounds/light__"),
        ("red (at 10:30) [paint], 3:2, {one} of two|three, snake_case, _a_", None),
    ],
)
def test_what_other_programs_do_not_take_for_words_is_told(generate, prompt, mark):
    code, _, err = generate(prompt, "-o", "plain.png")
    assert code == 0, err
    assert [line.split(" is drawn as letters")[0] for line in err.splitlines() if "is drawn as letters" in line] == (
        [mark] if mark else []
    )


def test_a_text_file_is_no_prompt(generate):
    Path("prompts.txt").write_text("red\nblue")
    code, _, err = generate("prompts.txt", "-o", "text.png")
    assert (code, "prompts.txt: a file, and no prompt. --prompts-file prompts.txt draws its lines." in err) == (2, True)


def test_what_is_told_at_first_is_true_of_all_images(generate):
    said = generate("red --s 3 --l 4", "-o", "own.png")[2].splitlines()[0]
    assert "3 steps of" in said
    assert "guidance 4, 64x64" in said
    said = generate("red --s 3", "blue --s 2 --w 32", "--guidance", "4", "-o", "several")[2].splitlines()[0]
    assert ": guidance 4, on cpu" in said


def test_an_adapter_of_zeros_is_told(generate):
    tensors = load_file("line.safetensors")
    zeros = {name: torch.zeros_like(t) if "lora_up" in name else t for name, t in tensors.items()}
    save_file(zeros, "zero.safetensors")
    code, _, err = generate("red", "--lora", "zero.safetensors", "-o", "zero.png")
    assert (code, "zero: all of its changes are zero, so it draws as the base does" in err) == (0, True)
    assert "all of its changes" not in generate("red", "--lora", "line.safetensors", "-o", "line.png")[2]


@pytest.mark.slow
def test_a_new_word_is_known_for_the_call(generate, base):
    from sfumato.files.writing.embedding import write_embedding

    rows = torch.full((2, base.text_encoders[0].config.hidden_size), 0.5)
    write_embedding(Path("word.safetensors"), "<new>", {"text_encoder": rows})
    unknown = "<new>: no file brings this word, so its letters are read one by one; name its file with --embedding."
    code, _, err = generate("red <new> <|endoftext|> <-> blue", "-o", "without.png")
    assert (code, unknown in err, "<|endoftext|>" in err, "<->" in err) == (0, True, False, False)
    code, _, err = generate("red <new> <|endoftext|>", "--embedding", "word.safetensors", "-o", "with.png")
    assert (code, "no file brings" in err) == (0, False), err
    code, _, err = generate("red <other> <|endoftext|>", "--embedding", "<other>=word.safetensors", "-o", "renamed.png")
    assert (code, "is in no prompt" in err) == (0, False)
    folder = Path("word.safetensors").absolute().parent
    for spec, told in (("word.safetensors", "word.safetensors"), ("<other>=word.safetensors",) * 2,
                       (f"{folder}/word.safetensors", "word.safetensors"),
                       (f"<other>={folder}/word.safetensors", "<other>=word.safetensors")):  # fmt: skip
        code, _, err = generate("red", "--embedding", spec, "--overwrite", "-o", "told.png")
        assert (code, read_picture_info(Path("told.png")).own["embeddings"]) == (0, [told]), err
    told = [
        dict(read_picture_info(Path(f"{name}.png")).parameters.settings).get("TI hashes")
        for name in ("without", "with", "renamed", "told")
    ]
    digest = hashlib.sha256(Path("word.safetensors").read_bytes()).hexdigest()[:12]
    assert told == [None, f"word: {digest}", f"word: {digest}", None]  # by the file's name, as A1111 calls a word
    without, word, renamed = (np.asarray(Image.open(f"{name}.png")) for name in ("without", "with", "renamed"))
    assert np.array_equal(word, renamed)
    assert not np.array_equal(word, without)
    for words in (["red --n <NEW>"], ["news"]):
        code, _, err = generate(*words, "--embedding", "word.safetensors", "--overwrite", "-o", "negative.png")
        assert (code, "word.safetensors: its word <new> is in no prompt." in err) == (0, words == ["news"])


def test_a_word_with_brackets_is_escaped_in_a1111s_syntax(generate, base):
    pytest.importorskip("compel")
    from sfumato.files.writing.embedding import write_embedding

    rows = torch.full((1, base.text_encoders[0].config.hidden_size), 0.5)
    write_embedding(Path("v.safetensors"), "[v]", {"text_encoder": rows})
    words, a1111 = ["--embedding", "v.safetensors"], ["--prompt-syntax", "a1111"]
    generate("red [v]", *words, "-o", "plain.png")
    said = r"[v]: --prompt-syntax a1111 takes its brackets for emphasis; write \[v\] for the word."
    code, _, err = generate(r"red \[v\]", *words, *a1111, "-o", "escaped.png")
    assert (code, said in err, "in no prompt" in err) == (0, False, False), err
    code, _, err = generate("red [v]", *words, *a1111, "-o", "emphasis.png")
    assert (code, said in err) == (0, True), err
    assert np.array_equal(pixels("plain.png"), pixels("escaped.png"))
    assert not np.array_equal(pixels("plain.png"), pixels("emphasis.png"))


def test_weighted_words_and_words_of_some_steps_change_the_picture(generate):
    pytest.importorskip("compel")
    prompts = ["a red square", "a (red:1.6) square", "a [red:blue:1] square"]
    syntax = ["--prompt-syntax", "a1111", "--lora", "line.safetensors"]
    code, _, err = generate(*prompts, *syntax, "--adapter-guidance", "0", "-o", "drawn")
    assert code == 0, err
    plain, heavy, late = (pixels(file) for file in sorted(Path("drawn").iterdir()))
    assert not np.array_equal(plain, heavy)
    assert not np.array_equal(plain, late)
    code, _, err = generate("a circle", *syntax, "--region", f"line=0,0,1,1:{prompts[2]}", "-o", "whole.png")
    assert code == 0, err
    assert abs(pixels("whole.png") - late).max() <= 1


def test_images_that_exist_are_left_and_the_others_are_the_same_as_of_one_call(generate):
    words = ["a cat", "a dog <lora:line:0.8>", "an owl --s 3", "--lora", "o=otter.safetensors:0.6", "--count", "2"]
    assert generate(*words, "-o", "whole")[0] == 0
    names = sorted(path.name for path in Path("whole").iterdir())
    Path("part").mkdir()
    for name in names[1::2]:
        Path("part", name).write_bytes(b"mine")
    code, out, err = generate(*words, "-o", "part")
    assert (code, out) == (2, "")
    assert err.endswith("say --overwrite, or --skip-existing for the others alone.\n")
    code, out, err = generate(*words, "-o", "part", "--skip-existing")
    assert (code, "left as found: 3 of 6 images." in err) == (0, True)
    assert out.splitlines() == [str(Path("part", name)) for name in names[::2]]
    for name in names[::2]:
        # In a batch of another size the last bits of a sum are others.
        assert np.abs(pixels(f"part/{name}").astype(int) - pixels(f"whole/{name}")).max() <= 1
    assert all(Path("part", name).read_bytes() == b"mine" for name in names[1::2])
    code, out, err = generate(*words, "-o", "part", "--skip-existing")
    assert (code, out) == (0, "")
    assert err == "left as found: 6 of 6 images.\n"


def test_a_sheet_that_exists_is_left_whole(generate):
    words = [
        "a cat",
        "a dog",
        "--lora",
        "line.safetensors",
        "--sweep",
        "line=0,1",
        "-o",
        "sheet.png",
        "--skip-existing",
    ]
    assert generate(*words)[:2] == (0, "sheet.png\n")
    before = Path("sheet.png").read_bytes()
    assert generate(*words)[:2] == (0, "")
    assert Path("sheet.png").read_bytes() == before
    code, _, err = generate(*words, "--overwrite")
    assert (code, "--overwrite and --skip-existing" in err) == (2, True)
