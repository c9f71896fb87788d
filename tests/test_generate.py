"""`sfumato generate`: pictures with their settings inside, the same twice, and every wrong use one line."""

import hashlib
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato import cli
from sfumato.bases import load_base
from sfumato.command_line.axes import Axis, parse_axis
from sfumato.compose import Adapter, adapter_guidance, compose
from sfumato.drawing import session
from sfumato.drawing.pictures import draw
from sfumato.drawing.pnginfo import read_picture_info
from sfumato.drawing.redraw import redraw
from sfumato.drawing.start import size_like
from sfumato.files import read_header
from sfumato.files.changes import LoraModule
from sfumato.files.metadata import short_hash
from sfumato.files.write_kohya import write_lora
from sfumato.precision import decide
from tests.tiny import tiny_pipeline, tiny_pocket_folder, write_folder

FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    return tiny_pocket_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(base_folder) -> Any:
    return load_base(base_folder, precision=decide("auto", device="cpu"))


@pytest.fixture(scope="module")
def loras(tmp_path_factory, base) -> Path:
    """A folder with line.safetensors and otter.safetensors, strong enough to be seen."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("line", "otter")):
        generator = torch.Generator().manual_seed(seed)
        modules = {}
        for path, layer in base.unet.named_modules():
            if path.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out.0")):
                out, inner = layer.weight.shape
                down, up = torch.randn(2, inner, generator=generator), torch.randn(out, 2, generator=generator)
                modules["unet", path] = LoraModule(down, up, 2.0)
        write_lora(folder / f"{name}.safetensors", modules, family="pocket")
    return folder


@pytest.fixture
def generate(base_folder, loras, tmp_path, monkeypatch, capsys):
    """generate(*words): (exit code, stdout, stderr), in an empty folder that has the two adapters."""
    monkeypatch.setenv("SFUMATO_POCKET", str(base_folder))
    monkeypatch.chdir(tmp_path)
    for file in loras.iterdir():
        (tmp_path / file.name).hardlink_to(file)

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["generate", *words, *FAST])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


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


def test_an_adapter_counts_in_the_steps_that_its_file_asks_for(generate):
    half = {"sfumato.over_steps": "0-0.4"}  # the first of two steps
    save_file(load_file("otter.safetensors"), "half.safetensors", read_header("otter.safetensors").metadata | half)
    words = ["a cat", "--lora", "line.safetensors:0.8"]
    for name, more in {
        "said": ["--lora", "o=half.safetensors"],
        "asked": ["--lora", "o=otter.safetensors", "--over-steps", "o=0-0.4"],
        "all": ["--lora", "o=half.safetensors", "--over-steps", "o=0-1"],
        "plain": ["--lora", "o=otter.safetensors"],
    }.items():
        assert generate(*words, *more, "-o", f"{name}.png")[0] == 0

    def difference(one: str, other: str) -> int:
        return int(np.abs(pixels(f"{one}.png").astype(int) - pixels(f"{other}.png")).max())

    assert difference("said", "asked") <= 1  # one bakes its weights, the other does not
    assert difference("all", "plain") <= 1
    assert difference("said", "plain") > 1
    assert read_picture_info(Path("said.png")).own["over_steps"] == {"o": {"span": [0.0, 0.4]}}
    for name, more in {
        "left said": ["--lora", "o=half.safetensors"],
        "left asked": ["--lora", "o=otter.safetensors", "--over-steps", "o=0-0.4"],
        "left all": ["--lora", "o=half.safetensors", "--over-steps", "o=0-1"],
        "left plain": ["--lora", "o=otter.safetensors"],
    }.items():
        assert generate(*words, *more, "--region", "o=left", "-o", f"{name}.png")[0] == 0
    assert difference("left said", "left asked") <= 1
    assert difference("left all", "left plain") <= 1
    assert difference("left said", "left plain") > 1
    assert read_picture_info(Path("left said.png")).own["over_steps"] == {"o": {"span": [0.0, 0.4]}}


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


def test_a_ramp_decides_whether_an_adapter_counts_for_its_negative_prompt(generate):
    asks = {"sfumato.negatives": '["a cat"]'}
    save_file(load_file("otter.safetensors"), "asks.safetensors", read_header("otter.safetensors").metadata | asks)
    for weight, points, is_heard in (("0", "0:0,0.4:1", True), ("1", "0:0,1:1", True), ("0", "0-0.4", False)):
        words = ["--lora", f"o=asks.safetensors:{weight}", "--over-steps", f"o={points}", "--guidance", "4"]
        code, _, err = generate("a cat, flat", *words, "-o", f"{weight}.png", "--overwrite")
        assert (code, "the negative prompt is 'a cat'" in err) == (0, is_heard)


def test_regions_leave_the_negative_prompt_of_an_adapter_that_counts_everywhere(generate):
    asks = {"sfumato.negatives": '["a cat"]'}
    save_file(load_file("otter.safetensors"), "asks.safetensors", read_header("otter.safetensors").metadata | asks)
    words = ["--lora", "asks.safetensors", "--lora", "line.safetensors", "--region", "line=left", "--guidance", "4"]
    code, _, err = generate("a cat, flat", *words, "-o", "r.png")
    assert (code, "the negative prompt is 'a cat', as its file asks" in err) == (0, True)
    assert read_picture_info(Path("r.png")).own["negative"] == "a cat"


def test_an_adapter_that_asks_for_what_regions_leave_out_is_told(generate):
    asks = {"sfumato.adapter_guidance": "2"}
    save_file(load_file("line.safetensors"), "asks.safetensors", read_header("line.safetensors").metadata | asks)
    words = ["a cat", "--lora", "asks.safetensors", "--lora", "otter.safetensors", "--region", "otter=left"]
    assert "asks: asks for adapter guidance 2, which does not go with --region" in generate(*words, "-o", "a.png")[2]


def test_the_settings_come_back_out_of_the_picture(generate):
    words = ["a cat", "--lora", "line.safetensors:0.8", "--lora", "o=otter.safetensors:0.6:0.2", "--seed", "7"]
    generate(*words, "--negative", "red", "--guidance", "2.5", "--sampler", "dpm++ 2m karras", "-o", "cat.png")
    info = read_picture_info(Path("cat.png"))
    assert info.parameters.prompt == "a cat <lora:line:0.8> <lora:otter:0.2:0.6>"
    assert info.parameters.negative == "red"
    hashes = {name: short_hash(f"{name}.safetensors") for name in ("line", "otter")}
    settings = dict(info.parameters.settings)
    assert settings.pop("Version").startswith("sfumato-")
    assert settings.pop("Model") == "pocket"
    assert settings == {
        "Steps": "2",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "2.5",
        "Seed": "7",
        "Size": "64x64",
        "Lora hashes": f"line: {hashes['line']}, otter: {hashes['otter']}",
        "RNG": "CPU",
    }
    own = info.own
    assert own["prompt"] == "a cat"
    assert own["adapters"] == [
        {"label": "line", "file": "line.safetensors", "hash": hashes["line"], "weight": 0.8},
        {"label": "o", "file": "otter.safetensors", "hash": hashes["otter"], "weight": [0.6, 0.2]},
    ]


@pytest.mark.parametrize(("asked", "told"), [("auto", "fp32"), ("bf16", "bf16")])
def test_a_picture_tells_what_it_was_computed_in(generate, asked, told):
    """By the seed alone it would not be drawn again."""
    generate("a cat", "--precision", asked, "-o", "one.png")
    assert read_picture_info(Path("one.png")).own["precision"] == told


def test_a_picture_names_the_adapters_that_count_in_it_and_no_file_for_another(generate):
    other = Path("other/line.safetensors")
    other.parent.mkdir()
    other.write_bytes(Path("otter.safetensors").read_bytes())
    words = ["a cat", "--lora", "line.safetensors:0.8", "--lora", f"b={other}:0"]
    generate(*words, "--adapter-guidance", "2", "-o", "one.png")
    info = read_picture_info(Path("one.png"))
    assert dict(info.parameters.settings)["Adapter guidance"] == "line: 2"
    assert info.parameters.prompt == "a cat <lora:line:0.8>"
    assert dict(info.parameters.settings)["Lora hashes"] == f"line: {short_hash('line.safetensors')}"
    assert [each["weight"] for each in info.own["adapters"]] == [0.8, 0.0]
    generate(*words[:3], "--lora", f"b={other}:0.5", "-o", "two.png")
    info = read_picture_info(Path("two.png"))
    assert info.parameters.prompt == "a cat <lora:line:0.8> <lora:line:0.5>"
    assert "Lora hashes" not in dict(info.parameters.settings)


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


def test_a_sweep_is_a_sheet_of_weights_by_prompts(generate, base):
    weights = ["line=0,0.5,1.5", "line=0,0.5"]
    for words, name in zip(weights, ("three.png", "two.png"), strict=True):
        code, out, _ = generate("a cat", "red", "--lora", "line.safetensors", "--sweep", words, "-o", name)
        assert (code, out) == (0, f"{name}\n")
    three, two = Image.open("three.png"), Image.open("two.png")
    row = three.height - two.height  # a row more, and nothing else
    assert three.width == two.width
    assert row >= 128
    assert (
        three.crop((0, 0, three.width, two.height - row)).tobytes()
        == two.crop((0, 0, two.width, two.height - row)).tobytes()
    )
    info = read_picture_info(Path("three.png"))
    assert info.own["sweep"] == {"line": [0.0, 0.5, 1.5]}
    assert info.parameters.prompt == "a cat <lora:line:0.5>"  # the first row that has it


@pytest.mark.parametrize(
    ("words", "weight"),
    [
        (["line.safetensors:0.8", "--blocks", "line=down:0"], {"weight": 0.5, "blocks": {"down": 0.0}, "rest": 1.0}),
        (["line.safetensors:1:0.5"], [0.5, 0.25]),
        (["line.safetensors:0.4:0"], [0.5, 0.0]),
    ],
)
def test_a_sweep_keeps_factors_by_block_and_the_proportion_of_two_weights(generate, words, weight):
    code, _, err = generate("red", "--lora", *words, "--sweep", "line=0,0.5", "-o", "sheet.png")
    assert code == 0, err
    assert read_picture_info(Path("sheet.png")).own["adapters"][0]["weight"] == weight


def test_a_tag_keeps_the_factors_by_block_of_its_label(generate):
    """It says another weight, and of the blocks nothing."""
    words = ["--lora", "line.safetensors:0.8", "--blocks", "line=MIDD", "-o", "out"]
    assert generate("red <lora:line:0.5>", "red <lora:line:0.5:lbw=up:0>", *words)[0] == 0
    first, second = (read_picture_info(file).own["adapters"][0]["weight"] for file in sorted(Path("out").iterdir()))
    assert first["weight"] == 0.5
    assert (len(first["blocks"]), second["blocks"]) == (26, {"up": 0.0})


def test_weights_are_read_from_the_end_so_that_a_path_may_hold_colons(loras, tmp_path, monkeypatch):
    from sfumato.command_line.specs import parse_adapter

    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "C:odd=name:0.5.safetensors"
    odd.hardlink_to(loras / "line.safetensors")
    named = tmp_path / "line:0.5"
    named.hardlink_to(loras / "line.safetensors")
    assert parse_adapter("C:odd=name:0.5.safetensors:0.8") == Adapter("C:odd=name:0.5.safetensors", 0.8)
    assert parse_adapter("C:odd=name:0.5.safetensors:-1:0.25") == Adapter("C:odd=name:0.5.safetensors", (-1.0, 0.25))
    assert parse_adapter("line:0.5") == Adapter("line:0.5", 1.0)
    assert parse_adapter("x=line:0.5:2") == Adapter("line:0.5", 2.0, "x")


def test_one_file_twice_comes_back_from_its_tags(generate):
    words = ["red", "--lora", "a=line.safetensors:0.5", "--lora", "b=line.safetensors:0.3"]
    assert generate(*words, "-o", "a.png")[0] == 0
    prompt = read_picture_info(Path("a.png")).parameters.prompt
    assert prompt == "red <lora:line:0.5> <lora:line:0.3>"
    assert generate(prompt, "-o", "again.png")[0] == 0
    assert close(pixels("again.png"), pixels("a.png"))


def test_a_name_that_a_tag_cannot_hold_comes_back_from_its_tag(generate):
    name = "my line, v2:<best> ,"
    Path("line.safetensors").rename(f"{name}.safetensors")
    assert generate("red", "--lora", f"{name}.safetensors:0.8", "-o", "a.png")[0] == 0
    prompt = read_picture_info(Path("a.png")).parameters.prompt
    assert prompt == "red <lora:my line v2best :0.8>"
    assert generate(prompt, "-o", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), pixels("a.png"))
    Path("otter.safetensors").rename("my line v2best.safetensors")  # whose very name it is
    assert generate(prompt, "-o", "otter.png")[0] == 0
    assert not np.array_equal(pixels("otter.png"), pixels("a.png"))


def told_again(file):
    """The pixels that the command within the image draws."""
    program, *words = redraw(Path(file)).words
    assert program == "sfumato"
    assert cli.main([*words, "--device", "cpu", "--overwrite", "-o", "again.png"]) == 0
    return pixels("again.png")


@pytest.mark.parametrize("words", [("--prediction-type", "epsilon"), ("--zero-terminal-snr",), ("--precision", "bf16")])
def test_what_was_said_of_the_base_is_in_the_command_of_an_image(words, generate):
    assert generate("red", *words, "-o", "a.png")[0] == 0
    assert generate("red", "-o", "plain.png")[0] == 0
    assert not np.array_equal(pixels("a.png"), pixels("plain.png"))
    assert np.array_equal(told_again("a.png"), pixels("a.png"))


def test_an_adapter_of_which_a_part_was_left_out_comes_back(generate, loras):
    tensors = load_file(loras / "line.safetensors")
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_9_attn2_to_k"  # which the base does not have
    odd = {f"{flat}.lora_down.weight": torch.ones(2, 32), f"{flat}.lora_up.weight": torch.ones(32, 2)}
    save_file({**tensors, **odd, f"{flat}.alpha": torch.tensor(2.0)}, "odd.safetensors")
    words = ["red", "--lora", "odd.safetensors"]
    assert generate(*words, "-o", "a.png")[0] == 2
    assert generate(*words, "--partial", "-o", "a.png")[0] == 0
    assert np.array_equal(told_again("a.png"), pixels("a.png"))


def test_an_adapter_of_a_tag_takes_no_turn_when_its_image_is_drawn_again(generate, loras):
    Path("fox.safetensors").hardlink_to(loras / "otter.safetensors")
    words = ["red <lora:fox:0.5>", "--lora", "line.safetensors", "--lora", "otter.safetensors:0.4", "--switch", "1"]
    assert generate(*words, "-o", "a.png")[0] == 0
    assert close(told_again("a.png"), pixels("a.png"))


def test_weights_by_step_of_another_prompt_s_tag_are_not_told_of_an_image(generate):
    way = ["--over-steps", "otter=0:0,0.5:1"]
    assert generate("red <lora:otter:1>", "red", "--lora", "line.safetensors", *way, "-o", "out")[0] == 0
    for file in sorted(Path("out").glob("*.png")):
        assert close(told_again(file), pixels(file))


def test_a_file_with_an_equals_sign_in_its_name_is_any_other(generate):
    Path("line.safetensors").rename("epoch=5.safetensors")
    words = ["red", "--lora", "epoch=5.safetensors:0.7", "--blocks", "epoch=5=down:0.5"]
    assert generate(*words, "-o", "a.png")[0] == 0
    assert np.array_equal(told_again("a.png"), pixels("a.png"))
    region = ["--lora", "epoch=5.safetensors", "--lora", "otter.safetensors", "--region", "epoch=5+otter=left"]
    assert generate("red", *region, "-o", "b.png")[0] == 0
    assert parse_axis("epoch=5=0,1", ["epoch=5"]) == Axis("weight", (0.0, 1.0), "epoch=5")


def test_letters_that_join_emoji_come_back(generate):
    assert generate("a \U0001f468\u200d\U0001f469 cat,\u00a0red", "-o", "a.png")[0] == 0
    assert np.array_equal(told_again("a.png"), pixels("a.png"))


@pytest.mark.parametrize("way", ["0-0.4", "0:0.8,0.4:0.8,0.4:0,1:0"])
def test_weights_by_step_of_a_tag_count_in_its_prompt_alone(way, generate):
    assert generate("red <lora:line:0.8>", "red", "--over-steps", f"line={way}", "-o", "out")[0] == 0
    tagged, plain = (pixels(file) for file in sorted(Path("out").glob("*.png")))
    generate("red", "--lora", "line.safetensors:0.8", "--over-steps", f"line={way}", "-o", "mixed.png")
    generate("red", "-o", "plain.png")
    assert np.array_equal(tagged, pixels("mixed.png"))
    assert np.array_equal(plain, pixels("plain.png"))
    assert not np.array_equal(tagged, plain)


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


def test_a_tag_with_weights_by_block_is_the_command_lines_and_comes_back(generate):
    """What the picture says of itself draws it again."""
    code, _, err = generate("red", "--lora", "line.safetensors:0.8", "--blocks", "line=MIDD", "-o", "blocks.png")
    assert code == 0, err
    prompt = read_picture_info(Path("blocks.png")).parameters.prompt
    assert prompt == "red <lora:line:0.8:lbw=1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0>"
    assert generate(prompt, "-o", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), pixels("blocks.png"))
    generate("red", "--lora", "line.safetensors:0.8", "-o", "whole.png")
    assert not np.array_equal(pixels("whole.png"), pixels("blocks.png"))


def test_a_picture_to_begin_from_and_a_mask_that_keeps_the_rest_to_the_pixel(generate):
    Image.new("RGB", (64, 64), (200, 40, 40)).save("start.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    mask.save("mask.png")
    words = ["red", "--image", "start.png", "--strength", "0.5"]
    assert generate(*words, "-o", "whole.png")[0] == 0
    assert generate(*words, "--mask", "mask.png", "-o", "part.png")[0] == 0
    whole, part = (np.asarray(Image.open(name)) for name in ("whole.png", "part.png"))
    assert (whole[:, :32] != (200, 40, 40)).any()
    assert (part[:, :32] == (200, 40, 40)).all()
    assert (part[:, 32:] != (200, 40, 40)).any()
    assert read_picture_info(Path("part.png")).own["strength"] == 0.5


def test_the_command_of_a_part_that_was_drawn_anew_has_its_mask(generate):
    Image.new("RGB", (64, 64), (200, 40, 40)).save("start.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    mask.save("mask.png")
    assert generate("red", "--image", "start.png", "--mask", "mask.png", "--seed", "3", "-o", "part.png")[0] == 0
    found = redraw(Path("part.png"))
    assert found.left_out == ()
    assert cli.main([*found.words[1:], "-o", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), pixels("part.png"))


@pytest.mark.parametrize("mask", [Image.new("L", (64, 64), 0), Image.new("RGBA", (64, 64), (255, 255, 255, 0))])
def test_a_mask_of_nothing_is_refused(generate, mask):
    Image.new("RGB", (64, 64), (200, 40, 40)).save("start.png")
    mask.save("mask.png")
    code, _, err = generate("red", "--image", "start.png", "--mask", "mask.png", "-o", "part.png")
    assert code == 2
    assert "the mask is black or transparent all over" in err
    assert not Path("part.png").exists()


def test_a_picture_to_begin_from_keeps_its_proportions(generate):
    Image.new("RGB", (192, 96), (200, 40, 40)).save("wide.png")
    assert generate("red", "--image", "wide.png", "-o", "a.png")[0] == 0
    assert Image.open("a.png").size == (88, 48)
    assert [size_like(size, 512) for size in ((3000, 2000), (7, 7), (600, 800))] == [(624, 416), (512, 512), (440, 592)]


def test_pictures_to_begin_from_masks_and_regions_may_be_long_and_narrow(generate):
    """What training would not crop is drawn over: a panorama, or a mask of a line."""
    Image.new("RGB", (160, 32), (200, 40, 40)).save("long.png")
    Image.new("L", (160, 32), 255).save("mask.png")
    region = ["--lora", "line.safetensors", "--region", "line=mask.png"]
    start = ["--image", "long.png", "--mask", "mask.png"]
    code, _, err = generate("a", *start, *region, "--size", "160x32", "-o", "a.png")
    assert code == 0, err
    assert Image.open("a.png").size == (160, 32)


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


def test_a_new_word_is_known_for_the_call(generate, base):
    from sfumato.files.write_embedding import write_embedding

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
    from sfumato.files.write_embedding import write_embedding

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


def pixels(name: str | Path) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB"), dtype=int)


TWO = ["--lora", "line.safetensors:0.8", "--lora", "otter.safetensors:0.6"]


def test_weights_by_step_are_those_of_the_library(generate, base, loras):
    from sfumato.compose.steps import Ramp, Switch, over_steps

    words = ["a cat", *TWO, "--seed", "7"]
    assert generate(*words, "--over-steps", "line=0:1,0.9:0", "-o", "ramp.png")[0] == 0
    assert generate(*words, "--over-steps", "line=0-0.4", "-o", "span.png")[0] == 0
    assert generate(*words, "--switch", "1", "-o", "turns.png")[0] == 0
    line, otter = Adapter(loras / "line.safetensors", 0.8), Adapter(loras / "otter.safetensors", 0.6)
    with compose(base, line, otter, way="live") as mix:
        plain = np.asarray(draw(base, "a cat", 7, steps=2)[0], dtype=int)
        with over_steps(mix, line=Ramp((0, 1), (0.9, 0))):
            ramp = np.asarray(draw(base, "a cat", 7, steps=2)[0], dtype=int)
        with over_steps(mix, line=lambda progress: 0.8 if progress <= 0.4 else 0.0):
            span = np.asarray(draw(base, "a cat", 7, steps=2)[0], dtype=int)
        with over_steps(mix, Switch(("line", "otter"), every=1)):
            turns = np.asarray(draw(base, "a cat", 7, steps=2)[0], dtype=int)
    for name, wanted in (("ramp.png", ramp), ("span.png", span), ("turns.png", turns)):
        assert np.array_equal(pixels(name), wanted), name
        assert not np.array_equal(wanted, plain), name
    own = read_picture_info(Path("span.png")).own
    assert own["over_steps"] == {"line": {"span": [0.0, 0.4]}}
    assert own["adapters"][0]["weight"] == 0.8
    assert read_picture_info(Path("turns.png")).own["switch"] == {"labels": ["line", "otter"], "every": 1}


@pytest.mark.parametrize("guidance", ["4", "1"])
def test_a_region_is_that_of_the_library_beside_what_counts_everywhere(generate, base, loras, guidance):
    from sfumato.compose.regions import Region, regions

    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    mask.save("mask.png")
    words = ["a cat", *TWO, "--seed", "7", "--guidance", guidance]
    assert generate(*words, "--region", "otter=right:red", "-o", "half.png")[0] == 0
    line, otter = Adapter(loras / "line.safetensors", 0.8), Adapter(loras / "otter.safetensors", 0.6)
    box = (0.5, 0.0, 1.0, 1.0)
    with compose(base, line), regions(base, Region(box, otter, prompt="red")):
        wanted = np.asarray(draw(base, "a cat", 7, steps=2, guidance=float(guidance))[0], dtype=int)
    assert np.array_equal(pixels("half.png"), wanted)
    if guidance != "1":
        assert generate(*words, "--region", "otter=mask.png:red", "-o", "mask-drawn.png")[0] == 0
        assert generate(*words, "--region", "otter=0.5,0,1,1", "-o", "no-prompt.png")[0] == 0
        assert np.abs(pixels("mask-drawn.png") - wanted).max() <= 1
        assert not np.array_equal(pixels("no-prompt.png"), wanted)
    own = read_picture_info(Path("half.png")).own
    assert [each["label"] for each in own["adapters"]] == ["line"]
    assert (own["regions"][0]["where"], own["regions"][0]["prompt"]) == (list(box), "red")
    assert own["regions"][0]["adapters"][0]["weight"] == 0.6
    told = read_picture_info(Path("half.png")).parameters
    assert told.prompt == "a cat <lora:line:0.8>"  # no tag says where
    assert [pair.split(":")[0] for pair in told.settings["Lora hashes"].split(", ")] == ["line", "otter"]


def cell(sheet: str, column: int, row: int, columns: int, rows: int) -> np.ndarray:
    """The picture of a sheet, halved to the 64 px it was drawn in; the last cells end 10 px before the sheet's end."""
    image = Image.open(sheet).convert("RGB")
    left = image.width - (columns - column) * 138
    top = image.height - (rows - row) * 138
    return np.asarray(image.crop((left, top, left + 128, top + 128)).resize((64, 64), Image.Resampling.BOX), dtype=int)


