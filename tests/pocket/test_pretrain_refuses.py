"""`pretrain` refuses what makes no sense before anything is written."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler

from sfumato import load_base
from sfumato.errors import BaseModelError, ConfigError, DataError
from sfumato.training.methods.full import make_inpainting, write_folder
from sfumato.training.pretrain.model import build_vae, fp32_precision, trainable_parts
from tests.tiny import CPU
from trainers.pretrain import Config, train


@pytest.mark.parametrize(("family", "said"), [("sd1", "predicts epsilon"), ("sdxl", "more than one text encoder")])
def test_a_base_that_learned_something_else_does_not_go_on(family, said, data, family_folder, tmp_path):
    with pytest.raises(BaseModelError, match=f"{said}.*Name a base that pretrain made"):
        train(Config(stage="unet", init=str(family_folder(family)), data=data, output=tmp_path / "on", steps=1))


def test_a_share_of_the_first_weights_asks_for_a_base(tmp_path):
    with pytest.raises(ConfigError, match="--init-share keeps weights of a base: it needs --init"):
        train(Config(init_share=0.5, output=tmp_path / "on"))


def test_an_encoder_at_rest_has_no_divergence_to_learn(data, tmp_path):
    with pytest.raises(ConfigError, match="--kl has no effect without an encoder that learns"):
        train(Config(init="pocket", decoder_only=True, kl=0.1, data=data, output=tmp_path / "on"))


def test_only_a_vae_with_a_base_has_a_decoder_to_go_on_with(data, tmp_path):
    for wrong in ({"stage": "vae"}, {"stage": "unet", "init": "pocket"}):
        with pytest.raises(ConfigError, match="--decoder-only goes on with the VAE of a base"):
            train(Config(decoder_only=True, data=data, output=tmp_path / "on", **wrong))


def test_a_plain_style_that_the_pictures_lack_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="--plain-style oil"):
        train(Config(stage="unet", init="pocket", data=data, output=tmp_path / "on", plain_style="oil"))
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize(("least", "said"), [(0.0, "two styles; "), (1.0, r"two styles .* --crossed-overlap 1\.0; ")])
def test_a_share_of_crossed_images_wants_things_in_two_styles(least, said, data, tmp_path):
    if not least:
        told = json.loads((data / "manifest.json").read_text())
        (data / "manifest.json").write_text(json.dumps({**told, "styles": ["noto"], "withheld": []}))
    asked = {"crossed_share": 0.5, "crossed_overlap": least}
    with pytest.raises(ConfigError, match=f"--crossed-share 0.5: .* has nothing in {said}"):
        train(Config(stage="unet", init="pocket", data=data, output=tmp_path / "on", steps=1, **asked))
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"moved_share": 1.5},
        {"crossed_overlap": -0.1, "crossed_share": 0.1},
        {"moved_below": -1, "moved_share": 0.1},
        {"crossed_from": -1, "crossed_share": 0.1},
    ],
)
def test_shares_and_timesteps_out_of_range_are_refused_by_name(wrong, data, tmp_path):
    option = "--" + next(iter(wrong)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"{option} is .*; it must "):
        train(Config(stage="unet", init="pocket", data=data, output=tmp_path / "on", steps=1, **wrong))
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stage": "unet", "init": "pocket", "kl": 0.1}, "--kl has no effect without --stage vae"),
        ({"compile": True}, "--compile has no effect without --stage unet"),
        ({"moved_share": 0.5}, "--moved-share has no effect without --stage unet"),
        ({"others_share": 0.5}, "--others-share has no effect without --stage unet"),
        ({"empty_share": 0.5}, "--empty-share has no effect without --stage unet"),
        (
            {"stage": "unet", "init": "pocket", "crossed_from": 5},
            "--crossed-from has no effect without --crossed-share",
        ),
        ({"stage": "unet", "init": "pocket", "moved_below": 5}, "--moved-below has no effect without --moved-share"),
        (
            {"stage": "unet", "init": "pocket", "plain_style": "noto", "plain_share": 0.0},
            "--plain-style has no effect without --plain-share",
        ),
        (
            {"stage": "unet", "init": "pocket", "empty_share": 0.6, "group_share": 0.5},
            "--empty-share 0.6 and --group-share 0.5",
        ),
        ({"stage": "unet", "init": "pocket", "others_share": 0.1, "batch": 4}, "--others-share 0.1 of --batch 4 is no"),
        (
            {"stage": "unet", "init": "pocket", "crossed_share": 0.1, "crossed_from": 1000},
            "no image would be crossed",
        ),
        ({"stage": "unet", "init": "pocket", "moved_share": 0.1, "moved_below": 0}, "no image would be moved"),
        ({"stage": "unet", "init": "pocket", "snr_gamma": 0.0, "flat_weight": 0.0}, "nothing would be learned"),
    ],
)
def test_what_has_no_effect_is_refused(given, said, data, tmp_path):
    with pytest.raises(ConfigError, match=said):
        train(Config(data=data, output=tmp_path / "on", **given))
    assert not (tmp_path / "on").exists()


def test_a_machine_without_a_compiler_is_told_before_anything_is_written(data, monkeypatch, tmp_path):
    def trifle(*_):
        raise RuntimeError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", lambda _: trifle)
    with pytest.raises(ConfigError, match=r"\(No working C\+\+ compiler found\)\. Install .* or give --no-compile"):
        train(Config(stage="unet", init="pocket", compile=True, data=data, output=tmp_path / "on"))
    assert not (tmp_path / "on").exists()


def test_a_vae_of_other_latents_is_refused_before_anything_is_written(data, tmp_path):
    AutoencoderKL.from_config(build_vae().config, latent_channels=16).save_pretrained(tmp_path / "vae")
    with pytest.raises(BaseModelError, match="its latents have 16 channels, the U-Net takes 4"):
        train(Config(stage="unet", vae=tmp_path / "vae", data=data, output=tmp_path / "on"))
    assert not (tmp_path / "on").exists()


def test_a_share_of_others_needs_them(data, tmp_path):
    with pytest.raises(DataError, match="other drawings"):
        train(Config(stage="unet", init="pocket", data=data, output=tmp_path / "on", others_share=0.5))


def test_a_base_of_another_noise_schedule_does_not_go_on(pocket_folder):
    own = load_base(pocket_folder, precision=CPU).scheduler
    trainable_parts(str(pocket_folder), "cpu", own)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for is_on in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = is_on
            assert (fp32_precision("cpu").tf32, fp32_precision("cpu").storage) == (
                is_on,
                torch.float32,
            )  # as the run has decided
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    other = DDIMScheduler.from_config(own.config, beta_end=own.config.beta_end * 1.5)
    with pytest.raises(
        BaseModelError, match=f"--init {pocket_folder}: a base with another noise schedule. Name a base"
    ):
        trainable_parts(str(pocket_folder), "cpu", other, option="--init")


def test_an_inpainting_model_does_not_go_on(pocket_folder, tmp_path):
    base = load_base(pocket_folder, precision=CPU)
    make_inpainting(base)
    folder = write_folder(base, tmp_path / "inpainting", torch.float32)
    with pytest.raises(BaseModelError, match=f"--base {folder}: an inpainting model. Name a base that pretrain made"):
        trainable_parts(str(folder), "cpu", base.scheduler)
