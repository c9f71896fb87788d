"""The denoising error: noise by place, the formula against diffusers' scheduler, masks and weights counted."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sfumato import data
from sfumato.models import diffusion, load_base
from sfumato.runs.processes import MicroBatch
from sfumato.training.loss import objective
from sfumato.training.loss.objective import (
    LossSettings,
    NoisedBatch,
    NoiseSettings,
    denoising_errors,
    draw_noise,
    draw_noised,
    per_sample_losses,
    predict,
)
from sfumato.training.loss.validation import Metrics
from sfumato.utils import randomness
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
        fits.append(Metrics(base, dataset, {}).fit())
    assert fits[0] == fits[1]


def test_no_more_is_measured_at_once_than_is_drawn_at_once(base, pictures, monkeypatch):
    dataset = data.prepare(data.read_folder(pictures, caption_template="{caption}"), base, resolution=64)
    found, rows, predict = [], [], type(base).predict
    monkeypatch.setattr(type(base), "predict", lambda self, x, *rest: rows.append(len(x)) or predict(self, x, *rest))
    size = dataset.batch(0, 0, 1).latents[0, 0].numel()
    for limit in (100 * size, 3 * size):
        monkeypatch.setattr("sfumato.training.loss.validation.LATENTS_AT_ONCE", limit)
        measures = Metrics(base, dataset, {"drift": ["a crab", "an owl"]})
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


def test_each_picture_is_measured_once_whatever_its_size(base, tmp_path):
    """Batches are of one size; of three sizes none is measured alone."""
    for place, size in enumerate([(64, 64), (128, 64), (64, 128), (64, 64), (128, 64)]):
        Image.new("RGB", size, (40 * place, 99, 50)).save(tmp_path / f"{place}.png")
    folder = data.read_folder(tmp_path, caption_template="a crab")
    dataset = data.prepare(folder, base, resolution=64)
    assert len(set(dataset.sizes)) == 3
    measures = Metrics(base, dataset, {"drift": ["a crab"]})
    assert sorted(place for batch, _, _ in measures._learned for place in batch.indices) == [*range(5)]
    first = measures.values()
    assert first == Metrics(base, dataset, {"drift": ["a crab"]}).values()
    assert first["drift"] == 0


def test_fit_and_drift_written_out(pocket_folder, pictures, tmp_path):
    """Fit: the mean square of v's error on whole pictures, whatever is masked, at timesteps from all of the base's.
    Drift: the change of what is predicted of them for the prompts in turns, over its size."""
    for file in pictures.glob("*.png"):
        with Image.open(file) as picture:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
            picture.save(tmp_path / file.name)
    base = load_base(str(pocket_folder), precision=CPU)
    folder = data.read_folder(tmp_path, caption_template="{caption}", mask="alpha")
    dataset = data.prepare(folder, base, resolution=64, embed_text=False)
    measures = Metrics(base, dataset, {"drift": ["a crab", "an owl"]})

    (batch,) = dataset.middles(6, 6 * 64 * 64)
    assert batch.mask is not None
    assert batch.mask.min() < 0.5
    noise = torch.stack([randomness.normal(tuple(batch.latents.shape[1:]), 0, "measure", 0, i) for i in range(6)])
    middles = torch.tensor([83, 250, 416, 583, 750, 916])  # of six equal parts of the base's 1000 timesteps
    timesteps = middles[randomness.permutation(6, 0, "measure")]
    noisy = base.scheduler.add_noise(batch.latents, noise, timesteps)

    def predicted(prompts):
        with torch.no_grad():
            return base.unet(noisy, timesteps, base.encode_text(prompts).hidden).sample

    wanted = base.scheduler.get_velocity(batch.latents, noise, timesteps)
    assert measures.fit() == pytest.approx((predicted(batch.captions) - wanted).square().mean().item(), rel=1e-4)
    turns = ["a crab", "an owl"] * 3
    before = predicted(turns)
    with torch.no_grad():
        base.unet.conv_out.weight.mul_(1.1)
    change = (predicted(turns) - before).norm() / before.norm()
    assert measures.drift() == pytest.approx(change.item(), rel=1e-4)
    assert change > 0.01


def test_pyramid_noise_has_more_of_large_shapes_and_depends_on_the_place_alone(batch):
    plain, pyramid = (draw_noise(batch, 3, 5, 0, pyramid=discount) for discount in (0.0, 0.8))
    assert_close(pyramid.flatten(1).std(1), torch.ones(4))
    means = [noise.mean((2, 3)).square().mean() for noise in (plain, pyramid)]
    assert means[1] > 10 * means[0]
    part = draw_noise(dataclasses.replace(batch, latents=batch.latents[2:]), 3, 5, 2, pyramid=0.8)
    assert torch.equal(pyramid[2:], part)
    assert not torch.equal(pyramid, draw_noise(batch, 3, 6, 0, pyramid=0.8))


def test_huber_errors_are_of_each_timesteps_own_scale(base, batch):
    noise, timesteps = draw_noise(batch, 0, 0, 0), torch.tensor([10, 300, 600, 900])
    with torch.no_grad():
        errors = denoising_errors(base, batch, noise, timesteps, batch.text, huber=0.1)
        prediction = predict(base, batch, noise, timesteps, batch.text)
    alpha_bar = base.alpha_bar[timesteps]
    wanted = diffusion.prediction_target(base.prediction_type, batch.latents, noise, alpha_bar)
    c = diffusion.huber_scale(alpha_bar, 0.1).view(-1, 1, 1, 1)
    per_pixel = 2 * c * (((prediction - wanted).square() + c.square()).sqrt() - c)
    assert_close(errors, per_pixel.mean((1, 2, 3)))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perturbed_input_is_seen_and_not_asked_for(pocket_folder, pictures, kind):
    base = load_base(str(pocket_folder), precision=CPU, prediction_type=kind)
    dataset = data.prepare(data.read_folder(pictures, caption_template="{caption}"), base, resolution=64)
    plain, perturbed = (
        draw_noised(base, dataset, 0, MicroBatch(3, 4, 0, 4), noising=NoiseSettings(range(1000), perturbation=strength))
        for strength in (0.0, 0.25)
    )
    assert torch.equal(plain.target, perturbed.target)
    assert torch.equal(plain.noise, perturbed.noise)
    assert perturbed.unasked.std().item() == pytest.approx(0.25, rel=0.1)
    seen = draw_noise(perturbed.batch, 0, 3, 0) + perturbed.unasked
    with torch.no_grad():
        found = per_sample_losses(base, [perturbed], encode=False)
        wanted = denoising_errors(
            base, perturbed.batch, seen, perturbed.timesteps, perturbed.batch.text, target=plain.target
        )
    assert_close(found, wanted)


def test_an_offset_is_one_number_a_channel_of_its_own_stream():
    batch = SimpleNamespace(latents=torch.zeros(2, 4, 8, 8))
    moved = draw_noise(batch, 0, 5, 2, offset=0.5) - draw_noise(batch, 0, 5, 2)
    wanted = [0.5 * randomness.normal((4, 1, 1), 0, "noise offset", 5, place) for place in (2, 3)]
    assert_close(moved, torch.stack(wanted).expand_as(moved))


def test_a_pyramid_s_levels_are_coarser_by_lot_down_to_one_pixel():
    levels = objective._coarser(torch.zeros(4, 32, 32), 0, 5, 2)
    draw, sides = randomness.generator(0, "pyramid noise", 5, 2), []
    for level in range(1, len(levels) + 1):
        ratio = 2 + 2 * float(torch.rand((), generator=draw))
        sides.append(max(1, int(32 / ratio**level)))
        torch.randn(1, 4, sides[-1], sides[-1], generator=draw)
    assert [level.shape[-1] for level in levels] == sides
    assert sides[-1] == 1 < sides[-2]


def test_debiased_errors_are_weighed_by_the_signal_to_noise_ratio(base, batch):
    noise, timesteps = draw_noise(batch, 0, 0, 0), torch.tensor([10, 300, 600, 900])
    alpha_bar = base.alpha_bar[timesteps]
    noised = NoisedBatch(
        batch, noise, timesteps, diffusion.prediction_target(base.prediction_type, batch.latents, noise, alpha_bar)
    )
    with torch.no_grad():
        plain = denoising_errors(base, batch, noise, timesteps, batch.text)
        found = per_sample_losses(base, [noised], encode=False, settings=LossSettings(5.0, debiased=True))
    assert_close(found, plain * diffusion.debiased_weight(base.prediction_type, alpha_bar))
