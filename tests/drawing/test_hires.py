"""A second pass: plain diffusers' img2img of the enlarged image, each image for itself, in the memory there is."""

from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from sfumato.errors import ConfigError
from sfumato.generation.draw import Start, draw
from sfumato.generation.image_options import Hires
from sfumato.generation.pipeline_call import PipelineCall
from sfumato.models import calls
from tests.pixels import difference
from tests.tiny import tiny_pipeline

FULL = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_it_is_what_diffusers_makes_of_the_enlarged_image(family):
    pipe = tiny_pipeline(family, shallow=True)
    first = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(7)).images[0]
    size = tuple(side * 3 // 2 for side in first.size)
    theirs = AutoPipelineForImage2Image.from_pipe(pipe)(
        "a cat",
        image=first.resize(size, Image.Resampling.LANCZOS),
        num_inference_steps=6,  # of which half are the three that are asked for
        strength=0.5,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    (ours,) = draw(pipe, "a cat", 7, steps=2, hires=Hires(1.5, 0.5, 3))
    assert ours.size == size
    assert difference(ours, theirs) <= 1


def test_an_image_does_not_depend_on_those_beside_it(pocket):
    settings = {"steps": 2, "width": 32, "height": 48, "hires": Hires(2, 0.6)}
    together = draw(pocket, ["a cat", "a red cat", "a cat"], [1, 2, 3], **settings)
    assert [image.size for image in together] == [(64, 96)] * 3
    assert difference(together[0], together[2]) > 1
    for place, prompt in enumerate(["a cat", "a red cat", "a cat"]):
        assert difference(together[place], draw(pocket, prompt, place + 1, **settings)[0]) <= 1
    one_by_one = draw(pocket, ["a cat", "a red cat", "a cat"], [1, 2, 3], batch=1, **settings)
    assert all(difference(*pair) <= 1 for pair in zip(together, one_by_one, strict=True))


@pytest.mark.parametrize("strength", [0.01, 0.1, 0.29, 0.3, 0.35, 0.4, 0.57, 0.7, 0.99, 1.0])
def test_the_sampler_is_set_to_the_fewest_steps_whose_share_is_as_many_as_asked_for(strength):
    for wanted in range(1, 60):
        count = Hires(2, strength, wanted).scheduled_steps(12)
        assert int(count * strength) == wanted
        assert int((count - 1) * strength) < wanted


def test_the_second_pass_has_as_many_steps_as_the_first_where_none_are_given(pocket):
    drawn = []

    def record(*_: Any) -> None:
        drawn.append(calls.CURRENT_STEPS.get())

    hook = pocket.unet.register_forward_pre_hook(record)
    try:
        draw(pocket, "a cat", 1, steps=3, hires=Hires(2, 0.5))
    finally:
        hook.remove()
    assert drawn == [3] * 6


def test_what_each_image_has_for_itself_finds_its_place_in_both_passes(pocket, monkeypatch):
    """Three images, in the second pass two at once and one."""
    drawn, own = [], PipelineCall.draw

    def record(call, texts, noises, starts):
        places, count = calls.CURRENT_IMAGES.get()
        drawn.append(([*places], count, noises, len(starts)))
        return own(call, texts, noises, starts)

    monkeypatch.setattr(PipelineCall, "draw", record)
    monkeypatch.setattr(
        "sfumato.generation.draw.LATENTS_AT_ONCE", 2 * 64 * 64 // pocket.pipeline().vae_scale_factor ** 2
    )
    draw(pocket, "a cat", [5, 6, 7], steps=1, width=32, height=32, hires=Hires(2, 1.0))
    assert drawn == [([0, 1, 2], 3, [5, 6, 7], 0), ([0, 1], 3, [5, 6], 2), ([2], 3, [7], 1)]


def test_fewer_are_enlarged_at_once_where_memory_does_not_hold_them(pocket, monkeypatch):
    settings = {"steps": 2, "width": 32, "height": 32, "hires": Hires(2, 0.5)}
    together, own, sizes = draw(pocket, "a cat", [1, 2, 3], **settings), PipelineCall.draw, []

    def limited(call, texts, noises, starts):
        sizes.append((len(texts), len(starts)))
        if len(starts) > 1:
            raise FULL
        return own(call, texts, noises, starts)

    monkeypatch.setattr(PipelineCall, "draw", limited)
    found = draw(pocket, "a cat", [1, 2, 3], **settings)
    assert sizes == [(3, 0), (3, 3), (1, 1), (1, 1), (1, 1)]
    assert all(difference(*pair) <= 1 for pair in zip(found, together, strict=True))


def test_an_image_that_the_vae_has_no_memory_to_encode_is_encoded_in_tiles(pocket, monkeypatch):
    vae, side = pocket.vae, 64
    own, tiled = vae.encode, []
    usual = vae.tile_latent_min_size, vae.tile_sample_min_size

    def limited(pixels, *args, **options):
        tiled.append(vae.use_tiling)
        if not vae.use_tiling:
            raise FULL
        return own(pixels, *args, **options)

    start = Start(Image.effect_noise((side, side), 60).convert("RGB"), 0.5)
    whole = draw(pocket, "a cat", 1, steps=2, width=side, height=side, start=start)[0]
    monkeypatch.setattr(vae, "encode", limited)
    found = draw(pocket, "a cat", 1, steps=2, width=side, height=side, start=start)[0]
    assert tiled == [False, True]
    assert difference(found, whole) > 0  # in tiles, indeed
    assert (vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size) == (False, *usual)


def test_another_error_of_the_vae_is_not_tried_again(pocket, monkeypatch):
    tries = []

    def broken(*_: Any, **__: Any) -> Any:
        tries.append(pocket.vae.use_tiling)
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(pocket.vae, "encode", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        draw(pocket, "a cat", 1, steps=2, start=Start(Image.new("RGB", (64, 64)), 0.5))
    assert tries == [False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hires": 2}, "hires 2: wanted sfumato.generation.draw.Hires"),
        ({"hires": Hires(2), "start": Start(Image.new("RGB", (8, 8)))}, "start and hires do not go together"),
        ({"hires": Hires(2, 0.01)}, "1200 steps; wanted 1 to 1000"),
        ({"hires": Hires(8), "width": 8192, "height": 8192}, "65536"),
    ],
)
def test_what_cannot_be_enlarged_is_refused_before_anything_is_drawn(pocket, monkeypatch, settings, message):
    monkeypatch.setattr(PipelineCall, "draw", lambda *_: pytest.fail("drawn"))
    with pytest.raises(ConfigError, match=message):
        draw(pocket, "a cat", 1, **{"steps": 12} | settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1,), "scale 1: wanted above 1 and at most 8"),
        ((8.5,), "scale 8.5"),
        (("2",), "scale '2'"),
        ((2, 0), "strength 0: wanted above 0"),
        ((2, 1.1), "strength 1.1"),
        ((2, 0.5, 0), "steps 0: wanted a whole number"),
        ((2, 0.5, 2.5), "steps 2.5"),
    ],
)
def test_a_second_pass_of_other_settings_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Hires(*values)
