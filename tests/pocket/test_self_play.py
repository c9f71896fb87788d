"""A base that learns to tell pictures from what it draws itself."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close

from sfumato import load_base
from sfumato.errors import BaseModelError, ConfigError
from sfumato.precision import decide
from sfumato.training.pretrain.model import build_scheduler
from sfumato.training.pretrain.outputs import assemble
from sfumato.training.pretrain.self_play import (
    DRAWN_AT_ONCE,
    Pairs,
    discriminative_loss,
    error_increase,
    own_drawings,
    select_pictures,
)
from sfumato.training.pretrain.text import encode_text
from sfumato.utils import randomness, schedulers
from tests.tiny import CPU
from trainers.pretrain import SelfPlayConfig as Config
from trainers.pretrain import train

SETTINGS = {"batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32", "fall_at": 1, "warmup": 0}


def test_the_loss_is_that_of_a_discriminator_whose_logit_is_how_much_likelier_a_picture_has_become():
    real, own = torch.tensor([0.2, -0.1, 0.0]), torch.tensor([-0.3, 0.4, 0.1])
    logits = -7.0 * torch.cat([real, own])
    is_real = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert_close(discriminative_loss(real, own, 7.0), 2 * binary_cross_entropy_with_logits(logits, is_real))


def test_all_named_pictures_take_part_and_others_by_their_share():
    chosen = select_pictures(100, 30, 0.25, seed=3)
    assert chosen[:30] == list(range(30))
    assert len(chosen) == 40
    assert chosen == sorted(set(chosen))
    assert chosen[-1] < 100
    assert chosen != select_pictures(100, 30, 0.25, seed=4)
    assert select_pictures(100, 30, 0.0, seed=3) == list(range(30))
    assert select_pictures(100, 30, 1.0, seed=3) == select_pictures(100, 30, 0.9, seed=3) == list(range(100))


def test_a_picture_and_its_drawing_are_told_the_same_and_sometimes_nothing():
    numbers = torch.arange(5.0)
    real, own, states = numbers.view(5, 1, 1, 1), -numbers.view(5, 1, 1, 1), numbers.view(5, 1, 1)
    pairs = Pairs(real, own, states, torch.full((1, 1, 1), 9.0))
    latents, said = pairs.at(0, 5, 7, 0.0)
    assert sorted(latents[:5].flatten().tolist()) == numbers.tolist()  # each once before any comes again
    assert torch.equal(latents[5:], -latents[:5])
    assert torch.equal(said[:5].flatten(), latents[:5].flatten())
    assert torch.equal(said[5:], said[:5])
    assert (pairs.at(0, 5, 7, 1.0)[1] == 9.0).all()
    some = (pairs.at(3, 200, 7, 0.3)[1] == 9.0).float().mean()
    assert 0.2 < some < 0.4


class Constant(torch.nn.Module):
    """A U-Net that predicts one number, in one size, and counts its calls."""

    def __init__(self, number=0.0, side=4):
        super().__init__()
        self.number, self.calls, self.config = number, 0, SimpleNamespace(sample_size=side, in_channels=2)

    def forward(self, latents, timesteps, hidden):
        self.calls += 1
        return SimpleNamespace(sample=torch.full_like(latents, self.number))


def test_errors_are_those_of_v_of_a_picture_and_its_drawing_with_one_noise_and_one_timestep():
    draws = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(n, 2, 4, 4, generator=draws) for n in (6, 3))
    timesteps, scheduler = torch.tensor([10, 500, 990]), build_scheduler()
    arguments = latents, torch.zeros(6, 1, 1), timesteps, noise, scheduler, decide("fp32", device="cpu")
    real, own = error_increase(Constant(0.5), Constant(-1.0), *arguments)
    alpha = scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - scheduler.alphas_cumprod[timesteps]).sqrt()[:, None, None, None]
    for found, part in ((real, latents[:3]), (own, latents[3:])):
        v = alpha * noise - sigma * part
        assert_close(found, ((0.5 - v) ** 2 - (-1.0 - v) ** 2).mean((1, 2, 3)))


DRAWN = {"said": 1.0, "guidance": 2.0, "seed": 5, "unet_fingerprint": "of pocket", "side": 4, "precision": "fp32"}


def draw(kept, unet=None, count=3, **changed):
    facts = DRAWN | changed
    unet = unet or Constant(side=facts["side"])
    states = torch.full((count, 1, 1), facts["said"])
    parts = unet, states, states[:1], build_scheduler(), decide(facts["precision"], device="cpu")
    named = {name: facts[name] for name in ("guidance", "seed", "unet_fingerprint")}
    return own_drawings(*parts, kept=kept, **named), unet.calls


@pytest.mark.parametrize(
    "changed",
    [
        {"said": 2.0},
        {"guidance": 1.0},
        {"seed": 6},
        {"unet_fingerprint": "of another"},
        {"side": 8},
        {"count": 4},
        {"precision": "bf16"},
    ],
)
def test_own_drawings_are_kept_and_drawn_anew_where_they_would_be_others(changed, tmp_path):
    kept = tmp_path / "own.safetensors"
    found, calls = draw(kept)
    assert calls == 25
    again, calls = draw(kept)
    assert torch.equal(again, found)
    assert calls == 0
    assert draw(kept, **changed)[1] == 25


def test_drawings_go_on_where_they_were_stopped_and_after_a_damage(tmp_path):
    whole, _ = draw(tmp_path / "whole.safetensors", count=5 * DRAWN_AT_ONCE + 1)
    kept = tmp_path / "own.safetensors"
    stopped = Constant()

    def stop_in_the_sixth_batch(*_):
        if stopped.calls > 5 * 25:
            raise KeyboardInterrupt

    stopped.register_forward_pre_hook(stop_in_the_sixth_batch)
    with pytest.raises(KeyboardInterrupt):
        draw(kept, stopped, count=len(whole))
    again, calls = draw(kept, count=len(whole))
    assert torch.equal(again, whole)
    assert calls == 2 * 25  # four of the six batches were kept
    kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(draw(kept, count=len(whole))[0], whole)


def test_a_unet_that_draws_no_numbers_is_named(tmp_path):
    with pytest.raises(BaseModelError, match=r"the U-Net of --base draws NaN or infinity.*--guidance"):
        draw(tmp_path / "own.safetensors", Constant(float("nan")))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_own_drawings_are_what_diffusers_draws_of_the_same_noise(guidance, tmp_path):
    base = load_base("pocket", precision=CPU)
    prompts = ["crab, noto style", "house, flat style"]
    said = encode_text(base.text_encoders[0], base.tokenizers[0], [*prompts, ""], torch.device("cpu")).detach()
    parts = said[:-1], said[-1:], build_scheduler(), decide("fp32", device="cpu")
    more = {"guidance": guidance, "seed": 5, "kept": tmp_path / "own.safetensors", "unet_fingerprint": "of pocket"}
    found = own_drawings(base.unet, *parts, **more)
    noise = torch.stack([randomness.normal((4, 16, 16), 5, "own drawing", place) for place in range(2)])
    ddim = schedulers.make_scheduler("ddim", build_scheduler().config)
    pipeline = assemble(base.vae, base.unet, base.text_encoders[0], base.tokenizers[0], ddim)
    asked = {"num_inference_steps": 25, "guidance_scale": guidance, "latents": noise, "output_type": "latent"}
    assert_close(found, pipeline(prompts, **asked).images, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_unet_begins_undecided_learns_alone_and_goes_on_where_it_stopped(data, pocket_folder, tmp_path):
    def losses(name, steps, **more):
        options = {"base": str(pocket_folder), "data": data, "steps": steps}
        model = train(
            Config(**options, output=tmp_path / name, checkpoint_every=1, empty_share=0.5, **SETTINGS, **more)
        )
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return model, [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    model, whole = losses("whole", 2)
    assert whole[0] == pytest.approx(2 * math.log(2), abs=1e-4)
    assert whole[1] != whole[0]
    losses("halves", 1, learning_rate=3e-5)
    _, halves = losses("halves", 2, learning_rate=3e-5, resume=True, force=True)
    assert halves == whole
    before, after = load_base(str(pocket_folder), precision=CPU), load_base(str(model), precision=CPU)
    for part in ("text_encoders", "vae"):
        one, other = (getattr(each, part) for each in (before, after))
        one, other = (each[0] if isinstance(each, list | tuple) else each for each in (one, other))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    pairs = list(zip(before.unet.parameters(), after.unet.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in pairs)
    assert StableDiffusionPipeline.from_pretrained(model).unet.config.sample_size == 16


@pytest.mark.slow
def test_pictures_become_likelier_than_drawings_and_these_are_of_the_captions_and_the_guidance(
    data, pocket_folder, tmp_path, monkeypatch
):
    asked, errors, sheets = [], [], []

    def drawn(unet, states, *_, guidance, seed, **__):
        asked.append((states, guidance))
        return randomness.normal((len(states), 4, 16, 16), seed, "a drawing like none")

    def loss(real, own, sharpness):
        errors.append((real.mean().item(), own.mean().item()))
        return discriminative_loss(real, own, sharpness)

    monkeypatch.setattr("sfumato.training.pretrain.self_play.own_drawings", drawn)
    monkeypatch.setattr("sfumato.training.pretrain.self_play.discriminative_loss", loss)
    monkeypatch.setattr("sfumato.training.pretrain.outputs.sheet", lambda *asked: sheets.append(asked[-1]))
    (data / "other/noto").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(data / "other/noto/red-heart.png")
    options = {"base": str(pocket_folder), "data": data, "steps": 8, "empty_share": 0.0}
    more = {"guidance": 1.5, "others_share": 0.2, "learning_rate": 3e-4, "sharpness": 10.0}
    train(Config(**options, output=tmp_path / "run", **more, **(SETTINGS | {"fall_at": 8, "sample_every": 8})))
    base = load_base(str(pocket_folder), precision=CPU)
    captions = [f"{what}, {style} style" for style in ("noto", "flat") for what in ("red apple", "crab", "key")]
    captions = [*captions[:-1], "red heart, noto style"]  # a cell is withheld
    with torch.no_grad():
        said = encode_text(base.text_encoders[0], base.tokenizers[0], captions, torch.device("cpu"))
    ((states, guidance),) = asked
    assert_close(states, said)
    assert guidance == 1.5
    assert set(sheets) == {1.5}
    assert errors[0] == (0.0, 0.0)
    assert errors[-1][0] < -0.01 < 0.01 < errors[-1][1]


def test_a_share_of_others_that_comes_to_none_is_refused(data, tmp_path):
    (data / "other/noto").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(data / "other/noto/red-heart.png")
    options = {"base": "pocket", "data": data, "output": tmp_path / "run", "steps": 1}
    with pytest.raises(ConfigError, match=r"--others-share 0.05 beside 5 images is no other drawing; raise it to 0.17"):
        train(Config(**options, others_share=0.05, **SETTINGS))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_interruption_among_the_drawings_lets_the_folder_go(data, pocket_folder, tmp_path, monkeypatch, capfd):
    options = {"base": str(pocket_folder), "data": data, "output": tmp_path / "run", "steps": 1}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sfumato.training.pretrain.self_play.own_drawings", interrupted)
        with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
            train(Config(**options, **SETTINGS))
    assert f"stopped among the own drawings. Go on with: sfumato resume {tmp_path / 'run'}" in capfd.readouterr().err
    train(Config(**options, **SETTINGS, resume=True))
    assert caught  # as a notebook does, which keeps the traceback, and with it the run
    assert (tmp_path / "run/model").is_dir()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sharpness": 0.0}, "--sharpness is 0.0; it must be a positive"),
        ({"guidance": -1.0}, "--guidance is -1.0; it must be 0 to 100"),
        ({"empty_share": 1.5}, "--empty-share is 1.5; it must be 0 to 1"),
        ({"warmup": 9, "steps": 3}, "--warmup 9: the run has 3 steps"),
    ],
)
def test_what_makes_no_sense_is_refused(given, said, data, tmp_path):
    with pytest.raises(ConfigError, match=said):
        train(Config(data=data, output=tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()
