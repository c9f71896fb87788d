"""The settings inside an image, and the command that they make: it draws the image again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato import cli
from sfumato.files.metadata import short_hash
from sfumato.generation.arguments.axes import Axis, parse_axis
from sfumato.generation.metadata.png_info import read_picture_info
from sfumato.generation.metadata.redraw import redraw
from tests.generate.shared import pixels
from tests.generate.test_sheets import close


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


@pytest.mark.slow
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
    assert generate(*words, "--region", "odd=left", "-o", "b.png")[0] == 2
    assert generate(*words, "--region", "odd=left", "--partial", "-o", "b.png")[0] == 0


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
