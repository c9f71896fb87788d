"""Settings inside images: A1111's text to the letter, in PNG, JPEG and WebP, written and read."""

import re
import zlib
from xml.etree import ElementTree

import pytest
from PIL import Image, JpegImagePlugin, PngImagePlugin

from sfumato.errors import ConfigError, DataError
from sfumato.generation.metadata.png_info import (
    Parameters,
    format_parameters,
    lora_tag,
    parse_parameters,
    read_picture_info,
    save_picture,
    short_hashes,
)
from sfumato.utils.image_grid import read_image_or_none

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
    assert read_image_or_none(tmp_path / "a.png") is None


def test_a_drawn_picture_with_a_header_cut_short_is_none(tmp_path):
    header = b"IHDR" + bytes(4)
    chunk = (4).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    assert read_image_or_none(tmp_path / "a.png") is None


def test_a_negative_prompt_that_was_pasted_with_its_name_is_read_without_it():
    """As A1111's parse_generation_parameters reads each line."""
    found = parse_parameters(
        "a crab\nNegative prompt: grey\nfog\nNegative prompt: blurry\nSteps: 4, Seed: 7, Size: 8x8"
    )
    assert (found.prompt, found.negative) == ("a crab", "grey\nfog\nblurry")


def test_a_setting_in_quotes_that_are_no_json_is_kept_as_it_is():
    assert parse_parameters('a\nSteps: 20, Sampler: Euler, Seed: 1, Note: "a\\x"').settings["Note"] == '"a\\x"'
