"""Settings inside pictures, as other tools read them."""

import json
import re
import shlex
import zlib
from dataclasses import fields
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image, JpegImagePlugin, PngImagePlugin
from safetensors.torch import save_file
from sfumato.pipelines.generate import Config, plan
from sfumato.pipelines.grid import Config as GridConfig
from sfumato.pipelines.inspect_file import main as inspect

from sfumato.config import parse
from sfumato.drawing.drawn import save_drawn
from sfumato.drawing.invoke_metadata import read_invoke
from sfumato.drawing.pnginfo import (
    Parameters,
    format_parameters,
    lora_tag,
    parse_parameters,
    read_picture_info,
    save_picture,
    short_hashes,
)
from sfumato.drawing.redraw import redraw, render
from sfumato.drawing.sheet import read_drawn
from sfumato.errors import ConfigError, DataError
from sfumato.weighting.adapter import Adapter
from sfumato.weighting.blocks import Blocks

SETTINGS = {
    "Steps": 20,
    "Sampler": "Euler a",
    "Schedule type": "Karras",
    "CFG scale": 7,
    "Seed": 965400086,
    "Size": "512x512",
    "Model": "v1-5",
    "VAE": None,
    "Lora hashes": short_hashes({"a": "0123456789abcdef", "b: x, y": "ba9876543210ff"}),
    "Version": "sfumato-0.1",
}
TEXT = """a crab <lora:a:0.8>
Negative prompt: blurry, grey
Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x512, Model: v1-5, \
Lora hashes: "a: 0123456789ab, b x y: ba9876543210", Version: sfumato-0.1"""


def test_the_text_is_a1111_s_to_the_letter():
    assert format_parameters(Parameters("a crab " + lora_tag("a", 0.8), "blurry, grey", SETTINGS)) == TEXT


def test_numbers_are_written_as_they_are(tmp_path):
    assert lora_tag("a", 0.1234567) == "<lora:a:0.1234567>"
    assert lora_tag("a", 1.0) == "<lora:a:1>"
    settings = {"guidance": 7.1234567, "strength": 1.0, "adapter_guidance": {"a": 1.2345678}, "seed": 2**53 + 1}
    rest = {"prompt": "a", "negative": "", "steps": 20, "width": 8, "height": 8, "base": "b", "vae": None}
    whole = rest | settings | {"clip_skip": None}
    weights = (0.1234567, 1e-7)
    used = [Adapter(tmp_path / "a.safetensors", weights)]
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_drawn(Image.new("RGB", (8, 8)), used, whole, tmp_path / "a.png", ("Euler", None))
    found = read_picture_info(tmp_path / "a.png").parameters
    assert found.prompt == "a <lora:a:1e-07:0.1234567>"
    told = [found.settings[name] for name in ("CFG scale", "Denoising strength", "Adapter guidance", "Seed")]
    assert told == ["7.1234567", "1", "a: 1.2345678", "9007199254740993"]


