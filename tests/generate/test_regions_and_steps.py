"""`sfumato generate` with adapters in regions and over the steps."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato.compose import Adapter, compose
from sfumato.files import read_header
from sfumato.generation.draw import draw
from sfumato.generation.metadata.png_info import read_picture_info
from tests.generate.shared import TWO, pixels


@pytest.mark.slow
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


@pytest.mark.parametrize("way", ["0-0.4", "0:0.8,0.4:0.8,0.4:0,1:0"])
def test_weights_by_step_of_a_tag_count_in_its_prompt_alone(way, generate):
    assert generate("red <lora:line:0.8>", "red", "--over-steps", f"line={way}", "-o", "out")[0] == 0
    tagged, plain = (pixels(file) for file in sorted(Path("out").glob("*.png")))
    generate("red", "--lora", "line.safetensors:0.8", "--over-steps", f"line={way}", "-o", "mixed.png")
    generate("red", "-o", "plain.png")
    assert np.array_equal(tagged, pixels("mixed.png"))
    assert np.array_equal(plain, pixels("plain.png"))
    assert not np.array_equal(tagged, plain)


@pytest.mark.slow
@pytest.mark.parametrize("region", [[], ["--region", "line=left"]], ids=["mixed", "regional"])
def test_a_span_in_which_no_step_lies_is_told(region, generate):
    words = ["red", "red --s 50", *TWO, *region, "--overwrite", "-o", "out"]
    told = "line: its span 0.9-1 holds none of 2 steps, so that it counts for nothing; more --steps or"
    err = generate(*words, "--over-steps", "line=0.9-1")[2]
    assert (told in err, err.count("counts for nothing")) == (True, 1)
    assert "counts for nothing" not in generate(*words, "--over-steps", "line=0.3-0.6")[2]
    Image.new("RGB", (64, 64), "red").save("start.png")
    late = ["red --s 10", *TWO, *region, "--image", "start.png", "--strength", "0.5", "--over-steps", "line=0-0.4"]
    assert "line: its span 0-0.4 holds none of 10 steps" in generate(*late, "-o", "late.png")[2]


def test_weights_by_step_are_those_of_the_library(generate, base, loras):
    from sfumato.compose.schedules import Ramp, Switch, over_steps

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
