"""`sfumato generate` from a picture, and within a mask."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.generation.image_options import size_like
from sfumato.generation.metadata.png_info import read_picture_info


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