def test_a_file_here_of_the_name_that_diffusers_gives_is_called_so(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    settings = {"prompt": "a", "negative": "", "steps": 2, "guidance": 7, "seed": 1, "width": 8, "height": 8}
    settings |= {"base": "b", "vae": None, "clip_skip": None, "adapter_guidance": {}}
    used = [Adapter(tmp_path / "pytorch_lora_weights.safetensors", 0.5)]
    save_drawn(Image.new("RGB", (8, 8)), used, settings, tmp_path / "a.png", ("Euler", None))
    assert read_picture_info(tmp_path / "a.png").parameters.prompt == "a <lora:pytorch_lora_weights:0.5>"


@pytest.mark.parametrize(
    ("syntax", "prompt", "negative"),
    [
        (None, r"\(a\) \\", r"\[b\]"),
        ("plain", r"\(a\) \\", r"\[b\]"),
        ("a1111", "(a) \\", "[b]"),
        ("compel", "(a) \\", "[b]"),
    ],
)
def test_a_prompt_is_written_as_a1111_reads_the_same(tmp_path, syntax, prompt, negative):
    """Brackets of plain prompts are characters; compel's weights have no other form, and are named as compel's."""
    settings = {"prompt": "(a) \\", "negative": "[b]", "steps": 2, "guidance": 7, "seed": 1, "width": 8, "height": 8}
    settings |= {"base": "b", "vae": None, "clip_skip": None, "adapter_guidance": {}, "prompt_syntax": syntax}
    settings = {name: value for name, value in settings.items() if name != "prompt_syntax" or value}
    save_drawn(Image.new("RGB", (8, 8)), [], settings, tmp_path / "a.png", ("DPM++ 2M", None))
    info = read_picture_info(tmp_path / "a.png")
    assert info.parameters.settings["Schedule type"] == "Uniform"  # A1111 would take Karras' where none is named
    assert info.own["sampler"] == "DPM++ 2M"
    assert (info.parameters.prompt, info.parameters.negative) == (prompt, negative)
    assert info.parameters.settings.get("Prompt syntax") == ("compel" if syntax == "compel" else None)
    assert info.own["prompt"] == "(a) \\"


@pytest.mark.parametrize(("family", "skipped", "told"), [("sd1", 1, "2"), ("sdxl", 1, "3"), ("sdxl", None, None)])
def test_clip_skip_is_told_as_a1111_counts_it_and_comes_back(tmp_path, family, skipped, told):
    settings = {"prompt": "a", "negative": "", "steps": 2, "guidance": 7, "seed": 1, "width": 1024, "height": 1024}
    settings |= {"base": "b", "family": family, "vae": None, "clip_skip": skipped, "adapter_guidance": {}}
    save_drawn(Image.new("RGB", (8, 8)), [], settings, tmp_path / "a.png", ("Euler", None))
    assert read_picture_info(tmp_path / "a.png").parameters.settings.get("Clip skip") == told
    words = redraw(tmp_path / "a.png").words
    assert (words[words.index("--clip-skip") + 1] if "--clip-skip" in words else None) == (skipped and str(skipped))


def test_no_negative_prompt_has_no_line():
    assert format_parameters(Parameters("a crab", "", {"Steps": 1})) == "a crab\nSteps: 1"


def test_the_settings_are_found_by_the_pattern_of_forge():
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    found = dict(re.findall(pattern, TEXT.split("\n")[-1]))
    assert found["Seed"] == "965400086"
    assert found["Lora hashes"] == '"a: 0123456789ab, b x y: ba9876543210"'
    assert list(found) == [name for name, value in SETTINGS.items() if value is not None]


@pytest.mark.parametrize("prompt", ["a crab", "two\nlines", "Käfer, 赤い (red:1.2)", "ends with: a colon", ""])
@pytest.mark.parametrize("negative", ["", "blurry", "two\nlines"])
def test_writing_and_reading_is_identity(prompt, negative):
    values = {name: str(value) for name, value in SETTINGS.items() if value is not None} | {"Note": 'a "b", c: \\d\ne'}
    values |= {"Said": '"so"', "Flag": "true", "Part": "1e3"}
    written = Parameters(prompt, negative, values)
    assert parse_parameters(format_parameters(written)) == written


def test_a_last_line_with_fewer_than_three_pairs_is_prompt():
    for prompt in ("a crab\nin a style: red", "a crab\nin a style: red, by hand: yes"):
        assert parse_parameters(prompt) == Parameters(prompt)
    assert parse_parameters("a crab\nSteps: 1, Seed: 2, Size: 8x8").prompt == "a crab"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_keeps_its_parameters(tmp_path, suffix):
    wanted = Parameters("赤い crab", "grey", {"Steps": "20", "Seed": "7", "Size": "64x64"})
    own = {"prompt": "赤い", "seed": 7}
    info = read_picture_info(save_picture(Image.new("RGB", (64, 64)), tmp_path / f"a.{suffix}", wanted, own))
    assert info.parameters == wanted
    assert info.own == own


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_our_own_json_leaves_a1111_s_comment_as_it_is(tmp_path, suffix):
    told = Parameters("a <b> & crab", "", {"Steps": 20})
    paths = [tmp_path / f"{name}.{suffix}" for name in ("a", "b")]
    for path, own in zip(paths, (None, {"prompt": "</sfumato:settings> & <b> 'c' \"d\""}), strict=True):
        save_picture(Image.new("RGB", (8, 8)), path, told, own)
    a, b = ([*Image.open(path).getexif().get_ifd(0x8769).items()] for path in paths)
    assert a == b
    assert read_picture_info(paths[1]).own == own
    assert ElementTree.fromstring(Image.open(paths[1]).info["xmp"]).tag == "{adobe:ns:meta/}xmpmeta"


def test_a_jpeg_without_room_for_our_own_json_is_kept_without_it(tmp_path):
    with pytest.warns(UserWarning, match=r"^a\.jpg: 70,\d+ bytes of sfumato's own settings, and a JPEG holds 65,504"):
        path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", own={"prompt": "x" * 70_000})
    assert read_picture_info(path).own is None
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", own={"prompt": "x" * 65_000})
    assert len(read_picture_info(path).own["prompt"]) == 65_000


@pytest.mark.parametrize(
    ("prompt", "negative"), [("red " * 20_000, "grey"), ("赤🦀" * 20_000, "赤🦀" * 20_000), ("a crab", "b " * 20_000)]
)
def test_a_jpeg_keeps_the_settings_and_as_much_of_the_prompts_as_it_holds(tmp_path, prompt, negative):
    wanted = Parameters(prompt.strip(), negative.strip(), {"Steps": "20", "Seed": "7", "Size": "64x64"})
    with pytest.warns(UserWarning, match=r"^a\.jpg: \d+,\d+ characters of prompt .* a JPEG holds 32,700"):
        info = read_picture_info(save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", wanted))
    assert info.parameters.settings == wanted.settings
    kept = 0
    for found, whole in ((info.parameters.prompt, wanted.prompt), (info.parameters.negative, wanted.negative)):
        assert found == whole or (found.endswith(" ...") and whole.startswith(found[:-4].strip()))
        kept += len(found.encode("utf-16-be")) // 2
    assert 32_500 < kept < 32_700
    assert read_picture_info(save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.webp", wanted)).parameters == wanted


def test_a_cut_prompt_keeps_its_tags(tmp_path):
    tags = " <lora:line:0.8> <lora:otter:0.4:0.6>"
    with pytest.warns(UserWarning, match="a JPEG holds"):
        path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", Parameters("a crab " * 9000 + tags[1:]))
    assert read_picture_info(path).parameters.prompt.endswith(" ..." + tags)


def test_a_picture_with_too_many_settings_is_kept_without_them(tmp_path):
    with pytest.warns(UserWarning, match="a JPEG holds"):
        path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", Parameters("a", "", {"Note": "x" * 40_000}))
    assert read_picture_info(path).parameters is None


def test_a_jpeg_keeps_its_colours_at_each_pixel(tmp_path):
    """Halved colours, Pillow's default, would smear the edges of drawings."""
    with Image.open(save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.jpg")) as picture:
        assert JpegImagePlugin.get_sampling(picture) == 0


def test_a_comment_of_plain_letters_is_read(tmp_path):
    """As cameras and a few tools write it, beside A1111's UNICODE."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a crab\nSteps: 1, Seed: 2, Size: 8x8"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    found = read_picture_info(tmp_path / "a.jpg").parameters
    assert found == Parameters("a crab", "", {"Steps": "1", "Seed": "2", "Size": "8x8"})


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "utf-16", "utf-8"])
def test_a_comment_is_read_in_either_order_of_its_bytes(encoding, tmp_path):
    """EXIF leaves it open, and Civitai's pictures have both."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a caf\u00e9, \u732b\nSteps: 1, Seed: 2, Size: 8x8".encode(encoding)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    found = read_picture_info(tmp_path / "a.jpg").parameters
    assert found == Parameters("a caf\u00e9, \u732b", "", {"Steps": "1", "Seed": "2", "Size": "8x8"})


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_comment_is_written_in_the_order_of_bytes_that_others_read(suffix, tmp_path):
    """A1111 and Forge read it by piexif, which knows no other than the larger byte first."""
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / f"a{suffix}", Parameters("caf\u00e9", "", {"Steps": 1}))
    with Image.open(path) as picture:
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + "caf\u00e9\nSteps: 1".encode("utf-16-be")


@pytest.mark.parametrize("text", ["[1]", "{", "7", "[" * 100_000])
def test_what_is_no_object_of_ours_is_none(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_text("sfumato", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert read_picture_info(tmp_path / "a.png").own is None


def test_png_text_is_latin_text_where_it_can_be(tmp_path):
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", Parameters("a crab", "", {"Steps": 1}))
    assert b"tEXtparameters\0a crab\nSteps: 1" in path.read_bytes()


def test_a_picture_without_anything_says_nothing(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    info = read_picture_info(tmp_path / "a.png")
    assert (info.parameters, info.own) == (None, None)


@pytest.mark.parametrize(("name", "side"), [("a.webp", 16_384), ("a.jpg", 65_501)])
def test_a_sheet_that_is_larger_than_its_format_is_refused(tmp_path, name, side):
    with pytest.raises(ConfigError, match=rf"^{name}: {side:,} pixels on a side, .* at most .*; name a \.png\.$"):
        save_picture(Image.new("RGB", (side, 8)), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    save_picture(Image.new("RGB", (side - 1, 8)), tmp_path / name)


def test_another_ending_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"\.png, \.jpg or \.webp"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(DataError, match=r"a\.png"):
        read_picture_info(tmp_path / "a.png")


def test_a_picture_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"a\.png: cannot be read .*4096 pixels"):
        read_picture_info(tmp_path / "a.png")
    assert read_drawn(tmp_path / "a.png") is None


def test_a_drawn_picture_with_a_header_cut_short_is_none(tmp_path):
    header = b"IHDR" + bytes(4)
    chunk = (4).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    assert read_drawn(tmp_path / "a.png") is None


FROM_A1111 = """(crab:1.3) BREAK sea <lora:line:0.8> <lora:line:0.8>, \\(x\\), easyneg
Negative prompt: blurry, (bad:1.2)
Steps: 4, Sampler: DPM++ 2M, Schedule type: {schedule}, CFG scale: 7, Seed: 42, Size: 64x96, Model hash: 6ce0161689, \
Model: v1-5, Clip skip: 2, ADetailer model: face.pt, TI hashes: "easyneg: c74b4e810b03", Version: v1.10.1"""


def picture_with(text, file, own=None):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    if own is not None:
        info.add_text("sfumato", json.dumps(own))
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)
    return file


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
    found = redraw(picture_with(f"{text}, Hires upscale: 2", tmp_path / "b.png"))
    assert parse(Config, found.words[2:], program="generate").image is None
    assert dict(found.left_out) == {"Denoising strength": "0.4", "Hires upscale": "2"}


def test_a_clip_skip_of_sdxls_own_layer_is_told_and_not_taken(tmp_path):
    """A1111 and Forge take the same layer of SDXL for 1 and 2, and only the picture's size tells the family."""
    text = "a crab\nSteps: 4, Seed: 1, Size: 832x1216, Clip skip: 2, RNG: CPU"
    found = redraw(picture_with(text, tmp_path / "a.png"))
    assert parse(Config, found.words[2:], program="generate").clip_skip is None
    assert dict(found.left_out) == {"Clip skip": "2 (SDXL has its own layer; for SD 1.x add --clip-skip 1)"}


def test_a_negative_prompt_that_was_pasted_with_its_name_is_read_without_it():
    """As A1111's parse_generation_parameters reads each line."""
    found = parse_parameters(
        "a crab\nNegative prompt: grey\nfog\nNegative prompt: blurry\nSteps: 4, Seed: 7, Size: 8x8"
    )
    assert (found.prompt, found.negative) == ("a crab", "grey\nfog\nblurry")


def test_a_setting_in_quotes_that_are_no_json_is_kept_as_it_is():
    assert parse_parameters('a\nSteps: 20, Sampler: Euler, Seed: 1, Note: "a\\x"').settings["Note"] == '"a\\x"'


FROM_INVOKE = {
    "app_version": "6.3.0",
    "generation_mode": "txt2img",
    "positive_prompt": "crab++ [in] fog, <easy-neg>",
    "negative_prompt": "blurry",
    "positive_style_prompt": "crab++ [in] fog, <easy-neg>",
    "width": 512,
    "height": 768,
    "seed": 7,
    "rand_device": "cpu",
    "cfg_scale": 6.5,
    "cfg_rescale_multiplier": 0.0,
    "steps": 20,
    "scheduler": "dpmpp_2m_k",
    "clip_skip": 1,
    "model": {"key": "a", "hash": "b", "name": "dreamshaper-8", "base": "sd-1", "type": "main"},
    "loras": [{"model": {"key": "c", "name": "line", "base": "sd-1", "type": "lora"}, "weight": 0.75}],
    "controlnets": [],
}


def picture_of_invoke(about, file, key="invokeai_metadata"):
    info = PngImagePlugin.PngInfo()
    info.add_text(key, json.dumps(about))
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)
    return file


def test_what_invokeai_wrote_is_told_as_a_command(tmp_path):
    found = redraw(picture_of_invoke(FROM_INVOKE, tmp_path / "a.png"))
    config = parse(Config, found.words[2:], program="generate")
    assert config.prompts == ("crab++ [in] fog, <easy-neg> <lora:line:0.75>",)
    assert (config.negative, config.prompt_syntax, config.sampler) == ("blurry", "compel", "dpmpp_2m karras")
    assert (config.steps, config.guidance, config.seed, config.size, config.clip_skip) == (20, 6.5, (7,), "512x768", 1)
    assert (config.base, config.embedding) == ("dreamshaper-8.safetensors", ("<easy-neg>=easy-neg.safetensors",))
    assert found.left_out == ()


def test_what_invokeai_wrote_long_ago_and_what_has_no_option_is_told(tmp_path):
    about = {"scheduler": "kdpm_2_a_k", "rand_device": "cuda", "generation_mode": "inpaint", "strength": 0.6}
    about |= {"model": {"model_name": "sd15", "base_model": "sd-1"}, "controlnets": [{}, {}], "cfg_scale": [7, 5]}
    about |= {"loras": [{"lora": {"model_name": "line", "base_model": "sd-1"}, "weight": 1}, 3], "positive_prompt": "a"}
    found = redraw(picture_of_invoke(about, tmp_path / "a.png"))
    config = parse(Config, found.words[2:], program="generate")
    assert (config.prompts, config.base, config.sampler) == (
        ("a <lora:line:1>",),
        "sd15.safetensors",
        "dpm2 a karras",
    )
    assert config.strength == 0.6
    told = {"RNG": "GPU", "CFG scale by step": "[7, 5]", "Mode": "inpaint", "ControlNets": "2"}
    assert dict(found.left_out) == told


def test_what_invokeai_wrote_before_version_3_is_told_as_a_command(tmp_path):
    image = {"prompt": [{"prompt": "a crab [blurry] in fog [dark]", "weight": 1.0}], "steps": 20, "cfg_scale": 7.5}
    image |= {"seed": 7, "width": 512, "height": 768, "sampler": "k_dpmpp_2", "type": "img2img", "perlin": 0.2}
    image |= {"strength_steps": 0.6, "variations": [], "threshold": 0, "postprocessing": None}
    about = {"model": "stable diffusion", "model_weights": "sd15", "app_version": "v2.2.4", "image": image}
    found = redraw(picture_of_invoke(about, tmp_path / "a.png", "sd-metadata"))
    config = parse(Config, found.words[2:], program="generate")
    assert (config.prompts, config.negative) == (("a crab  in fog",), "blurry dark")
    assert (config.base, config.sampler, config.strength) == ("sd15.safetensors", "dpmpp_2m", 0.6)
    assert (config.steps, config.guidance, config.seed, config.size) == (20, 7.5, (7,), "512x768")
    assert dict(found.left_out) == {"RNG": "GPU", "Perlin noise": "0.2"}


@pytest.mark.parametrize(
    "text",
    ["[1]", "{", "{}", '{"positive_prompt": 3}', '{"image": {}}', '{"image": {"prompt": [3]}}', "null", "[" * 9999],
)
def test_metadata_without_a_prompt_is_none(text):
    assert read_invoke(text) is None


def test_our_own_picture_is_told_with_its_adapters_and_what_they_ask_for(tmp_path):
    lora = tmp_path / "line.safetensors"
    save_file({"a": torch.zeros(1)}, lora)
    about = dict(prompt="a (b) crab", negative="", seed=3, steps=5, guidance=3.0, width=64, height=64, base="pocket")
    about |= dict(
        adapter_guidance={"l": 1.5}, over_steps={"l": {"points": [[0, 0], [0.4, 1]]}}, vae=None, clip_skip=None
    )
    used = [Adapter(lora, Blocks((0.8, 0.5), {"down": 0.5}), "l"), Adapter(lora, 0.0, "other")]
    save_drawn(Image.new("RGB", (8, 8)), used, about | {"prompt_syntax": "plain"}, tmp_path / "a.png", ("DDIM", None))
    found = redraw(tmp_path / "a.png")
    config = parse(Config, found.words[2:], program="generate")
    assert (config.prompts, config.prompt_syntax, config.base) == (("a (b) crab",), "plain", "pocket")
    assert config.lora == ("l=line.safetensors:0.8:0.5", "other=line.safetensors:0")
    assert (config.blocks, config.over_steps) == (("l=down:0.5",), ("l=0:0,0.4:1",))
    assert config.adapter_guidance == ("l=1.5", "other=0")
    assert found.left_out == ()


def test_adapters_of_regions_have_no_guidance_of_their_own_and_are_named_where_they_count(tmp_path):
    about = dict(prompt="a crab", negative="", seed=3, steps=5, guidance=3.0, width=64, height=64, base="pocket")
    about |= dict(adapter_guidance={}, vae=None, clip_skip=None, prompt_syntax="plain")
    inside = [
        {"label": n, "file": f"{n}.safetensors", "hash": n * 64, "weight": w} for n, w in (("a", 0.0), ("b", 1.0))
    ]
    about["regions"] = [{"where": [0, 0, 0.5, 1], "prompt": None, "adapters": inside}]
    save_file({"a": torch.zeros(1)}, tmp_path / "line.safetensors")
    used = [Adapter(tmp_path / "line.safetensors", 0.8, "line")]
    save_drawn(Image.new("RGB", (8, 8)), used, about, tmp_path / "a.png", ("DDIM", None))
    hashes = read_picture_info(tmp_path / "a.png").parameters.settings["Lora hashes"]
    assert re.fullmatch("line: [0-9a-f]{12}, b: b{12}", hashes)
    assert "--adapter-guidance" not in redraw(tmp_path / "a.png").words


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({}, False),
        ({"regions": [{"where": [0, 0, 1, 1], "prompt": "an <otter>", "adapters": []}]}, True),
        ({"prompts": ["a crab", "an <otter>"]}, True),
        ({"negative": "<otter>"}, True),
    ],
)
def test_a_word_is_named_wherever_it_is_said(more, told, tmp_path):
    about = dict(prompt="a crab", negative="", seed=3, steps=5, guidance=3.0, width=64, height=64, base="pocket")
    about |= dict(adapter_guidance={}, vae=None, clip_skip=None, prompt_syntax="plain") | more
    save_file({"emb_params": torch.zeros(1)}, tmp_path / "otter.safetensors")
    words = [(tmp_path / "otter.safetensors", ["<otter>"])]
    save_drawn(Image.new("RGB", (8, 8)), [], about, tmp_path / "a.png", ("DDIM", None), words)
    assert ("TI hashes" in read_picture_info(tmp_path / "a.png").parameters.settings) is told


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_our_own_jpeg_is_told_as_our_png_is(suffix, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "line.safetensors")
    about = dict(prompt="<flam> crab", negative="", seed=3, steps=5, guidance=3.0, width=64, height=64, base="pocket")
    about |= dict(adapter_guidance={}, vae=None, clip_skip=None, prompt_syntax="plain", switch={"every": 5})
    about |= dict(embeddings=["word.safetensors"], over_steps={"line": {"span": [0, 0.5]}})
    words = []
    for file in (tmp_path / "a.png", tmp_path / f"a.{suffix}"):
        used = [Adapter(tmp_path / "line.safetensors", 0.8, "line")]
        save_drawn(Image.new("RGB", (8, 8)), used, about, file, ("DDIM", None))
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
    save_drawn(Image.new("RGB", (8, 8)), used, about, tmp_path / "a.png", ("DDIM", None))
    text = read_picture_info(tmp_path / "a.png").parameters
    found = redraw(save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", text))
    config = parse(Config, found.words[2:], program="generate")
    assert (config.prompts, config.prompt_syntax) == (("a \\(b\\) crab <lora:line:0.8> <lora:other:0.5>",), "a1111")
    assert (config.base, config.clip_skip, config.adapter_guidance) == ("a/b", 1, guidance)
    assert dict(found.left_out) == left


@pytest.mark.parametrize(
    "own",
    [
        {"prompt": 3},
        {"adapters": [{}]},
        {"adapters": [{"label": "a", "weight": "x"}]},
        {"adapters": [{"label": "a", "file": "b", "weight": 10**400}]},
        {"switch": {"every": "--overwrite"}},
    ],
)
def test_our_json_by_another_hand_is_left_aside(own, tmp_path):
    text = "a crab\nSteps: 4, Seed: 1, CFG scale: 7"
    found = redraw(picture_with(text, tmp_path / "a.png", own))
    assert found.words == redraw(picture_with(text, tmp_path / "b.png")).words


LONG = 100_000  # letters, of which the square is minutes


def test_long_settings_without_a_colon_are_read_once(tmp_path):
    """Both were read in the square of their length."""
    text = (
        f"a <lora:b:1>\nSteps: 4, Seed: 1, Version: sfumato-1, TI hashes: {'a' * LONG}, Adapter guidance: {'b' * LONG}"
    )
    found = redraw(picture_with(text, tmp_path / "a.png"))
    assert found.words[-2:] == ("--adapter-guidance", "b=0")


def test_long_brackets_of_an_old_picture_of_invokeai_are_read_once():
    found = read_invoke(json.dumps({"image": {"prompt": "a [fog] " + "[" * LONG}}))
    assert (found.prompt, found.negative) == ("a  " + "[" * LONG, "fog")


@pytest.mark.parametrize("name", ["Steps", "CFG scale", "Seed", "Size", "Clip skip", "Denoising strength"])
@pytest.mark.parametrize("value", ["--output=/home/me/.bashrc", "much", "9" * 5000, "nan"])
def test_a_number_that_is_none_is_told_and_not_taken(name, value, tmp_path):
    text = f"a crab\nModel: a, Sampler: Euler, RNG: CPU, {name}: {value}"
    found = redraw(picture_with(text, tmp_path / "a.png"))
    assert found.left_out == ((name, value),)
    assert not [word for word in found.words if value in word]


@pytest.mark.parametrize(
    "text",
    [
        "Model: --overwrite, VAE: --overwrite, Denoising strength: 0.5, Seed: -3",
        'Version: sfumato-1, Model: --overwrite, TI hashes: "--overwrite: ab", Prompt syntax: --overwrite',
    ],
)
def test_a_hostile_setting_is_no_option(text, tmp_path):
    own = {
        "image": "--overwrite",
        "embeddings": ["--overwrite"],
        "adapters": [{"label": "-x", "file": "y", "weight": 1}],
    }
    for each in (None, own, {"prompt_syntax": "--overwrite"}):
        found = redraw(picture_with(f"a crab\nSteps: 4, {text}", tmp_path / "a.png", each))
        config = parse(Config, found.words[2:], program="generate")
        assert not config.overwrite
        assert config.base.startswith("--overwrite")


def test_what_no_terminal_shows_is_told(tmp_path):
    found = redraw(picture_with("a crab\u202e\nSteps: 4, Seed: 1, CFG scale: 7, RNG: CPU", tmp_path / "a.png"))
    assert found.words[2] == "a crab "
    assert [name for name, _ in found.left_out] == ["characters"]


@pytest.mark.parametrize(("name", "value"), [("precision", "--overwrite"), ("overwrite", True), ("partial", [1])])
def test_only_options_of_the_base_with_values_that_they_have_are_taken(name, value, tmp_path):
    found = redraw(picture_with("a\nSteps: 4, Seed: 1, CFG scale: 7", tmp_path / "a.png", {"options": {name: value}}))
    assert not {"--overwrite", "--partial", "--precision"} & {*found.words}


def test_a_sheet_is_told_by_its_own_settings_and_written_where_the_reader_says(tmp_path):
    asked = {each.name: "-o" for each in fields(GridConfig)} | {"overwrite": True, "loud": "1"}
    found = redraw(picture_with("a\nSteps: 4, Seed: 1, CFG scale: 7", tmp_path / "a.png", {"grid": asked}))
    of_machine = ("output", "device", "offload")
    assert dict(found.left_out) == {**dict.fromkeys(of_machine, "-o"), "overwrite": "True", "loud": "1"}
    known = [each.name.replace("_", "-") for each in fields(GridConfig) if each.name not in of_machine]
    assert sorted(found.words[2:]) == sorted(f"--{name}=-o" for name in known)


HUGE = 10**400
NEAR = int("9" * 4300)  # JSON's longest whole number, and one more is not written


def of_comfy(**inputs):
    sampler = {"sampler_name": "euler", "positive": ["2", 0], "model": ["3", 0]}
    return {"1": {"inputs": sampler}, "2": {"inputs": {"text": "a crab"}}, "3": {"inputs": inputs}}


@pytest.mark.parametrize(
    ("key", "about"),
    [
        ("prompt", of_comfy(lora_name="line", strength_model=HUGE)),
        ("prompt", {"1": {"inputs": {"sampler_name": "a", "positive": ["2", 0], "negative": ["3", 0]}},
                    "2": {"inputs": {"text": "a crab"}}, "3": {"inputs": {"text": 3}}}),
        ("invokeai_metadata", FROM_INVOKE | {"loras": [{"model": {"name": "line"}, "weight": HUGE}]}),
        ("invokeai_metadata", FROM_INVOKE | {"clip_skip": NEAR}),
    ],
)  # fmt: skip
def test_numbers_and_types_that_cannot_be_meant_make_a_picture_that_is_not_understood(key, about, tmp_path):
    with pytest.raises(DataError, match=r"^a\.png: an image without settings as A1111"):
        redraw(picture_of_invoke(about, tmp_path / "a.png", key))


def test_odd_types_beside_a_prompt_are_told(tmp_path):
    about = FROM_INVOKE | {"negative_prompt": [1], "regions": {"a": [1]}}
    assert dict(redraw(picture_of_invoke(about, tmp_path / "a.png")).left_out) == {"Regions": "yes"}


def test_a_hostile_prompt_is_no_option_and_does_not_reach_the_terminal(tmp_path):
    text = "--overwrite '; rm a\x1b[2J\nb\nNegative prompt: --x\nSteps: 4, Seed: 1, CFG scale: 7"
    found = redraw(picture_with(text, tmp_path / "a.png"))
    config = parse(Config, found.words[2:], program="generate")
    assert (config.prompts, config.negative) == (("--overwrite '; rm a [2J b",), "--x")
    assert not config.overwrite
    assert shlex.split(render(found).splitlines()[-1]) == list(found.words)


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
