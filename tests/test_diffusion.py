"""Laws and worked values of the forward process."""

import pytest
import torch
from torch.testing import assert_close

from sfumato.models import diffusion


def test_no_noise_at_alpha_bar_one_and_only_noise_at_zero():
    latents, noise = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), -2.0)
    noisy = diffusion.add_noise(latents, noise, torch.tensor([1.0, 0.0]))
    assert noisy.flatten().tolist() == [3.0, -2.0]


def test_noisy_latents_at_one_quarter():
    noisy = diffusion.add_noise(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 4.0), torch.tensor([0.25]))
    assert_close(noisy.item(), 0.5 * 2 + 0.75**0.5 * 4)


def test_epsilon_is_the_noise():
    noise = torch.randn(2, 4, 3, 3)
    assert diffusion.prediction_target("epsilon", torch.randn(2, 4, 3, 3), noise, torch.tensor([0.3, 0.9])) is noise


def test_latents_come_back_from_v():
    """z = sqrt(a) z_t - sqrt(1 - a) v."""
    latents, noise, a = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.1, 0.5, 0.99])
    v = diffusion.prediction_target("v_prediction", latents, noise, a)
    noisy = diffusion.add_noise(latents, noise, a)
    a = a.view(-1, 1, 1, 1)
    assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, latents)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_latents_and_noise_come_back_from_what_is_predicted(kind):
    latents, noise, a = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.1, 0.5, 0.99])
    found = diffusion.split_prediction(
        kind, diffusion.add_noise(latents, noise, a), diffusion.prediction_target(kind, latents, noise, a), a
    )
    assert_close(found, (latents, noise))


def test_min_snr_weights():
    """SNR 1 is below gamma, SNR 19 above it: min(SNR, 5) / SNR for epsilon, min(SNR, 5) / (SNR + 1) for v."""
    a = torch.tensor([0.5, 0.95])
    assert_close(diffusion.snr_weight("epsilon", a, 5.0), torch.tensor([1.0, 5 / 19]))
    assert_close(diffusion.snr_weight("v_prediction", a, 5.0), torch.tensor([0.5, 0.25]))


def test_min_snr_has_its_limits_where_there_is_only_noise_or_none():
    """SNR 0: SNR / SNR is 1 for epsilon, SNR / (SNR + 1) is 0 for v. SNR without end: 5 / SNR is 0 for both."""
    a = torch.tensor([0.0, 1.0])
    assert_close(diffusion.snr_weight("epsilon", a, 5.0), torch.tensor([1.0, 0.0]))
    assert_close(diffusion.snr_weight("v_prediction", a, 5.0), torch.tensor([0.0, 0.0]))


def test_debiased_weights_are_the_same_error_of_latents_for_both_predictions():
    """SNR 4: 1 / 2 of four times the latents' error, and 2 / 5 of five times it."""
    a = torch.tensor([0.8, 0.5, 0.2])
    snr = a / (1 - a)
    epsilon, v = (diffusion.debiased_weight(kind, a) for kind in ("epsilon", "v_prediction"))
    assert_close(epsilon, torch.tensor([0.5, 1.0, 2.0]))
    assert_close(epsilon * snr, v * (snr + 1))


def test_debiased_weights_end_where_there_is_only_noise_or_none():
    found = diffusion.debiased_weight("epsilon", torch.tensor([0.0, 1.0]))
    assert_close(found, torch.tensor([1000.0, 0.001]).sqrt())


