"""Samples that show the base's own drawing: what the base draws over, what is shown, and what is asked for."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sfumato import data, diffusion
from sfumato.bases import load_base
from sfumato.crossed import FROM, Crossing
from sfumato.errors import DataError
from sfumato.noising import draw_noised
from tests.tiny import CPU


@pytest.fixture(scope="module")
def base(pocket_folder):
    return load_base(str(pocket_folder), precision=CPU)


def prepared(base, pictures, **options):
    folder = data.read_folder(pictures, caption_template="sks square")
    return data.prepare(folder, base, resolution=64, buckets=False, **options)


@pytest.fixture(scope="module")
def dataset(base, pictures):
    return prepared(base, pictures, flip=True)


def both(base, dataset, crossing, step=3, batch=8):
    plain = draw_noised(base, dataset, 0, step, batch, 0, batch, embed_text=False)
    return plain, crossing.cross(plain, step, 0)


def noisy(base, noised):
    return diffusion.noise_latents(noised.batch.latents, noised.noise, base.alpha_bar[noised.timesteps])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_base_that_sees_one_thing_everywhere_draws_that(kind, base, dataset, monkeypatch):
    """Deterministic DDIM ends at the latents that are predicted, if they are the same at each step."""
    monkeypatch.setattr(type(base), "prediction_type", kind)
    seen = torch.linspace(-1, 1, dataset.batch(0, 0, 1, embed_text=False).latents[0].numel()).view(1, 4, 16, 16)

    def predict(noisy, timesteps, text, added):
        a = base.alpha_bar[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - a.sqrt() * seen) / (1 - a).sqrt()
        return diffusion.target(kind, seen.expand_as(noisy), noise, a.flatten())

    monkeypatch.setattr(base, "predict", predict)
    crossing = Crossing(base, dataset, 0, 1.0, shown=False)
    assert sorted(crossing._drawn) == [(index, variant) for index in range(len(dataset)) for variant in (0, 1)]
    for drawn in crossing._drawn.values():
        assert_close(drawn, seen[0], rtol=0, atol=1e-3)


def test_what_is_seen_lies_between_and_what_is_asked_for_is_the_picture(base, dataset):
    crossing = Crossing(base, dataset, 0, 1.0, shown=False)
    plain, crossed = both(base, dataset, crossing)
    a = base.alpha_bar[plain.timesteps]
    latents, seen = plain.batch.latents, noisy(base, crossed)
    assert_close(diffusion.denoised(base.prediction_type, seen, crossed.target, a)[0], latents, rtol=0, atol=1e-4)
    rows = [row for row, timestep in enumerate(plain.timesteps) if timestep >= FROM * len(base.alpha_bar)]
    assert 0 < len(rows) < len(latents)
    for row in range(len(latents)):
        if row not in rows:
            assert torch.equal(crossed.noise[row], plain.noise[row])
            continue
        drawn = crossing._drawn[plain.batch.indices[row], plain.batch.variants[row]]
        moved = (seen[row] - noisy(base, plain)[row]) / a[row].sqrt()
        part = (moved * (drawn - latents[row])).sum() / (drawn - latents[row]).square().sum()
        assert 0 < part < 1
        assert_close(moved, part * (drawn - latents[row]), rtol=0, atol=1e-3)


def test_the_share_is_that_of_the_samples(base, dataset):
    shares = {}
    for share in (0.0, 0.5):
        crossing = Crossing(base, dataset, 0, share, shown=False)
        changed = total = 0
        for step in range(12):
            plain, crossed = both(base, dataset, crossing, step)
            could = plain.timesteps >= FROM * len(base.alpha_bar)
            changed += int((crossed.noise != plain.noise).flatten(1).any(1).sum())
            total += int(could.sum())
        shares[share] = changed / total
    assert shares[0.0] == 0
    assert 0.3 < shares[0.5] < 0.7


def test_a_place_of_the_global_batch_is_crossed_alike_whoever_draws_it(base, dataset):
    crossing = Crossing(base, dataset, 0, 0.5, shown=False)
    _, whole = both(base, dataset, crossing)
    part = draw_noised(base, dataset, 0, 3, 8, 4, 4, embed_text=False)
    assert torch.equal(crossing.cross(part, 3, 4).noise, whole.noise[4:])


def test_crops_at_random_places_are_refused(base, tmp_path):
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    with pytest.raises(DataError, match="use --crop center or pad"):
        Crossing(base, prepared(base, tmp_path, crop="random"), 0, 0.5, shown=False)
