"""Inpainting models: read in each form, told what diffusers tells them, and by the prompt alone where nothing is."""

import pytest
import torch
from torch.testing import assert_close

from sfumato.models import load_base
from tests.pixels import picture_with_mask
from tests.tiny import CPU, tiny_pipeline, write_folder, write_single_file

SIDE = 64


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    return tiny_pipeline(family, shallow=True, inpainting=True)


@pytest.fixture(scope="module")
def base(pipe, family, tmp_path_factory):
    return load_base(write_folder(pipe, tmp_path_factory.mktemp("inpainting") / family), precision=CPU)


@pytest.fixture(scope="module")
def picture():
    return picture_with_mask()


def pixels_of(pipe, image):
    """Laid out anew: of an even grey, a group norm that has one channel makes noise, by the layout another."""
    return pipe.image_processor.preprocess(image, SIDE, SIDE).contiguous()


def test_what_is_known_is_what_diffusers_gives_the_unet(base, pipe, picture, monkeypatch):
    image, mask = picture
    seen = []
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda sample, *a, **o: seen.append(sample) or forward(sample, *a, **o))
    # Its latents are drawn, ours are their mean.
    monkeypatch.setattr(
        type(pipe.vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist), "sample", lambda d, generator=None: d.mode()
    )
    pipe(
        "a cat",
        image=image,
        mask_image=mask,
        num_inference_steps=1,
        strength=1.0,
        guidance_scale=1.0,
        height=SIDE,
        width=SIDE,
    )
    hidden = (torch.tensor(mask.getdata()).view(1, 1, SIDE, SIDE) > 127).float()
    assert_close(base.known(pixels_of(pipe, image), hidden), seen[0][:1, 4:], atol=1e-5, rtol=1e-4)


def test_a_picture_that_is_hidden_as_a_whole_changes_nothing(base, pipe, picture):
    noisy, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([900, 10])
    text = base.encode_text(["a cat", "a dog"])
    sizes = [(SIDE, SIDE)] * 2
    told = noisy, timesteps, text, base.added_conditions(text, sizes, [(0, 0)] * 2, sizes)
    pixels = pixels_of(pipe, [picture[0]] * 2)
    with torch.no_grad():
        untold = base.predict(*told)
        assert_close(base.predict(*told, known=base.known(pixels, torch.ones(2, 1, SIDE, SIDE))), untold)
        assert not torch.allclose(base.predict(*told, known=base.known(pixels, torch.zeros(2, 1, SIDE, SIDE))), untold)


def test_a_single_file_is_one_by_its_first_layer(base, pipe, family, tmp_path):
    file = write_single_file(pipe, tmp_path / "model.safetensors")
    one = load_base(file, precision=CPU, prediction_type="epsilon")
    assert base.inpaints
    assert one.inpaints
    assert not load_base(write_folder(tiny_pipeline(family, shallow=True), tmp_path / "plain"), precision=CPU).inpaints
    assert type(one.pipeline()) is type(pipe)


def test_the_vae_rests_again_where_it_rested(pipe, tmp_path):
    """For a picture that is hidden as a whole it is read once."""
    base = load_base(write_folder(pipe, tmp_path / "model"), precision=CPU)
    base.lazy_weights.load_only("unet", "text")
    text = base.encode_text(["a cat"])
    base.predict(
        torch.zeros(1, 4, 8, 8),
        torch.tensor([500]),
        text,
        base.added_conditions(text, [(SIDE,) * 2], [(0, 0)], [(SIDE,) * 2]),
    )
    assert {p.device.type for p in base.vae.parameters()} == {"meta"}
