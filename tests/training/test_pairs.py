"""Which images are pairs: by name, and by the prompt in their settings."""

import json

import pytest
from PIL import Image, PngImagePlugin

from sfumato.errors import DataError
from sfumato.generation.metadata.png_info import Parameters, save_picture
from sfumato.training.methods.pairs import preference_pairs, prompt_of, read_captioned_folder


def image(path, prompt="", caption="", size=(64, 64)):
    path.parent.mkdir(exist_ok=True)
    own = {"prompt": prompt} if prompt else None
    save_picture(Image.new("RGB", size, "white"), path, Parameters(prompt) if prompt else None, own)
    if caption:
        path.with_suffix(".txt").write_text(caption)


def found(tmp_path, template="{caption}"):
    told = read_captioned_folder(tmp_path / "good", template), read_captioned_folder(tmp_path / "bad", "{caption}")
    more, less = preference_pairs(*told)
    assert [each.caption for each in more] == [each.caption for each in less]
    pairs = [(one.path.name, other.path.name, one.caption) for one, other in zip(more, less, strict=True)]
    return pairs, more.notes[0]


def test_by_name_with_the_captions_of_the_preferred(tmp_path):
    for name in ("a", "b"):
        image(tmp_path / f"good/{name}.png", caption=f"a {name}")
        image(tmp_path / f"bad/{name}.png", caption="never read")
    pairs, note = found(tmp_path, "{caption}, drawn")
    assert pairs == [("a.png", "a.png", "a a, drawn"), ("b.png", "b.png", "a b, drawn")]
    assert note == "2 pairs: 2 by file name, 0 by prompt"


def test_by_prompt_each_image_comes_in_a_pair(tmp_path):
    for name in ("1", "2"):
        image(tmp_path / f"good/{name}.png", "a crab")
    for name in ("3", "4", "5"):
        image(tmp_path / f"bad/{name}.png", "a  crab")
    image(tmp_path / "bad/6.png", "a key")
    image(tmp_path / "good/7.png", "a key", size=(64, 32))
    pairs, note = found(tmp_path)
    assert pairs == [("1.png", "3.png", "a crab"), ("2.png", "4.png", "a crab"), ("1.png", "5.png", "a crab")]
    assert note == ("3 pairs: 0 by file name, 3 by prompt; without a partner, and left out: 2 images (7.png, 6.png)")


def test_one_name_with_other_prompts_is_no_pair(tmp_path):
    """The first images of two calls of `generate`."""
    image(tmp_path / "good/1.png", "a crab")
    image(tmp_path / "bad/1.png", "a key")
    image(tmp_path / "good/2.png", "a key")
    image(tmp_path / "bad/2.png", "a crab")
    assert found(tmp_path)[0] == [("1.png", "2.png", "a crab"), ("2.png", "1.png", "a key")]


def test_a_caption_comes_before_the_settings(tmp_path):
    image(tmp_path / "good/1.png", "a crab", caption="a red crab")
    image(tmp_path / "bad/1.png", "a crab")
    assert found(tmp_path)[0] == [("1.png", "1.png", "a red crab")]


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("a (red:1.3) crab <lora:line:0.8>", "a red crab"),
        (r"a crab \(animal\)", "a crab (animal)"),
        ("a (red:1.3) [crab:key:0.4]", "a red key"),
        ("a (broken crab", "a (broken crab"),
    ],
)
def test_the_prompt_of_a1111_without_what_is_no_caption(written, wanted, tmp_path):
    settings = {"Steps": 20, "Sampler": "Euler", "CFG scale": 7, "Seed": 3}
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", Parameters(written, "blurry", settings))
    assert prompt_of(tmp_path / "a.png") == wanted


def test_the_prompt_of_comfyui(tmp_path):
    graph = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (blue:1.2) crab", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0],
                "seed": 1, "steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "a"}},
    }  # fmt: skip
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("prompt", json.dumps(graph))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    assert prompt_of(tmp_path / "a.png") == "a blue crab"


def test_an_image_without_settings_has_no_prompt(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.bmp")
    assert (prompt_of(tmp_path / "a.png"), prompt_of(tmp_path / "a.bmp")) == ("", "")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda bad: (bad / "1.png").rename(bad / "9.png"), "no pair among 1 image and 1 image; wanted the same file"),
        (
            lambda bad: Image.new("RGB", (32, 64)).save(bad / "1.png"),
            "1: 64x64 pixels in {0}/good and 32x64 in {0}/bad; the images of a pair must have the same size",
        ),
    ],
)
def test_what_is_no_pair_is_told_in_one_line(spoil, said, tmp_path):
    for folder in ("good", "bad"):
        image(tmp_path / folder / "1.png")
    spoil(tmp_path / "bad")
    with pytest.raises(DataError) as told:
        found(tmp_path)
    assert said.format(tmp_path) in str(told.value)
    assert "\n" not in str(told.value)


def test_without_any_caption_it_says_how_to_give_one(tmp_path):
    for folder in ("good", "bad"):
        image(tmp_path / folder / "1.png")
    with pytest.raises(DataError, match="1 of 1 images have no caption"):
        read_captioned_folder(tmp_path / "good", None)
