"""Samples that show the base's own drawing: what the base draws over, what is shown, and what is asked for."""

import copy

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sfumato import data
from sfumato.errors import DataError
from sfumato.models import diffusion, load_base
from sfumato.runs.processes import MicroBatch
from sfumato.training.loss.crossed_samples import DDIM_STEPS, FIRST_SHARE, START_SHARES, Crossing, CrossingPlan
from sfumato.training.loss.objective import draw_noised
from sfumato.utils import randomness
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


@pytest.fixture(scope="module")
def crossing(base, dataset):
    """Of all samples, by seed 7. What the base draws is what takes the time, so it draws for this one alone."""
    return Crossing(base, dataset, 7, 1.0, shown=False)


def another(crossing, share, seed=7):
    """The same drawings under another share, or seed."""
    other = copy.copy(crossing)
    other._share, other._seed = share, seed
    return other


def both(base, dataset, crossing, step=3, batch=8):
    micro = MicroBatch(step, batch, 0, batch)
    plain = draw_noised(base, dataset, 0, micro, embed_text=False)
    return plain, crossing.cross(plain, micro)


def noisy(base, half):
    return diffusion.add_noise(half.batch.latents, half.noise, base.alpha_bar[half.timesteps])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_base_that_sees_one_thing_everywhere_draws_that(kind, base, dataset, monkeypatch):
    """Deterministic DDIM ends at the latents that are predicted, if they are the same at each step."""
    monkeypatch.setattr(type(base), "prediction_type", kind)
    seen = torch.linspace(-1, 1, dataset.batch(0, 0, 1, embed_text=False).latents[0].numel()).view(1, 4, 16, 16)

    def predict(noisy, timesteps, text, added):
        a = base.alpha_bar[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - a.sqrt() * seen) / (1 - a).sqrt()
        return diffusion.prediction_target(kind, seen.expand_as(noisy), noise, a.flatten())

    monkeypatch.setattr(base, "predict", predict)
    unconditional, rows = base.unconditional, []
    monkeypatch.setattr(base, "unconditional", lambda count: rows.append(count) or unconditional(count))
    crossing = Crossing(base, dataset, 0, 1.0, shown=False)
    assert sorted(crossing._drawn) == [(index, variant) for index in range(len(dataset)) for variant in (0, 1)]
    for drawn in crossing._drawn.values():
        assert_close(drawn, seen[0], rtol=0, atol=1e-3)
    assert rows == [1]  # once, and not beside each picture


def test_the_base_draws_each_view_over_by_ddim_under_guidance(base, dataset, crossing):
    """Eq. 12 of Song et al. 2021 written out, each view from its own share of the timesteps."""
    batch, rows = next(dataset.views(100 * 64**2)), [0, 1, 3]
    views = [(batch.indices[row], batch.variants[row]) for row in rows]
    assert views == [(0, 0), (0, 1), (1, 1)]
    told, untold = base.encode_text([batch.captions[row] for row in rows]), base.encode_text([""] * 3)
    z = batch.latents[rows]
    noise = torch.stack([randomness.normal(z.shape[1:], 7, "drawing over", *view) for view in views])
    for step in range(DDIM_STEPS):
        t = torch.tensor([int(1000 * share * (1 - step / DDIM_STEPS)) for share in START_SHARES])
        a = base.alpha_bar[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        with torch.no_grad():
            to, fro = (base.unet(noisy, t, text.hidden).sample for text in (told, untold))
        v = fro + base.defaults.guidance * (to - fro)
        z, noise = a.sqrt() * noisy - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * noisy
    assert_close(torch.stack([crossing._drawn[view] for view in views]), z, rtol=1e-3, atol=1e-3)


def test_what_is_seen_lies_between_and_what_is_asked_for_is_the_picture(base, dataset, crossing):
    plain, crossed = both(base, dataset, crossing)
    a = base.alpha_bar[plain.timesteps]
    latents, seen = plain.batch.latents, noisy(base, crossed)
    assert_close(
        diffusion.split_prediction(base.prediction_type, seen, crossed.target, a)[0], latents, rtol=0, atol=1e-4
    )
    rows = [row for row, timestep in enumerate(plain.timesteps) if timestep >= FIRST_SHARE * len(base.alpha_bar)]
    assert 0 < len(rows) < len(latents)
    parts = set()
    for row in range(len(latents)):
        if row not in rows:
            assert torch.equal(crossed.noise[row], plain.noise[row])
            continue
        drawn = crossing._drawn[plain.batch.indices[row], plain.batch.variants[row]]
        moved = (seen[row] - noisy(base, plain)[row]) / a[row].sqrt()
        part = (moved * (drawn - latents[row])).sum() / (drawn - latents[row]).square().sum()
        assert 0 < part < 1
        parts.add(round(part.item(), 4))
        assert_close(moved, part * (drawn - latents[row]), rtol=0, atol=1e-3)
    assert len(parts) == len(rows)


def test_the_share_is_that_of_the_samples_and_the_seed_says_of_which(base, dataset, crossing):
    found = {}
    for share, seed in ((0.0, 7), (0.5, 7), (0.5, 8)):
        changed, could = [], []
        for step in range(12):
            plain, crossed = both(base, dataset, another(crossing, share, seed), step)
            could += (plain.timesteps >= FIRST_SHARE * len(base.alpha_bar)).tolist()
            changed += (crossed.noise != plain.noise).flatten(1).any(1).tolist()
        found[share, seed] = changed
        assert sum(changed) == pytest.approx(share * sum(could), abs=0.2 * sum(could) if share else 0)
    assert found[0.5, 7] != found[0.5, 8]


@pytest.mark.parametrize("steps", [3, 6])
def test_what_a_run_does_not_cross_is_not_drawn_and_all_that_it_does(steps, base, dataset, crossing, monkeypatch):
    """By seed 7 all that is crossed is a function of the step and the place."""
    monkeypatch.setattr(Crossing, "_draw", lambda _, batch, text: batch.latents)
    course = CrossingPlan(steps, 4, range(len(base.alpha_bar)))
    few, crossed, seen = Crossing(base, dataset, 7, 0.5, course, shown=False), set(), set()
    for step in range(steps):
        micro = MicroBatch(step, 4, 0, 4)
        plain = draw_noised(base, dataset, 7, micro, embed_text=False)
        views = list(zip(plain.batch.indices, plain.batch.variants, strict=True))
        changed = (another(crossing, 0.5).cross(plain, micro).noise != plain.noise).flatten(1).any(1)
        crossed |= {view for view, is_changed in zip(views, changed.tolist(), strict=True) if is_changed}
        seen |= set(views)
        few.cross(plain, micro)
    assert few._drawn.keys() == crossed
    assert 0 < len(crossed) < len(seen)
    assert Crossing(base, dataset, 7, 1.0, CrossingPlan(500, 4, course.timesteps), shown=False)._drawn.keys() == set(
        crossing._drawn
    )


def test_a_place_of_the_global_batch_is_crossed_alike_whoever_draws_it(base, dataset, crossing):
    half_of_them = another(crossing, 0.5)
    _, whole = both(base, dataset, half_of_them)
    micro = MicroBatch(3, 8, 4, 4)
    part = draw_noised(base, dataset, 0, micro, embed_text=False)
    assert torch.equal(half_of_them.cross(part, micro).noise, whole.noise[4:])


def test_crops_at_random_places_are_refused(base, tmp_path):
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    with pytest.raises(DataError, match="use --crop center or pad"):
        Crossing(base, prepared(base, tmp_path, crop="random"), 0, 0.5, shown=False)
