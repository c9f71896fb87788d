"""`pretrain`: its rate and options, what stays, what is another training, and that it goes on where it stopped."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from sfumato import load_base
from sfumato.errors import RunError
from sfumato.files import read_tensors
from sfumato.precision import Precision
from sfumato.runs.run import Run
from sfumato.training.options import RunOptions
from sfumato.training.pretrain.batches import Latents
from sfumato.training.pretrain.dataset import VARIANTS, read_others
from sfumato.training.pretrain.dataset import read_pictures as read_drawings
from sfumato.training.pretrain.outputs import PretrainState
from tests.logged import log_in
from tests.tiny import CPU
from trainers.pretrain import Config, train


def test_pictures_of_another_size_make_a_base_of_that_size(resized, pocket_folder, tmp_path):
    settings = {"steps": 1, "batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32"}
    settings |= {"data": resized(32)}
    vae = train(Config(output=tmp_path / "vae", **settings))
    assert AutoencoderKL.from_pretrained(vae).config.sample_size == 32
    model = train(Config(stage="unet", init=str(pocket_folder), output=tmp_path / "unet", **settings))
    assert load_base(model, precision=CPU).resolution == 32


def test_a_run_that_ends_leaves_its_curves(data, tmp_path):
    train(Config(data=data, output=tmp_path / "on", steps=1, batch=2, sample_every=0, device="cpu", precision="fp32"))
    assert (tmp_path / "on/plot.png").exists()


def test_a_vae_of_another_factor_goes_on(data, family_folder, tmp_path):
    settings = {"steps": 1, "batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32"}
    folder = family_folder("sd1")
    made = train(Config(init=str(folder), decoder_only=True, data=data, output=tmp_path / "vae", **settings))
    vae = AutoencoderKL.from_pretrained(made)
    cache = Latents(vae, read_drawings(data), VARIANTS[:1], torch.device("cpu"))
    assert cache.means.shape[-2:] == (8, 8)


@pytest.mark.slow
def test_a_stopped_vae_run_goes_on_as_if_it_had_not_stopped(data, tmp_path):
    def run(folder, steps, **more):
        settings = {
            "steps": steps,
            "fall_at": 2,
            "batch": 2,
            "checkpoint_every": 2,
            "sample_every": 0,
        }
        train(Config(data=data, output=tmp_path / folder, device="cpu", **settings, **more))
        return [row["loss"] for row in log_in(tmp_path / folder)]

    whole = run("whole", 4)
    run("halves", 2)
    assert run("halves", 4, resume=True, force=True) == whole


def test_a_unet_goes_on_from_a_base_with_its_vae_and_words(data, pocket_folder, tmp_path):
    settings = {"steps": 1, "batch": 2, "learning_rate": 1e-9, "sample_every": 0, "device": "cpu", "precision": "fp32"}
    model = train(Config(stage="unet", init=str(pocket_folder), data=data, output=tmp_path / "on", **settings))
    after, before = (load_base(base, precision=CPU) for base in (model, pocket_folder))
    for part in ("unet", "vae"):
        assert_close(getattr(after, part).state_dict(), getattr(before, part).state_dict(), rtol=0, atol=1e-6)
    assert after.tokenizers[0].get_vocab() == before.tokenizers[0].get_vocab()


@pytest.mark.slow
def test_a_text_encoder_at_rest_stays_and_a_run_knows_it_again(data, pocket_folder, tmp_path):
    base = shutil.copytree(pocket_folder, tmp_path / "base")
    settings = {"steps": 1, "batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32", "warmup": 0}
    settings |= {"stage": "unet", "init": str(base), "data": data, "output": tmp_path / "on"}
    model = train(Config(train_text_encoder=False, **settings))
    after, before = (load_base(folder, precision=CPU) for folder in (model, base))
    kept = [encoder.text_encoders[0].state_dict() for encoder in (after, before)]
    assert_close(kept[0], kept[1], rtol=0, atol=0)
    assert not torch.equal(after.unet.conv_in.weight, before.unet.conv_in.weight)
    file = base / "text_encoder/model.safetensors"
    save_file({name: tensor + 0.5 for name, tensor in read_tensors(file).items()}, file, {"format": "pt"})
    with pytest.raises(RunError, match="with other things than these: init "):
        train(Config(train_text_encoder=False, resume=True, **settings))


@pytest.mark.slow
def test_weights_that_no_gradient_reaches_are_told_of(data, pocket_folder, tmp_path, monkeypatch, capsys):
    asked = Config(stage="unet", data=data, init=str(pocket_folder), output=tmp_path / "whole", steps=1, batch=2)
    train(replace(asked, sample_every=0))
    assert "no gradient" not in capsys.readouterr().err

    def cut(unet):
        unet.mid_block.register_forward_hook(lambda block, given, hidden: hidden.detach())
        return unet

    monkeypatch.setattr(Precision, "compiled", lambda self, unet: cut(unet))
    train(replace(asked, sample_every=0, compile=True, output=tmp_path / "cut"))
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "no gradient" in line]
    assert re.match(r"\d+ of \d+ weights have no gradient and do not learn, such as unet\.\w+", told)


@pytest.mark.parametrize("cut", [False, True])
def test_branches_that_begin_at_zero_are_waited_for_before_weights_are_told_of(cut, tmp_path, capsys):
    """As a U-Net from nothing has them: what is before a zero gets its first gradient a step later."""
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.zeros_(last.weight)
    run = Run.start(RunOptions(output=tmp_path / "run"), program="test")
    how = {"optimizer": "adamw", "learning_rate": 0.1, "weight_decay": 0.0, "ema": 0.0, "largest_norm": 1.0}
    trained = PretrainState({"a": nn.Sequential(first, last)}, torch.device("cpu"), **how)
    for step in run.steps(12):
        hidden = first(torch.ones(3, 2))
        trained.learn(step, last(hidden.detach() if cut else hidden).square().mean())
    run.close()
    assert ("no gradient" in capsys.readouterr().err) == cut


@pytest.mark.slow
def test_a_unet_that_is_told_less_of_thing_and_style_together_goes_on_where_it_stopped(data, pocket_folder, tmp_path):
    settings = {"batch": 4, "sample_every": 0, "device": "cpu", "precision": "fp32", "warmup": 0, "fall_at": 1}
    settings |= {"stage": "unet", "init": str(pocket_folder), "data": data, "train_text_encoder": False}

    def run(folder, steps, **more):
        train(Config(output=tmp_path / folder, steps=steps, **settings, **more))
        return [row["loss"] for row in log_in(tmp_path / folder)]

    whole = run("whole", 2, style_together=0.5)
    run("halves", 1, style_together=0.5)
    assert run("halves", 2, style_together=0.5, resume=True, force=True) == whole
    assert run("all", 1)[0] != whole[0]


def test_a_decoder_learns_while_encoder_and_latents_stay(data, tmp_path):
    settings = {"steps": 1, "batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32", "warmup": 0}
    made = train(Config(init="pocket", decoder_only=True, data=data, output=tmp_path / "on", **settings))
    after = AutoencoderKL.from_pretrained(made)
    before = load_base("pocket", precision=CPU).vae
    assert after.config.scaling_factor == before.config.scaling_factor
    weights = before.state_dict()
    same = {name for name, weight in after.state_dict().items() if torch.equal(weight, weights[name])}
    assert {name.split(".")[0] for name in same} == {"encoder", "quant_conv"}
    assert len(same) == sum(name.startswith(("encoder.", "quant_conv.")) for name in after.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (["vae"], {"decoder_only": True, "hands_share": 1.0}),
        (["unet", "text_encoder"], {"stage": "unet"}),
    ],
)
def test_a_share_of_the_first_weights_stays(parts, options, data, tmp_path):
    settings = {"steps": 1, "batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32", "warmup": 0}
    settings |= {"init": "pocket", "data": data, **options}
    folders = {
        share: train(Config(init_share=share, output=tmp_path / f"{share}", **settings)) for share in (0.0, 0.25)
    }
    before = load_base("pocket", precision=CPU)
    for part in parts:
        learned, mixed = (read_parts(folder if part == "vae" else folder / part) for folder in folders.values())
        module = {"vae": before.vae, "unet": before.unet, "text_encoder": before.text_encoders[0]}[part]
        first = dict(module.named_parameters())
        assert_close(mixed, {name: torch.lerp(learned[name], first[name], 0.25) for name in learned}, rtol=0, atol=1e-6)
        assert any(not torch.equal(mixed[name], learned[name]) for name in learned)


def read_parts(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in read_tensors(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "part"), [("vae", "vae"), ("unet", "unet")])
def test_a_share_of_other_first_weights_is_another_training(stage, part, data, pocket_folder, tmp_path):
    settings = {"steps": 1, "batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32", "warmup": 0}
    settings |= {"stage": stage, "init_share": 0.25, "data": data, "output": tmp_path / "on", "checkpoint_every": 1}
    shutil.copytree(pocket_folder, tmp_path / "base")
    made = train(Config(init=str(tmp_path / "base"), **settings))
    weights = read_parts(made if part == "vae" else made / part)
    (tmp_path / "base").rename(tmp_path / "moved")  # which changes nothing
    again = train(Config(init=str(tmp_path / "moved"), resume=True, **settings))
    assert_close(read_parts(again if part == "vae" else again / part), weights, rtol=0, atol=0)
    file = next((tmp_path / "moved" / part).glob("*.safetensors"))
    save_file({name: tensor + 0.5 for name, tensor in read_tensors(file).items()}, file, {"format": "pt"})
    with pytest.raises(RunError, match="with other things than these: init "):
        train(Config(init=str(tmp_path / "moved"), resume=True, **settings))


def test_other_groups_are_another_training(data, pocket_folder, tmp_path):
    """A group is a caption."""
    settings = {"steps": 1, "batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32", "warmup": 0}
    settings |= {"stage": "unet", "init": str(pocket_folder), "data": data, "output": tmp_path / "on"}
    train(Config(**settings))
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["concepts"]["crab"] = "a lorry"
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="with other things than these: captions "):
        train(Config(resume=True, **settings))


def test_another_decoder_is_another_training(data, pocket_folder, tmp_path):
    """The latents are those of the encoder alone, and what is written holds both."""
    shutil.copytree(pocket_folder / "vae", tmp_path / "vae")
    settings = {"steps": 1, "batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32", "warmup": 0}
    settings |= {"stage": "unet", "init": str(pocket_folder), "vae": tmp_path / "vae", "data": data}
    train(Config(output=tmp_path / "on", **settings))
    file = next((tmp_path / "vae").glob("*.safetensors"))
    tensors = read_tensors(file)
    last = next(name for name in tensors if name == "decoder.conv_out.bias")
    save_file({**tensors, last: tensors[last] + 0.5}, file, {"format": "pt"})
    with pytest.raises(RunError, match="with other things than these: vae "):
        train(Config(output=tmp_path / "on", resume=True, **settings))


@pytest.mark.slow
def test_other_drawings_take_their_share_of_a_batch(data, pocket_folder, tmp_path):
    (data / "other/noto").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(data / "other/noto/red-heart.png")
    assert read_others(data).names == [("red heart", "noto")]
    settings = {"steps": 1, "batch": 4, "sample_every": 0, "device": "cpu", "precision": "fp32"}

    def loss(folder, share):
        train(Config(stage="unet", init=str(pocket_folder), data=data, output=folder, others_share=share, **settings))
        return log_in(folder)[0]["loss"]

    assert loss(tmp_path / "with", 0.5) != loss(tmp_path / "without", 0.0)


@pytest.mark.slow
def test_crossed_varied_and_moved_pictures_are_learned_from(data, tmp_path):
    settings = {"steps": 1, "batch": 4, "sample_every": 0, "device": "cpu", "precision": "fp32"}

    def loss(name, **shares):
        train(Config(stage="unet", init="pocket", data=data, output=tmp_path / name, **settings, **shares))
        return log_in(tmp_path / name)[0]["loss"]

    losses = [loss("as it was"), loss("crossed", crossed_share=1.0), loss("varied", varied_share=1.0)]
    losses.append(loss("moved", moved_share=1.0, moved_below=1000))
    assert len({*losses}) == 4


def test_the_shares_are_the_options(data):
    given = {"moved_share": 0.1, "moved_below": 2, "crossed_share": 0.3, "crossed_from": 4, "varied_share": 0.5}
    shares = Config(data=data, **given).shares()
    assert (shares.moved, shares.moved_below, shares.crossed, shares.crossed_from, shares.varied) == (
        0.1,
        2,
        0.3,
        4,
        0.5,
    )


@pytest.mark.slow
def test_a_unet_is_trained_into_an_ordinary_pipeline_and_resumes(data, tmp_path):
    from diffusers import StableDiffusionPipeline

    def run(stage, folder, steps, **more):
        settings = {"fall_at": 1, "batch": 2, "checkpoint_every": 1, "sample_every": 9}
        model = train(
            Config(stage=stage, data=data, output=tmp_path / folder, steps=steps, device="cpu", **settings, **more)
        )
        lines = (tmp_path / folder / "log.jsonl").read_text().splitlines()
        return model, [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    vae, _ = run("vae", "vae", 1)
    model, whole = run("unet", "whole", 2, vae=vae, optimizer="muon")
    run("unet", "halves", 1, vae=vae, optimizer="muon")
    _, halves = run("unet", "halves", 2, vae=vae, optimizer="muon", resume=True, force=True)
    assert halves == whole
    assert StableDiffusionPipeline.from_pretrained(model).tokenizer.model_max_length == 77
