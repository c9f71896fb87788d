"""The settings in an image as the command that draws it again: A1111's and our own."""

from dataclasses import fields

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sfumato.pipelines.generate import Config, plan
from sfumato.pipelines.grid import Config as GridConfig
from sfumato.pipelines.inspect_file import main as inspect

from sfumato.adapters.blocks import Blocks
from sfumato.adapters.weights import Adapter
from sfumato.config import parse
from sfumato.errors import ConfigError, DataError
from sfumato.generation.metadata.png_info import read_picture_info, save_picture
from sfumato.generation.metadata.redraw import redraw
from sfumato.generation.settings import save_with_settings
from tests.drawing.foreign import FROM_A1111, picture_with


@pytest.mark.parametrize(
    ("schedule", "sampler", "left"),
    [
        ("Karras", "dpm++ 2m karras", {}),
        ("Automatic", "dpm++ 2m karras", {}),
        ("Uniform", "dpm++ 2m", {}),
        ("Exponential", None, {"Sampler": "DPM++ 2M, Exponential"}),
        ("Beta", None, {"Sampler": "DPM++ 2M, Beta"}),
    ],
)
def test_what_a1111_wrote_is_told_as_a_command(schedule, sampler, left, tmp_path):
    found = redraw(picture_with(FROM_A1111.format(schedule=schedule), tmp_path / "a.png"))
    config = parse(Config, found.words[2:], program="generate")
    assert config.prompts == ("(crab:1.3) BREAK sea <lora:line:0.8> <lora:line:0.8>, \\(x\\), easyneg",)
    assert (config.negative, config.prompt_syntax, config.sampler) == ("blurry, (bad:1.2)", "a1111", sampler)
    assert (config.steps, config.guidance, config.seed, config.size, config.clip_skip) == (4, 7.0, (42,), "64x96", 1)
    assert (config.base, config.embedding) == ("v1-5.safetensors", ("easyneg=easyneg.safetensors",))
    assert dict(found.left_out) == {"RNG": "GPU", "ADetailer model": "face.pt"} | left


def test_a_sampler_whose_own_schedule_is_not_here_is_told_and_not_taken(tmp_path):
    text = "a crab\nSteps: 4, Seed: 1, Sampler: DPM++ 2M SDE, Schedule type: Automatic, RNG: CPU"
    found = redraw(picture_with(text, tmp_path / "a.png"))
    assert "--sampler" not in found.words
    assert dict(found.left_out) == {"Sampler": "DPM++ 2M SDE, Automatic"}


def test_the_strength_of_a_high_resolution_fix_is_none_of_a_picture_to_begin_from(tmp_path):
    text = "a crab\nSteps: 4, Seed: 1, RNG: CPU, Denoising strength: 0.4"
    alone = parse(Config, redraw(picture_with(text, tmp_path / "a.png")).words[2:], program="generate")
    assert (str(alone.image), alone.strength) == ("PICTURE", 0.4)
    found = redraw(picture_with(f"{text}, Hires resize: 96x96", tmp_path / "b.png"))
    assert parse(Config, found.words[2:], program="generate").image is None
    assert dict(found.left_out) == {"Denoising strength": "0.4", "Hires resize": "96x96"}


@pytest.mark.parametrize(
    ("said", "steps", "left"),
    [
        ("Hires upscale: 1.5, Hires upscaler: Lanczos", None, {}),
        ("Hires upscale: 1.5, Hires steps: 9, Hires upscaler: Latent", 9, {"Hires upscaler": "Latent"}),
    ],
)
def test_a_high_resolution_fix_is_told_as_a_second_pass(said, steps, left, tmp_path):
    text = f"a crab\nSteps: 4, Seed: 1, RNG: CPU, Denoising strength: 0.7, {said}"
    found = redraw(picture_with(text, tmp_path / "a.png"))
    config = parse(Config, found.words[2:], program="generate")
    assert (config.hires, config.hires_strength, config.hires_steps) == (1.5, 0.7, steps)
    assert (config.image, config.strength) == (None, None)
    assert dict(found.left_out) == left


def test_a_second_pass_that_enlarges_too_much_or_nothing_is_left_out(tmp_path):
    for factor in ("1", "9", "x"):
        text = f"a crab\nSteps: 4, Seed: 1, RNG: CPU, Hires upscale: {factor}"
        found = redraw(picture_with(text, tmp_path / "a.png"))
        assert "--hires" not in found.words
        assert dict(found.left_out) == {"Hires upscale": factor}


def test_a_clip_skip_of_sdxls_own_layer_is_told_and_not_taken(tmp_path):
    """A1111 and Forge take the same layer of SDXL for 1 and 2, and only the picture's size tells the family."""
    text = "a crab\nSteps: 4, Seed: 1, Size: 832x1216, Clip skip: 2, RNG: CPU"
    found = redraw(picture_with(text, tmp_path / "a.png"))
    assert parse(Config, found.words[2:], program="generate").clip_skip is None
    assert dict(found.left_out) == {"Clip skip": "2 (SDXL has its own layer; for SD 1.x add --clip-skip 1)"}


