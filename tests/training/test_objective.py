"""The denoising error: noise by place, the formula against diffusers' scheduler, masks and weights counted."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from sfumato import data
from sfumato.bases import load_base
from sfumato.training.measure import Measures
from sfumato.training.objective import denoising_errors, draw_noise
from tests.tiny import CPU


@pytest.fixture(scope="module")
def base(pocket_folder):
    return load_base(str(pocket_folder), precision=CPU)


@pytest.fixture(scope="module")
def batch(base, pictures):
    dataset = data.prepare(data.read_folder(pictures, caption_template="{caption}"), base, resolution=64)
    return dataset.batch(0, 0, 4)


def test_noise_depends_on_the_place_in_the_global_batch_alone(batch):
    whole = draw_noise(batch, 3, 5, 0)
    part = draw_noise(dataclasses.replace(batch, latents=batch.latents[2:]), 3, 5, 2)
    assert torch.equal(whole[2:], part)
    assert not torch.equal(whole, draw_noise(batch, 3, 6, 0))


def test_an_offset_moves_whole_channels(batch):
    """x + 0.5 c with c one number a channel: the difference is constant over a channel's pixels."""
    moved = draw_noise(batch, 0, 0, 0, offset=0.5) - draw_noise(batch, 0, 0, 0)
    assert_close(moved, moved[..., :1, :1].expand_as(moved), atol=1e-6, rtol=0)
    other = draw_noise(batch, 0, 1, 0, offset=0.5) - draw_noise(batch, 0, 1, 0)
    constants = torch.stack([*moved[..., 0, 0], *other[..., 0, 0]])
    assert constants.abs().max() > 0.1
    assert len({tuple(row) for row in constants.mul(100).round().tolist()}) == 8  # four pictures at two steps


def test_the_error_is_the_mean_square_against_diffusers_noise_and_target(base, batch):
    noise, timesteps = draw_noise(batch, 0, 0, 0), torch.tensor([10, 300, 600, 900])
    with torch.no_grad():
        ours = denoising_errors(base, batch, noise, timesteps, batch.text)
        noisy = base.scheduler.add_noise(batch.latents, noise, timesteps)
        prediction = base.unet(noisy, timesteps, batch.text.hidden).sample
    wanted = noise
    if base.prediction_type == "v_prediction":
        wanted = base.scheduler.get_velocity(batch.latents, noise, timesteps)
    assert_close(ours, (prediction - wanted).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_a_target_of_ones_own_replaces_the_noise(base, batch):
    noise, timesteps = draw_noise(batch, 0, 0, 0), torch.tensor([10, 300, 600, 900])
    with torch.no_grad():
        noisy = base.scheduler.add_noise(batch.latents, noise, timesteps)
        own = base.unet(noisy, timesteps, batch.text.hidden).sample
        errors = denoising_errors(base, batch, noise, timesteps, batch.text, target=own)
    assert_close(errors, torch.zeros(4), atol=1e-9, rtol=0)


def test_the_fit_knows_no_weights(base, tmp_path, pictures):
    fits = []
    for weight in (1.0, 0.25):
        config = tmp_path / f"{weight}.toml"
        config.write_text(f'[[source]]\npath = "{pictures.as_posix()}"\ncaption = "{{caption}}"\nweight = {weight}\n')
        dataset = data.prepare(data.read_folder(config), base, resolution=64, embed_text=False)
        fits.append(Measures(base, dataset, {}).fit())
    assert fits[0] == fits[1]


def test_no_more_is_measured_at_once_than_is_drawn_at_once(base, pictures, monkeypatch):
    dataset = data.prepare(data.read_folder(pictures, caption_template="{caption}"), base, resolution=64)
    found, rows, predict = [], [], type(base).predict
    monkeypatch.setattr(type(base), "predict", lambda self, x, *rest: rows.append(len(x)) or predict(self, x, *rest))
    size = dataset.batch(0, 0, 1).latents[0, 0].numel()
    for limit in (100 * size, 3 * size):
        monkeypatch.setattr("sfumato.drawing.pictures.LATENTS_AT_ONCE", limit)
        measures = Measures(base, dataset, {"drift": ["a crab", "an owl"]})
        with torch.no_grad():
            measures._before["drift"] *= 0.5
        found.append(measures.values())
    assert_close(found[0], found[1], rtol=1e-5, atol=0)
    assert found[0]["drift"] == pytest.approx(1, rel=1e-5)
    assert rows == [len(dataset)] * 3 + [3, len(dataset) - 3] * 3


def test_a_pictures_weight_multiplies_its_error(base, batch):
    noise, timesteps = draw_noise(batch, 0, 0, 0), torch.tensor([10, 300, 600, 900])
    weighted = dataclasses.replace(batch, weights=torch.tensor([1.0, 2.0, 0.0, 0.5]))
    with torch.no_grad():
        plain = denoising_errors(base, batch, noise, timesteps, batch.text)
        errors = denoising_errors(base, weighted, noise, timesteps, batch.text)
    assert_close(errors, plain * weighted.weights)
