"""Wrong use of `sfumato generate` is one line and leaves no file."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from sfumato.generation import session
from tests.generate.shared import TWO

WRONG = {
    "a tag of no file": (["a <lora:nowhere:1>", "-o", "a.png"], "<lora:nowhere>: no file"),
    "an ending alone": (
        ["a", "-o", ".png"],
        "--output .png: a file's ending without its name; name it, such as crab.png",
    ),
    "a file that would be a folder": (["a", "-o", "a.pgn"], "--output a.pgn: images are written as .png"),
    "a folder of adapters that is none": (["a", "--lora-folder", "nowhere"], "--lora-folder nowhere: no"),
    "a mask alone": (["a", "--mask", "there.png", "-o", "a.png"], "give --image"),
    "a folder of images": (["a", "--image", ".", "-o", "a.png"], "--image .: a folder; name one image in it."),
    "an image that is none": (["a", "--image", "there.png", "-o", "a.png"], "there.png"),
    "a strength alone": (["a", "--strength", "0.3", "-o", "a.png"], "--strength 0.3: says how much of an image"),
    "a tag without an end": (["a <lora:line:1", "-o", "a.png"], "<lora:... is no whole tag; wanted such as <lora:line"),
    "a tag within a tag": (["a <lora:li<lora:line:1>", "-o", "a.png"], "<lora:... is no whole tag; wanted"),
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
    "a weight of the whole prompt": (
        ["a crab:1.2 --n fog:1.2", "--negative", "fog:1.2", "--prompt-syntax", "a1111"],
        "prompt 'a crab:1.2' ends in ':1.2'",
    ),
    "both marks in one bracket": (["[a:b|c:0.5]", "--prompt-syntax", "a1111"], "':' and '|' do not go together"),
    "a block that is none": (["a", "--lora", "line.safetensors", "--blocks", "line=upp:0"], "blocks upp: no module"),
    "blocks of one adapter twice": (
        ["a", "--lora", "line.safetensors", "--blocks", "line=down:0", "--blocks", "line=up:0"],
        "line has blocks already; name them in one",
    ),
    "a block twice": (
        ["a", "--lora", "line.safetensors", "--blocks", "line=down:0,up:1,down:1"],
        "blocks 'down:0,up:1,down:1': down has two factors; leave one",
    ),
    "a new word without a name": (["a", "--embedding", ""], "'' names no file; wanted FILE or TOKEN=FILE"),
    "a token without a file": (["a", "--embedding", "<pen>="], "'<pen>=' names no file; wanted FILE or TOKEN=FILE"),
    "blocks of nobody": (["a", "--blocks", "line=down:0"], "with the label of a --lora (none are given)"),
    "a tag of no block": (["a <lora:line:1:lbw=UPS>"], "<lora:line:1:lbw=UPS>: blocks 'UPS'"),
    "no prompt": ([], "no prompt"),
    "no such adapter": (["a", "--lora", "gone.safetensors:0.8"], "gone.safetensors"),
    "a folder": (["a", "--lora", ".", "--base", "nowhere"], "sfumato: .: this is a folder. Name the .safetensors"),
    "an adapter without a name": (["a", "--lora", ""], "'' names no file; wanted FILE:0.8"),
    "a base of a name too long": (
        ["a", "--base", "a" * 300],
        "no such folder or file, for a base or a VAE. Wanted pocket",
    ),
    "an image of a name too long": (["a", "--image", "a" * 300], ": there is no such image"),
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
    "a size that no machine draws": (
        ["a", "--size", "99992"],
        "99992x99992 pixels: wanted at most as many as 8192x8192",
    ),
    "a size of a prompt that no machine draws": (["a --w 2000000 --h 64"], "2000000x64 pixels: wanted at most as many"),
    "a size in words": (["a", "--size", "big"], "WIDTHxHEIGHT"),
    "no steps": (["a", "--count", "0"], "--count 0"),
    "more images than are meant": (["a", "--count", str(10**9)], "--count 1000000000: wanted at most 100,000"),
    "many into one file": (
        ["a", "b", "-o", "x.png"],
        "name a folder, or put the words of one prompt into quotes: 'a', 'b' are several.",
    ),
    "another format": (["a", "-o", "x.gif"], ".png"),
    "a file for a folder": (["a", "-o", "line.safetensors/x"], "is a file, not a folder"),
    "there already": (["a", "-o", "there.png"], "--overwrite"),
    "a sweep of nothing": (["a", "--sweep", "line=0,1"], "no --lora is called 'line'"),
    "a sweep without a label": (["a", "--lora", "line.safetensors", "--sweep", "0,1"], "wanted LABEL=WEIGHTS"),
    "a sweep beside a tag": (
        ["a <lora:line:1>", "--lora", "line.safetensors", "--sweep", "line=0,1"],
        "--sweep and <lora:...> in a prompt do not go together",
    ),
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
    "an adapter twice in a region": (["a", *TWO, "--region", "line+line=left"], "line is in it twice"),
    "a region's prompt of no words": (["a", *TWO, "--region", "line=left: "], "no prompt follows the colon"),
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
    "an adapter guidance twice": (
        ["a", "--lora", "line.safetensors", *("--adapter-guidance", "2"), *("--adapter-guidance", "3")],
        "--adapter-guidance 2: is given twice for all adapters; leave one out",
    ),
    "an adapter guidance of one twice": (
        ["a", *TWO, *("--adapter-guidance", "1"), *("--adapter-guidance", "line=2"), *("--adapter-guidance", "line=2")],
        "--adapter-guidance line=2: is given twice for line; leave one out",
    ),
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
    "a turn after the last step": (
        ["a", *TWO, "--switch", "2"],
        "--switch 2: the turn of otter does not come in 2 steps",
    ),
    "a turn after the last step of a prompt": (
        ["a --s 3", "a", *TWO, "--switch", "2"],
        "otter does not come in 2 steps",
    ),
    "a turn after the last step of a start": (
        ["a", *TWO, "--switch", "1", "--image", "picture.png", "--strength", "0.5"],
        "--switch 1: the turn of otter does not come in 1 step;",
    ),
    "turns of no step": (["a", *TWO, "--switch", "0"], "--switch 0"),
    "no such prompts": (["--prompts-file", "gone.txt"], "gone.txt"),
    "an option in a prompt that is none": (["a cat --ar 3:2"], "--ar is not read there"),
    "an option twice in a prompt": (["a cat --w 64 --d 1 --w 32"], "the prompt 'a cat': --w is there twice"),
    "an option in a prompt without a number": (["a cat --w wide"], "no number"),
    "an odd size in a prompt": (["a cat --w 500"], "the nearest is 496"),
    "no steps in a prompt": (["a cat --s 0"], "0 steps"),
    "more steps in the second prompt than timesteps": (["red", "a cat --s 1001"], "1001 steps; wanted 1 to 1000"),
    "an option for an image of a sheet": (
        ["a --s 3", "--lora", "line.safetensors", "--sweep", "line=0,1"],
        "one setting",
    ),
    "an option in a negative prompt": (["a cat", "--negative", "red --w 64"], "--negative: options such as '--w 64'"),
    "a weight apart from its file": (["a", "--lora", "line.safetensors", "0.8"], "follows its file: --lora FILE:0.8"),
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