def close(one: np.ndarray, other: np.ndarray) -> bool:
    """Of one picture, but for the sheet's enlarging."""
    return float(np.abs(one - other).mean()) < 4


def test_pairs_show_each_picture_without_and_with_the_adapters(generate):
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save("start.png")
    many, one = ["a cat", "red", "--seed", "7", "--seed", "8"], ["a cat", "--seed", "7"]
    start = ["--image", "start.png", "--strength", "0.9"]
    for rows, count, extra, kind in ((many, 4, [], "plain"), (one, 1, start, "from a picture")):
        assert generate(*rows, *extra, "-o", f"{kind} without")[0] == 0
        assert generate(*rows, *extra, *TWO, "-o", f"{kind} with")[0] == 0
        code, out, _ = generate(*rows, *extra, *TWO, "--before-after", "-o", f"{kind}.png")
        assert (code, out) == (0, f"{kind}.png\n")
        for column, folder in enumerate((f"{kind} without", f"{kind} with")):
            for row, file in enumerate(sorted(Path(folder).iterdir())):
                assert close(cell(f"{kind}.png", column, row, 2, count), pixels(str(file))), (kind, column, row)
        assert not close(cell(f"{kind}.png", 0, 0, 2, count), cell(f"{kind}.png", 1, 0, 2, count))
    own = read_picture_info(Path("plain.png")).own
    assert own["before_after"] is True
    assert (own["prompts"][2], own["seeds"][3]) == ("red", 8)