def test_our_own_picture_is_told_with_its_adapters_and_what_they_ask_for(tmp_path):
    lora = tmp_path / "line.safetensors"
    save_file({"a": torch.zeros(1)}, lora)
    about = dict(prompt="a (b) crab", negative="", seed=3, steps=5, guidance=3.0, width=64, height=64, base="pocket")
    about |= dict(
        adapter_guidance={"l": 1.5}, over_steps={"l": {"points": [[0, 0], [0.4, 1]]}}, vae=None, clip_skip=None
    )
    used = [Adapter(lora, Blocks((0.8, 0.5), {"down": 0.5}), "l"), Adapter(lora, 0.0, "other")]
    save_with_settings(
        Image.new("RGB", (8, 8)), used, about | {"prompt_syntax": "plain"}, tmp_path / "a.png", ("DDIM", None)
    )
    found = redraw(tmp_path / "a.png")
    config = parse(Config, found.words[2:], program="generate")
    assert (config.prompts, config.prompt_syntax, config.base) == (("a (b) crab",), "plain", "pocket")
    assert config.lora == ("l=line.safetensors:0.8:0.5", "other=line.safetensors:0")
    assert (config.blocks, config.over_steps) == (("l=down:0.5",), ("l=0:0,0.4:1",))
    assert config.adapter_guidance == ("l=1.5", "other=0")
    assert found.left_out == ()


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_our_own_jpeg_is_told_as_our_png_is(suffix, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "line.safetensors")
    about = dict(prompt="<flam> crab", negative="", seed=3, steps=5, guidance=3.0, width=64, height=64, base="pocket")
    about |= dict(adapter_guidance={}, vae=None, clip_skip=None, prompt_syntax="plain", switch={"every": 5})
    about |= dict(embeddings=["word.safetensors"], over_steps={"line": {"span": [0, 0.5]}})
    words = []
    for file in (tmp_path / "a.png", tmp_path / f"a.{suffix}"):
        used = [Adapter(tmp_path / "line.safetensors", 0.8, "line")]
        save_with_settings(Image.new("RGB", (8, 8)), used, about, file, ("DDIM", None))
        words.append(redraw(file).words)
    assert words[1] == words[0]
    assert "word.safetensors" in words[1]
    assert "line=0-0.5" in words[1]


NOT_TOLD = {"Regions, weights by step and turns": "(this file does not tell of any)"}


@pytest.mark.parametrize(
    ("label", "guidance", "left"),
    [("line", ("line=1.5", "other=0"), NOT_TOLD), ("l", (), {"Adapter guidance": "l: 1.5", **NOT_TOLD})],
)
def test_our_own_jpeg_without_our_json_is_told_by_its_text(label, guidance, left, tmp_path):
    """As earlier versions wrote it, and where a JPEG has no room; it names adapters by their files."""
    for name in ("line", "other"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    about = dict(prompt="a (b) crab", negative="", seed=3, steps=5, guidance=3.0, width=64, height=64, base="a/b")
    about |= dict(adapter_guidance={label: 1.5}, vae=None, clip_skip=1, prompt_syntax="plain")
    used = [Adapter(tmp_path / "line.safetensors", 0.8, label), Adapter(tmp_path / "other.safetensors", 0.5, "other")]
    save_with_settings(Image.new("RGB", (8, 8)), used, about, tmp_path / "a.png", ("DDIM", None))
    text = read_picture_info(tmp_path / "a.png").parameters
    found = redraw(save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", text))
    config = parse(Config, found.words[2:], program="generate")
    assert (config.prompts, config.prompt_syntax) == (("a \\(b\\) crab <lora:line:0.8> <lora:other:0.5>",), "a1111")
    assert (config.base, config.clip_skip, config.adapter_guidance) == ("a/b", 1, guidance)
    assert dict(found.left_out) == left


def test_a_sheet_is_told_by_its_own_settings_and_written_where_the_reader_says(tmp_path):
    asked = {each.name: "-o" for each in fields(GridConfig)} | {"overwrite": True, "loud": "1"}
    found = redraw(picture_with("a\nSteps: 4, Seed: 1, CFG scale: 7", tmp_path / "a.png", {"grid": asked}))
    of_machine = ("output", "device", "offload")
    assert dict(found.left_out) == {**dict.fromkeys(of_machine, "-o"), "overwrite": "True", "loud": "1"}
    known = [each.name.replace("_", "-") for each in fields(GridConfig) if each.name not in of_machine]
    assert sorted(found.words[2:]) == sorted(f"--{name}=-o" for name in known)


def test_a_picture_in_place_of_a_prompt_is_refused(tmp_path):
    file = picture_with("", tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"an image, and no prompt. sfumato inspect .*a.png tells the command"):
        plan(Config((str(file),)))


def test_a_picture_of_another_program_says_so(tmp_path):
    with pytest.raises(DataError, match=r"without settings as A1111, Forge, InvokeAI and sfumato write"):
        redraw(picture_with("", tmp_path / "a.png"))


def test_inspect_prints_the_command_on_a_line_of_its_own(tmp_path, capsys):
    assert inspect(["--file", str(picture_with(FROM_A1111.format(schedule="Karras"), tmp_path / "a.png"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not in the command: RNG GPU, ADetailer model face.pt" in lines
    assert lines[-1].startswith("  sfumato generate '(crab:1.3) BREAK sea")


def test_a_word_of_ours_whose_name_the_file_does_not_tell_keeps_its_own(tmp_path):
    text = "<flam> crab\nSteps: 4, Seed: 1, CFG scale: 7, TI hashes: word: 0123456789ab, Version: sfumato-0.6.0"
    assert "word.safetensors" in redraw(picture_with(text, tmp_path / "a.png")).words