def test_each_slice_of_the_schedule_is_drawn_once():
    drawn = diffusion.stratified_timesteps(10, range(1000), seed=3, step=7)
    assert sorted(t // 100 for t in drawn.tolist()) == list(range(10))


def test_some_timesteps_alone_are_drawn_as_evenly():
    drawn = diffusion.stratified_timesteps(10, range(300, 500), seed=3, step=7)
    assert sorted((t - 300) // 20 for t in drawn.tolist()) == list(range(10))


def test_timesteps_are_a_function_of_seed_and_step():
    draws = {tuple(diffusion.stratified_timesteps(8, range(1000), s, t).tolist()) for s in (0, 1) for t in (0, 1)}
    again = tuple(diffusion.stratified_timesteps(8, range(1000), 1, 1).tolist())
    assert len(draws) == 4
    assert again in draws


def test_timesteps_are_uniform_over_many_steps():
    drawn = torch.stack([diffusion.stratified_timesteps(4, range(1000), 0, step) for step in range(500)])
    assert abs(drawn.float().mean().item() - 499.5) < 5
    assert (drawn.min(), drawn.max()) == (0, 999)
    # Each place of the batch meets all of the schedule: a place of one slice would teach some pictures one noise.
    assert (drawn.float().mean(0) - 499.5).abs().max() < 50
    within = drawn % 250
    assert len(within.unique()) == 250
    assert (within[:, 1:] == within[:, :1]).float().mean() < 0.05


def test_a_mask_takes_the_mean_over_what_it_shows():
    wrong, right = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    wrong[..., 0, 0] = 3.0
    mask = torch.zeros(1, 1, 2, 2)
    mask[..., 0, 0] = 1.0
    one = torch.ones(1)
    assert_close(diffusion.weighted_loss(wrong, right, one, mask), torch.tensor([9.0]))
    assert_close(diffusion.weighted_loss(wrong, right, one), torch.tensor([9 / 4]))
    assert_close(diffusion.weighted_loss(wrong, right, one, 1 - mask), torch.tensor([0.0]))
    assert_close(diffusion.weighted_loss(wrong, right, 0.5 * one, mask), torch.tensor([4.5]))


def test_a_mask_that_shows_nothing_teaches_nothing():
    """A crop at a random place may miss all that the mask of its picture shows."""
    errors = diffusion.weighted_loss(
        torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), torch.ones(1), torch.zeros(1, 1, 2, 2)
    )
    assert errors.item() == 0


def test_errors_of_half_precision_are_squared_in_fp32():
    """300^2 is more than fp16 holds."""
    far = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)
    assert diffusion.weighted_loss(far, torch.zeros_like(far), torch.ones(1)).item() == 90_000


# Noise pyramids and the Huber loss, as sd-scripts has them


def test_a_noise_pyramid_is_that_of_sd_scripts_with_both_full_sizes_as_one():
    """Its level 0 adds as much noise again in full size: two normals are sqrt(2) of one."""
    full, other = torch.randn(2, 1, 4, 16, 16).unbind()
    coarser = [torch.randn(1, 4, side, side) for side in (6, 2, 1)]
    theirs = full + other
    for level, small in enumerate(coarser, 1):
        theirs = theirs + torch.nn.Upsample(size=(16, 16), mode="bilinear")(small) * 0.3**level
    ours = diffusion.pyramid_noise((full + other) / 2**0.5, coarser, 0.3)
    assert_close(ours, theirs / theirs.std())


def test_each_picture_of_a_noise_pyramid_has_unit_deviation():
    noise = diffusion.pyramid_noise(torch.randn(3, 4, 8, 8), [torch.randn(3, 4, 2, 2), torch.randn(3, 4, 1, 1)], 0.9)
    assert_close(noise.flatten(1).std(1), torch.ones(3))


def test_the_huber_scale_is_sd_scripts_snr_schedule():
    alpha_bar = torch.tensor([0.9991, 0.5, 0.0047, 0.0])
    sigmas = ((1.0 - alpha_bar[:3]) / alpha_bar[:3]) ** 0.5
    found = diffusion.huber_scale(alpha_bar, 0.1)
    assert_close(found[:3], (1 - 0.1) / (1 + sigmas) ** 2 + 0.1)
    assert_close(found[3], torch.tensor(0.1))  # pure noise, where theirs divides by zero


def test_huber_errors_are_squares_when_small_and_lines_when_large():
    error = torch.tensor([0.001, 100.0]).view(2, 1, 1, 1)
    found = diffusion.weighted_loss(error, torch.zeros_like(error), torch.ones(2), huber=torch.tensor([0.5, 0.5]))
    assert_close(found, torch.tensor([1e-6, 2 * 0.5 * (100 - 0.5)]), rtol=2e-3, atol=1e-7)


def test_crossing_noise_makes_of_one_picture_what_noise_makes_of_the_other():
    asked, seen, noise = torch.randn(3, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    alpha_bar = torch.tensor([0.1, 0.5, 0.9])
    crossing = diffusion.crossing_noise(asked, seen, noise, alpha_bar)
    assert_close(diffusion.add_noise(asked, crossing, alpha_bar), diffusion.add_noise(seen, noise, alpha_bar))
