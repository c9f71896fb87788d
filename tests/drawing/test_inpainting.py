"""Inpainting models draw what diffusers' pipelines for them draw, and without a mask all of the image."""

import pytest
import torch
from PIL import Image

from sfumato.generation.draw import Start, draw
from sfumato.generation.image_options import Hires
from sfumato.models import load_base
from tests.pixels import difference, picture_with_mask
from tests.tiny import CPU, tiny_pipeline, write_folder

SIDE = 64
SIZE = {"width": SIDE, "height": SIDE}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pipe(request):
    return tiny_pipeline(request.param, shallow=True, inpainting=True)


@pytest.fixture(scope="module")
def picture():
    return picture_with_mask()


def theirs(pipe, image, mask, strength=1.0, steps=3):
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        "a cat",
        image=image,
        mask_image=mask,
        strength=strength,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(7),
        **SIZE,
    )
    return made.images[0]


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_within_the_mask_it_is_diffusers_and_outside_the_image(pipe, picture, strength):
    image, mask = picture
    (ours,) = draw(pipe, "a cat", 7, steps=3, start=Start(image, strength, mask), **SIZE)
    wanted = Image.composite(theirs(pipe, image, mask, strength), image, mask)
    assert difference(ours, wanted) <= 1
    assert difference(ours, image) > 20


def test_without_an_image_all_is_drawn(pipe, picture):
    grey, white = Image.new("RGB", (SIDE, SIDE), "grey"), Image.new("L", (SIDE, SIDE), "white")
    (ours,) = draw(pipe, "a cat", 7, steps=3, **SIZE)
    assert difference(ours, theirs(pipe, grey, white)) <= 1


def test_an_image_without_a_mask_is_redrawn_in_part(pipe, picture):
    white = Image.new("L", (SIDE, SIDE), "white")
    (ours,) = draw(pipe, "a cat", 7, steps=4, start=Start(picture[0], 0.5), **SIZE)
    assert difference(ours, theirs(pipe, picture[0], white, 0.5, 4)) <= 1


def test_a_base_draws_as_its_pipeline_and_several_images_each_as_alone(pipe, picture, tmp_path):
    base = load_base(write_folder(pipe, tmp_path / "base"), precision=CPU)
    start = Start(picture[0], 1.0, picture[1])
    together = draw(base, ["a cat", "a dog"], [7, 8], steps=2, start=start, sampler="ddim", **SIZE)
    for place, (prompt, seed) in enumerate((("a cat", 7), ("a dog", 8))):
        (alone,) = draw(base, prompt, seed, steps=2, start=start, sampler="ddim", **SIZE)
        assert difference(alone, together[place]) <= 1
    assert difference(*draw(base, ["a cat", "a dog"], 7, steps=2, **SIZE)) > 1
    assert draw(base, "a cat", 7, steps=2, hires=Hires(1.5), **SIZE)[0].size == (96, 96)