def test_pairs_leave_out_tags_regions_and_steps_on_the_side_without(generate):
    generate("a cat", "-o", "plain.png")
    generate("a cat <lora:line:0.9>", "-o", "tagged.png")
    assert generate("a cat <lora:line:0.9>", "--before-after", "-o", "tags.png")[0] == 0
    assert close(cell("tags.png", 0, 0, 2, 1), pixels("plain.png"))
    assert close(cell("tags.png", 1, 0, 2, 1), pixels("tagged.png"))
    assert read_picture_info(Path("tags.png")).parameters.prompt == "a cat <lora:line:0.9>"
    words = ["a cat", *TWO, "--region", "otter=left", "--over-steps", "line=0-0.4"]
    assert generate(*words, "-o", "both.png")[0] == 0
    assert generate(*words, "--before-after", "-o", "pair.png")[0] == 0
    assert close(cell("pair.png", 0, 0, 2, 1), pixels("plain.png"))
    assert close(cell("pair.png", 1, 0, 2, 1), pixels("both.png"))
    assert not close(pixels("both.png"), pixels("plain.png"))


def hurried(name: str, folder: Path) -> Path:
    """An example as it is, but for its 25 steps."""
    text = (Path(__file__).parents[1] / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("num_inference_steps=25") == 1
    (folder / f"{name}.py").write_text(text.replace("num_inference_steps=25", "num_inference_steps=4"))
    return folder / f"{name}.py"


@pytest.mark.parametrize("name", ["img2img_script", "sdxl_script"])
def test_the_other_example_scripts_run(name, base_folder, loras, tmp_path, monkeypatch):
    script = hurried(name, tmp_path)
    files = [str(loras / f"{file}.safetensors") for file in ("line", "otter")]
    Image.new("RGB", (80, 60), "red").save(tmp_path / "photo.png")
    words = [str(base_folder), *files, str(tmp_path / "photo.png")]
    if name == "sdxl_script":
        pipe = tiny_pipeline("sdxl", shallow=True)
        words = [str(write_folder(pipe, tmp_path / "sdxl")), *(_lora_for(pipe, tmp_path, file) for file in ("a", "b"))]
    monkeypatch.setattr(sys, "argv", [name, *words, str(tmp_path / "out.png")])
    runpy.run_path(str(script), run_name="__main__")
    assert Image.open(tmp_path / "out.png").size[0] >= 32


def _lora_for(pipe: Any, folder: Path, name: str) -> str:
    path = next(path for path, _ in pipe.unet.named_modules() if path.endswith("attn2.to_k"))
    out, inner = pipe.unet.get_submodule(path).weight.shape
    module = LoraModule(torch.ones(1, inner), torch.ones(out, 1), 0.1)
    write_lora(folder / f"{name}.safetensors", {("unet", path): module}, family="sdxl")
    return str(folder / f"{name}.safetensors")


def test_the_example_script_runs(base_folder, loras, tmp_path, monkeypatch, base):
    script = hurried("plain_script", tmp_path)
    files = [str(loras / f"{name}.safetensors") for name in ("line", "otter")]
    monkeypatch.setattr(sys, "argv", ["plain_script.py", str(base_folder), *files, str(tmp_path / "crab.png")])
    runpy.run_path(str(script), run_name="__main__")
    with compose(base, Adapter(files[0], 0.7), Adapter(files[1], 1.0)):
        expected = draw(base, "a crab", 7, steps=4, guidance=7.5)[0]
    drawn = np.asarray(Image.open(tmp_path / "crab.png"), dtype=int)
    assert np.abs(drawn - np.asarray(expected, dtype=int)).max() <= 1


WRONG = {
    "a tag of no file": (["a <lora:nowhere:1>", "-o", "a.png"], "<lora:nowhere>: no file"),
    "a file that would be a folder": (["a", "-o", "a.pgn"], "--output a.pgn: pictures are written as .png"),
    "a folder of adapters that is none": (["a", "--lora-folder", "nowhere"], "--lora-folder nowhere: no"),
    "a mask alone": (["a", "--mask", "there.png", "-o", "a.png"], "give --image"),
    "a folder of pictures": (["a", "--image", ".", "-o", "a.png"], "--image .: a folder; name one picture in it."),
    "a picture that is none": (["a", "--image", "there.png", "-o", "a.png"], "there.png"),
    "a strength alone": (["a", "--strength", "0.3", "-o", "a.png"], "--strength 0.3: says how much of a picture"),
    "a tag without a name": (["a <lora::1>", "-o", "a.png"], "<lora::1>: names no adapter"),
    "a strength of nothing": (["a", "--image", "there.png", "--strength", "0", "-o", "a.png"], "strength 0"),
    "a prompt of loose brackets": (["(a", "--prompt-syntax", "a1111", "-o", "a.png"], "bracket"),
    "loose brackets in a second batch": (["red", "(a --s 3", "--prompt-syntax", "a1111"], "bracket"),
    "words that compel cannot read in a second batch": (
        ["red", '("a", "b").blend(1, x) --s 3', "--prompt-syntax", "compel"],
        "is not in compel's syntax (could not convert string to float: 'x')",
    ),
    "loose brackets in a region": (
        ["a", "--lora", "line.safetensors", "--region", "line=left:(a", "--prompt-syntax", "a1111"],
        "bracket",
    ),
    "both marks in one bracket": (["[a:b|c:0.5]", "--prompt-syntax", "a1111"], "':' and '|' do not go together"),
    "a block that is none": (["a", "--lora", "line.safetensors", "--blocks", "line=upp:0"], "blocks upp: no module"),
    "a tag of no block": (["a <lora:line:1:lbw=UPS>"], "<lora:line:1:lbw=UPS>: blocks 'UPS'"),
    "no prompt": ([], "no prompt"),
    "no such adapter": (["a", "--lora", "gone.safetensors:0.8"], "gone.safetensors"),
    "a folder": (["a", "--lora", ".", "--base", "nowhere"], "sfumato: .: this is a folder. Name the .safetensors"),
    "an adapter without a name": (["a", "--lora", ""], "'' names no file; wanted FILE:0.8"),
    "a base of a name too long": (["a", "--base", "a" * 300], "there is no such folder or file. Wanted pocket"),
    "a picture of a name too long": (["a", "--image", "a" * 300], ": there is no such picture"),
    "an adapter of a name too long": (["a", "--lora", "a portrait " * 30], "wanted FILE:0.8, an adapter (--lora)"),
    "a label without a name": (["a", "--lora", "line="], "'line=' names no file"),
    "a file of a name too long": (["a", "-o", "a" * 252 + ".png"], "File name too long. Give a shorter one."),
    "a near adapter": (["a", "--lora", "lime.safetensors"], "Did you mean line.safetensors?"),
    "a comma for a point": (["a", "--lora", "line.safetensors:0,8"], "'0,8' is no weight"),
    "a slip of the finger": (["a", "--lora", "line.safetensors:08.0e1"], "outside -10 to 10"),
    "nan": (["a", "--lora", "line.safetensors:nan"], "nan"),
    "one label twice": (["a", "--lora", "line.safetensors", "--lora", "line.safetensors"], "'line'"),
    "an unknown sampler": (["a", "--sampler", "eular"], "did you mean 'euler'?"),
    "an odd size": (["a", "--size", "60x64"], "the nearest is 64x64"),
    "a size in words": (["a", "--size", "big"], "WIDTHxHEIGHT"),
    "no steps": (["a", "--count", "0"], "--count 0"),
    "many into one file": (
        ["a", "b", "-o", "x.png"],
        "name a folder, or put the words of one prompt into quotes: 'a', 'b' are several.",
    ),
    "another format": (["a", "-o", "x.gif"], ".png"),
    "a file for a folder": (["a", "-o", "line.safetensors/x"], "is a file, not a folder"),
    "there already": (["a", "-o", "there.png"], "--overwrite"),
    "a sweep of nothing": (["a", "--sweep", "line=0,1"], "no --lora is called 'line'"),
    "a sweep of words": (
        ["a", "--lora", "line.safetensors", "--sweep", "line=0,one"],
        "line=0,one: wanted numbers, parted by commas",
    ),
    "a sweep too far": (["a", "--lora", "line.safetensors", "--sweep", "line=0,50"], "outside -10 to 10"),
    "a sweep of the text encoders' alone": (
        ["a", "--lora", "line.safetensors:0:1", "--sweep", "line=0,1"],
        "line: its weights 0:1 are no start for other weights",
    ),
    "a sweep in a region": (
        ["a", *TWO, "--region", "line=left", "--sweep", "line=0,1"],
        "line has a --region, and one weight there",
    ),
    "pairs of nothing": (["a", "--before-after"], "no adapter to draw with"),
    "two sheets at once": (
        ["a", "--lora", "line.safetensors", "--sweep", "line=0,1", "--before-after"],
        "ask for one of them",
    ),
    "a region of nothing": (["a", "--region", "line=left"], "none are given"),
    "a region nowhere": (["a", "--lora", "line.safetensors", "--region", "line=lefft"], "'lefft' is no place"),
    "a box of no size": (["a", "--lora", "line.safetensors", "--region", "line=0,0,0,1"], "a box is left,top"),
    "a box of three": (["a", "--lora", "line.safetensors", "--region", "line=0,0,1"], "a box is left,top"),
    "a tag of a region's": (
        ["a <lora:line:1>", "--lora", "line.safetensors", "--region", "line=left"],
        "has a --region",
    ),
    "steps of nothing": (["a", "--over-steps", "line=0-0.5"], "none are given"),
    "an adapter guidance below 0": (["a", "--adapter-guidance", "-1"], "adapter guidance -1: wanted 0 to 20"),
    "an adapter guidance of words": (["a", "--adapter-guidance", "much"], "much: wanted a number, or LABEL=2"),
    "an adapter guidance without adapters": (["a", "--adapter-guidance", "2"], "there is no adapter that it could"),
    "an adapter guidance of nobody": (["a", "--adapter-guidance", "x=2"], "no --lora is called 'x'"),
    "an adapter guidance of a region": (
        ["a", "--lora", "line.safetensors", "--region", "line=left", "--adapter-guidance", "2"],
        "do not go together",
    ),
    "steps of a region's": (
        ["a", "--lora", "line.safetensors", "--region", "line=left", "--over-steps", "line=0:1,1:0"],
        "line: in a region an adapter has a span, such as line=0-0.5",
    ),
    "steps backwards": (["a", "--lora", "line.safetensors", "--over-steps", "line=0.5-0.2"], "START-END"),
    "steps in words": (["a", "--lora", "line.safetensors", "--over-steps", "line=early"], "PROGRESS:WEIGHT"),
    "a step too far": (["a", "--lora", "line.safetensors", "--over-steps", "line=0:1,1:50"], "outside -10 to 10"),
    "steps twice": (
        ["a", "--lora", "line.safetensors", "--over-steps", "line=0-0.5", "--over-steps", "line=0:1"],
        "names line twice",
    ),
    "steps under a sweep": (
        ["a", "--lora", "line.safetensors", "--over-steps", "line=0:1,1:0", "--sweep", "line=0,1"],
        "sets line's weight at every step",
    ),
    "turns of one": (["a", "--lora", "line.safetensors", "--switch", "5"], "two --lora or more"),
    "turns of no step": (["a", *TWO, "--switch", "0"], "--switch 0"),
    "no such prompts": (["--prompts-file", "gone.txt"], "gone.txt"),
    "an option in a prompt that is none": (["a cat --ar 3:2"], "--ar is not read there"),
    "an option in a prompt without a number": (["a cat --w wide"], "no number"),
    "an odd size in a prompt": (["a cat --w 500"], "the nearest is 496"),
    "no steps in a prompt": (["a cat --s 0"], "0 steps"),
    "more steps in the second prompt than timesteps": (["red", "a cat --s 1001"], "1001 steps; wanted 1 to 1000"),
    "an option for a picture of a sheet": (
        ["a --s 3", "--lora", "line.safetensors", "--sweep", "line=0,1"],
        "one setting",
    ),
    "an option in a negative prompt": (["a cat", "--negative", "red --w 64"], "--negative: options such as '--w 64'"),
    "an unknown option": (["a", "--sede", "3"], "--seed"),
    "a seed too long in the second prompt": (["red --d 1 --s 1", f"red --d {2**64}"], "64 bits"),
    "a seed that is counted too far": (["a", "--seed", str(2**64 - 1), "--count", "2"], "64 bits"),
    "no step of a second prompt": (
        ["red", "red --s 1", "--image", "picture.png", "--strength", "0.6"],
        "strength 0.6 of 1 step is no step",
    ),
    "a seed too long": (["a", "--seed", str(2**64)], "64 bits"),
    "another seed each time": (["a", "--seed", "-1"], "seed -1: no seed is drawn by lot here"),
    "no such base": (["a", "--base", "gone.safetensors"], "gone.safetensors"),
    "another base's adapter": (["a", "--lora", "xl.safetensors"], "trained for SDXL (text width 2048)"),
}


@pytest.mark.parametrize(("words", "said"), WRONG.values(), ids=WRONG.keys())
def test_wrong_use_is_one_line_and_leaves_no_file(generate, words, said):
    Path("there.png").write_bytes(b"mine")
    Image.new("RGB", (8, 8), "red").save("picture.png")
    change = LoraModule(torch.zeros(1, 2048), torch.zeros(8, 1), 1.0)
    target = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    write_lora(Path("xl.safetensors"), {target: change}, family="sdxl")
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    code, out, err = generate(*words)
    message = [line for line in err.splitlines() if line.startswith("sfumato: ")]
    assert (code, out, len(message)) == (2, "", 1)
    assert said in message[0]
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    assert Path("there.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "words",
    [
        ["--count", "140", "--sweep", "line=0,1"],
        [*(f"--seed={seed}" for seed in range(140)), "--before-after"],
        ["--size", "16384x8"],
    ],
)
def test_what_a_format_cannot_hold_is_told_before_it_is_drawn(generate, words, monkeypatch):
    monkeypatch.setattr(session, "draw_each", lambda *_, **__: pytest.fail("drawn"))
    code, _, err = generate("red", "--lora", "line.safetensors", *words, "-o", "large.webp")
    assert (code, "pixels on a side, and a .webp has at most 16,383; name a .png." in err) == (2, True), err


def test_verify_refuses_an_adapter_without_a_fingerprint(generate, tmp_path):
    save_file(load_file(tmp_path / "line.safetensors"), tmp_path / "bare.safetensors")
    assert generate("a crab", "--lora", "line.safetensors", "--verify", "-o", "line.png")[0] == 0
    code, _, said = generate("a crab", "--lora", "bare.safetensors", "--verify", "-o", "bare.png")
    assert code == 2
    assert "fingerprint" in said
    assert not (tmp_path / "bare.png").exists()
