"""A base that learns to tell pictures from what it draws itself."""

import json
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close

from sfumato import load_base, randomness
from sfumato.pocket.outputs import assemble
from sfumato.pocket.parts import build_scheduler
from sfumato.pocket.self_play import Pairs, discriminative_loss, own_drawings, taking_part
from sfumato.precision import decide
from tests.tiny import CPU
from trainers.pretrain import Config, encode_text, train

SETTINGS = {"batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32", "fall_at": 1, "warmup": 0}


def test_the_loss_is_that_of_a_discriminator_whose_logit_is_how_much_likelier_a_picture_has_become():
    real, own = torch.tensor([0.2, -0.1, 0.0]), torch.tensor([-0.3, 0.4, 0.1])
    logits = -7.0 * torch.cat([real, own])
    is_real = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert_close(discriminative_loss(real, own, 7.0), 2 * binary_cross_entropy_with_logits(logits, is_real))


def test_all_named_pictures_take_part_and_others_by_their_share():
    chosen = taking_part(100, 30, 0.25, seed=3)
    assert chosen[:30] == list(range(30))
    assert len(chosen) == 40
    assert chosen == sorted(set(chosen))
    assert chosen[-1] < 100
    assert chosen != taking_part(100, 30, 0.25, seed=4)
    assert taking_part(100, 30, 0.0, seed=3) == list(range(30))
    assert taking_part(100, 30, 1.0, seed=3) == taking_part(100, 30, 0.9, seed=3) == list(range(100))


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


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_own_drawings_are_what_diffusers_draws_of_the_same_noise(guidance, tmp_path):
    base = load_base("pocket", precision=CPU)
    prompts = ["crab, noto style", "house, flat style"]
    said = encode_text(base.text_encoders[0], base.tokenizers[0], [*prompts, ""], torch.device("cpu")).detach()
    kept = tmp_path / "own.safetensors"

    def drawn(seed=5):
        parts = said[:-1], said[-1:], build_scheduler(), decide("fp32", device="cpu")
        more = {"guidance": guidance, "seed": seed, "kept": kept, "unet_fingerprint": "of pocket"}
        return own_drawings(base.unet, *parts, **more)

    found = drawn()
    noise = torch.stack([randomness.normal((4, 16, 16), 5, "own drawing", place) for place in range(2)])
    pipeline = assemble(base.vae, base.unet, base.text_encoders[0], base.tokenizers[0], build_scheduler())
    asked = {"num_inference_steps": 25, "guidance_scale": guidance, "latents": noise, "output_type": "latent"}
    assert_close(found, pipeline(prompts, **asked).images, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        base.unet.conv_out.bias.add_(1)
    assert torch.equal(drawn(), found)  # a run that goes on has them from its folder
    assert not torch.equal(drawn(seed=6), found)


@pytest.mark.slow
def test_a_unet_begins_undecided_learns_alone_and_goes_on_where_it_stopped(data, pocket_folder, tmp_path):
    def losses(name, steps, **more):
        options = {"stage": "self-play", "init": str(pocket_folder), "data": data, "steps": steps}
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
def test_other_drawings_take_part(data, pocket_folder, tmp_path):
    (data / "other/noto").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(data / "other/noto/red-heart.png")
    options = {"stage": "self-play", "init": str(pocket_folder), "data": data, "steps": 1, "play_guidance": 1.0}
    train(Config(**options, output=tmp_path / "run", others_share=0.2, **SETTINGS))
    assert len(load_file(tmp_path / "run" / "own-drawings.safetensors")["latents"]) == 5 + 1


@pytest.mark.slow
def test_an_interruption_among_the_drawings_lets_the_folder_go(data, pocket_folder, tmp_path, monkeypatch):
    options = {"stage": "self-play", "init": str(pocket_folder), "data": data, "output": tmp_path / "run", "steps": 1}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sfumato.pocket.self_play.own_drawings", interrupted)
        with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
            train(Config(**options, **SETTINGS))
    train(Config(**options, **SETTINGS))
    assert caught  # as a notebook does, which keeps the traceback, and with it the run
    assert (tmp_path / "run/model").is_dir()
