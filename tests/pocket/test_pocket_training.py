"""The pocket base's recipe: data rules, captions, rate, Muon, resume, and the judge's figures."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from bench.distances import paired_kernel_distance
from bench.judge import train_judge
from bench.judge_pictures import read_pictures, withheld_cells
from bench.pocket_data import is_kept_for_subjects, resolve
from bench.pocket_data import withheld_cells as choose_cells
from sfumato import load_base
from sfumato.data.latents import to_floats
from sfumato.diffusion import crossing_noise, noise_latents, target
from sfumato.errors import BaseModelError, ConfigError, DataError, RunError
from sfumato.files import read_tensors
from sfumato.pocket import muon, outputs
from sfumato.pocket.captions import all_captions, caption, other_caption, read_words
from sfumato.pocket.encoding import encode_text
from sfumato.pocket.init_parts import learning_parts
from sfumato.pocket.latents import Latents, encode, encode_all
from sfumato.pocket.lessons import FARTHEST, Lesson, Lessons, Shares
from sfumato.pocket.muon import Muon, orthogonal
from sfumato.pocket.options import learning_rate_at, rate_at, settled_for_device
from sfumato.pocket.outputs import save_sheet, sheet
from sfumato.pocket.parts import build_vae
from sfumato.pocket.pictures import (
    VARIANTS,
    Move,
    Pictures,
    batch_indices,
    partners_of,
    read_manifest,
    read_others,
)
from sfumato.pocket.pictures import read_pictures as read_drawings
from sfumato.pocket.style_augmentation import hand_name, restyle
from sfumato.pocket.trained import PretrainState
from sfumato.precision import Precision
from sfumato.runs.run import Run
from sfumato.training.options import RunOptions
from tests.tiny import CPU
from trainers.pretrain import Config, train


def test_withheld_cells_depend_on_names_not_on_their_order():
    names, styles = [f"thing {i}" for i in range(40)], ["a", "b", "c", "d"]
    assert choose_cells(names, styles, 3) == choose_cells(names[::-1], styles, 3)
    assert len(choose_cells(names, styles, 3)) == 16
    assert choose_cells(names, styles, 3) != choose_cells(names, styles, 4)


@pytest.mark.parametrize("name", ["kite", "teddy-bear", "bubble-tea", "llama-face"])
def test_subjects_and_their_variants_are_kept_apart(name):
    assert is_kept_for_subjects(name)


@pytest.mark.parametrize("name", ["bear", "speech-bubble", "kiwi-fruit", "teacup-without-handle"])
def test_what_only_sounds_like_a_subject_is_not_kept_apart(name):
    assert not is_kept_for_subjects(name)


def test_a_mirrored_alias_is_no_drawing_of_its_own():
    icons = {"icons": {"fish": {}}, "aliases": {"a": {"parent": "fish"}, "b": {"parent": "fish", "hFlip": True}}}
    assert [resolve(icons, name) for name in ("a", "b", "c")] == ["fish", None, None]


SHARES = {"empty_share": 0.1, "group_share": 0.06, "plain_share": 0.25}


@pytest.mark.parametrize(
    ("draw", "form", "text"),
    [
        (0.05, 0.2, ""),
        (0.12, 0.2, "a fruit, noto style"),
        (0.12, 0.7, "a fruit"),
        (0.5, 0.2, "red apple, noto style"),
        (0.5, 0.6, "a noto style picture of a red apple"),
        (0.5, 0.9, "red apple"),
    ],
)
def test_captions(draw, form, text):
    assert caption("red apple", "noto", "a fruit", draw=draw, form=form, **SHARES) == text


def test_fewer_captions_are_plain_on_request():
    told = {"draw": 0.5, **SHARES, "plain_share": 0.1}
    forms = {form: caption("crab", "flat", "an animal", form=form, **told) for form in (0.55, 0.65, 0.89, 0.91)}
    styled = "a flat style picture of a crab"
    assert forms == {0.55: "crab, flat style", 0.65: styled, 0.89: styled, 0.91: "crab"}


@pytest.mark.parametrize(
    ("draw", "form", "text"), [(0.05, 0.2, ""), (0.5, 0.2, "noto style"), (0.5, 0.6, "red heart, noto style")]
)
def test_captions_of_what_the_base_is_not_asked_for(draw, form, text):
    assert other_caption("red heart", "noto", draw=draw, form=form, empty_share=0.1) == text


def test_the_rate_rises_stays_and_falls_to_nothing():
    config = Config(steps=100, warmup=10, fall_at=60)
    assert [rate_at(step, config) for step in (0, 9, 59, 80, 100)] == [0.1, 1.0, 1.0, 0.5, 0.0]


def test_a_run_that_went_back_learns_at_a_smaller_rate():
    config = Config(steps=100, warmup=10, fall_at=60, learning_rate=2e-3)
    step = SimpleNamespace(number=80, rate_factor=0.25)
    assert learning_rate_at(step, config) == pytest.approx(2e-3 * 0.5 * 0.25)


@pytest.mark.parametrize(("steps", "warmup", "fall_at"), [(500, 50, 166), (3000, 100, 1000)])
def test_what_is_unset_goes_by_the_steps_and_what_is_set_stays(steps, warmup, fall_at):
    config, precision = settled_for_device(Config(steps=steps, device="cpu", precision="fp32"), learning_rate=3e-4)
    assert (config.warmup, config.fall_at, config.learning_rate) == (warmup, fall_at, 3e-4)
    assert (precision.device.type, precision.compute) == ("cpu", torch.float32)
    set_ = Config(steps=steps, device="cpu", precision="bf16", warmup=0, fall_at=1, learning_rate=1.0)
    config, precision = settled_for_device(set_)
    assert (config.warmup, config.fall_at, config.learning_rate) == (0, 1, 1.0)
    assert precision.compute == torch.bfloat16


@pytest.mark.parametrize(("optimizer", "decaying"), [("adamw", {"adamw": 2}), ("muon", {"adamw": 1, "muon": 1})])
def test_matrices_decay_and_biases_do_not_and_the_ends_are_adamws(optimizer, decaying):
    modules = {"a": nn.ModuleDict({"conv_in": nn.Linear(2, 3), "inner": nn.Linear(3, 3)})}
    how = {"learning_rate": 0.1, "weight_decay": 0.01, "ema": 0.0, "largest_norm": 1.0}
    made = PretrainState(modules, torch.device("cpu"), optimizer=optimizer, **how).optimizers
    groups = [(name, group) for name, each in made.items() for group in each.param_groups]
    decay = {(name, p.ndim): group["weight_decay"] for name, group in groups for p in group["params"]}
    assert decay == {**{(name, 2): 0.01 for name in decaying}, ("adamw", 1): 0.0}
    found = {name: len([p for p in group["params"] if p.ndim > 1]) for name, group in groups if group["weight_decay"]}
    assert found == decaying


def test_what_is_frozen_is_no_part_of_what_learns():
    modules = {"a": nn.Linear(2, 2).requires_grad_(False), "b": nn.Linear(2, 2)}
    how = {"learning_rate": 0.1, "weight_decay": 0.01, "ema": 0.9, "largest_norm": 1.0}
    trained = PretrainState(modules, torch.device("cpu"), optimizer="adamw", **how)
    assert list(trained.named) == ["b.weight", "b.bias"]
    assert sum(len(group["params"]) for group in trained.optimizers["adamw"].param_groups) == 2


def test_a_sample_is_drawn_with_the_averaged_weights(monkeypatch, tmp_path):
    layer = nn.Linear(1, 1)
    nn.init.zeros_(layer.weight)
    how = {"optimizer": "adamw", "learning_rate": 0.1, "weight_decay": 0.0, "ema": 0.5, "largest_norm": 1.0}
    trained = PretrainState({"a": layer}, torch.device("cpu"), **how)
    nn.init.ones_(layer.weight)
    drawn = []
    monkeypatch.setattr(outputs, "sheet", lambda *_: drawn.append((layer.training, layer.weight.item())))
    run = SimpleNamespace(folder=tmp_path, every=lambda every, sample: sample(every))
    outputs.draw_samples(run, 5, trained, CPU, None, ["noto"], ["crab"])
    assert drawn == [(False, 0.0)]
    assert (layer.training, layer.weight.item()) == (True, 1.0)


def test_each_text_is_encoded_by_itself_whatever_is_beside_it(pocket_folder):
    base = load_base(pocket_folder, precision=CPU)
    texts = ["key", "a crab", "key", "", "red apple " * 100]
    together = encode_text(base.text_encoders[0], base.tokenizers[0], texts, CPU.device)
    for text, found in zip(texts, together, strict=True):
        assert_close(found, encode_text(base.text_encoders[0], base.tokenizers[0], [text], CPU.device)[0])
    assert not torch.allclose(together[0], together[1])


def test_the_tokenizer_learns_from_every_caption_and_the_words(data):
    texts = all_captions(read_manifest(data), read_words(data))
    assert {"red apple, noto style", "a flat style picture of a sea animal", "picture", "of"} <= set(texts)


def test_an_epoch_shows_every_picture_once():
    assert sorted(i for step in range(5) for i in batch_indices(step, 4, 20, seed=0)) == list(range(20))


@pytest.mark.parametrize("is_multiplied", [True, False])
def test_orthogonal_brings_singular_values_near_one(monkeypatch, is_multiplied):
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: is_multiplied)
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_moves_every_weight_by_a_fifth_of_its_rate():
    weight = torch.nn.Parameter(torch.zeros(16, 4, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.01, momentum=0.95, weight_decay=0.0).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.002, rel=0.2)


@pytest.mark.parametrize("shape", [(6, 20), (20, 2, 3, 3)])
def test_muon_is_its_formula(shape):
    """Jordan et al. 2024 with Nesterov's momentum: m <- b m + (1 - b) g; w <- w (1 - r d) - r 0.2 sqrt(max(shape))
    O((1 - b) g + b m), O from the singular value decomposition by five steps of 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
    rate, momentum, decay = 0.01, 0.9, 0.5
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = Muon([weight], lr=rate, momentum=momentum, weight_decay=decay)
    w, m = weight.detach().clone().flatten(1), torch.zeros(shape).flatten(1)
    for _ in range(3):
        weight.grad = torch.randn(shape, generator=generator)
        g = weight.grad.flatten(1)
        m = momentum * m + (1 - momentum) * g
        u, s, v = torch.linalg.svd((1 - momentum) * g + momentum * m, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        w = w * (1 - rate * decay) - rate * 0.2 * max(w.shape) ** 0.5 * (u * s) @ v
        optimizer.step()
        assert_close(weight.detach().flatten(1), w, rtol=0, atol=3e-4)  # bf16's rounding


def test_a_missing_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json is missing; build the pictures with"):
        read_manifest(tmp_path)


def described(data, **changes):
    """The folder with other entries in its manifest; None takes one out."""
    manifest = json.loads((data / "manifest.json").read_text()) | changes
    (data / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))
    return data


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"styles": []}, '"styles" must be a list of names'),
        ({"concepts": None}, '"concepts" must be an object'),
        ({"concepts": ["crab", "key"]}, '"concepts" must be an object'),
        ({"withheld": [["flat", "key"]]}, '"withheld" has ["flat", "key"], which is no [concept, style]'),
        ({"withheld": [[["key"], "flat"]]}, '"withheld" has [["key"], "flat"], which is no [concept, style]'),
        ({"withheld": 2}, '"withheld" must be a list'),
    ],
)
def test_a_manifest_that_lacks_something_says_what(changes, said, data):
    with pytest.raises(DataError, match=re.escape(said)):
        read_manifest(described(data, **changes))


def test_a_manifest_that_is_no_json_says_where(data):
    (data / "manifest.json").write_text('{"styles": [')
    with pytest.raises(DataError, match=r"manifest\.json: not readable as JSON \(.*line 1"):
        read_manifest(data)


def test_words_are_read_with_a_byte_order_mark_and_refused_in_another_encoding(data):
    (data / "words.txt").write_text("picture\nof", encoding="utf-8-sig")
    assert read_words(data) == ["picture", "of"]
    (data / "words.txt").write_text("picture", encoding="utf-16")
    with pytest.raises(DataError, match=r"words\.txt cannot be read \(not UTF-8\)"):
        read_words(data)


def test_a_manifest_is_read_with_a_byte_order_mark(data):
    file, wanted = data / "manifest.json", read_manifest(data)
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert read_manifest(data) == wanted


def test_a_manifest_need_not_withhold_anything(data):
    assert len(read_drawings(described(data, withheld=None)).names) == 6
    (data / "manifest.json").write_text('{"withheld": null, ' + (data / "manifest.json").read_text()[1:])
    assert len(read_drawings(data).names) == 6


def test_a_picture_that_is_missing_or_of_another_size_is_named_with_its_style(data):
    path = data / "flat" / "crab.png"
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"flat/crab\.png: not a picture"):
        read_drawings(data)
    Image.new("RGB", (64, 48)).save(path)
    with pytest.raises(DataError, match=r"flat/crab\.png is 64 x 48 px, .*noto/red-apple\.png 64 x 64"):
        read_drawings(data)
    path.unlink()
    with pytest.raises(DataError, match=r'crab\.png is missing; add it, or add \["crab", "flat"\] to'):
        read_drawings(data)


def resized(data, side):
    for path in data.rglob("*.png"):
        Image.open(path).resize((side, side)).save(path)
    return data


def test_sizes_that_the_shapes_cannot_halve_are_refused(data):
    with pytest.raises(DataError, match="60 x 60 px; wanted squares of a multiple of 16 px"):
        read_drawings(resized(data, 60))


def test_transparent_pictures_lie_on_white(data):
    for path in data.rglob("*.png"):
        Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(path)
    assert read_drawings(data).pixels.eq(255).all()


def test_pictures_of_another_size_make_a_base_of_that_size(data, pocket_folder, tmp_path):
    settings = {"steps": 1, "batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32"}
    settings |= {"data": resized(data, 32)}
    vae = train(Config(output=tmp_path / "vae", **settings))
    assert AutoencoderKL.from_pretrained(vae).config.sample_size == 32
    model = train(Config(stage="unet", init=str(pocket_folder), output=tmp_path / "unet", **settings))
    assert load_base(model, precision=CPU).resolution == 32


def test_other_drawings_of_another_size_are_refused(data):
    (data / "other" / "noto").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(data / "other" / "noto" / "red-heart.png")
    with pytest.raises(DataError, match="other drawings are 32 x 32 px, those of the concepts 64 x 64"):
        read_drawings(data).and_others(read_others(data))


@pytest.mark.parametrize(("family", "said"), [("sd1", "predicts epsilon"), ("sdxl", "more than one text encoder")])
def test_a_base_that_learned_something_else_does_not_go_on(family, said, data, family_folder, tmp_path):
    with pytest.raises(BaseModelError, match=f"{said}.*Name a base that pretrain made"):
        train(Config(stage="unet", init=str(family_folder(family)), data=data, output=tmp_path / "on", steps=1))


def test_a_base_of_another_noise_schedule_does_not_go_on(pocket_folder):
    own = load_base(pocket_folder, precision=CPU).scheduler
    learning_parts(str(pocket_folder), "cpu", own)
    other = DDIMScheduler.from_config(own.config, beta_end=own.config.beta_end * 1.5)
    with pytest.raises(
        BaseModelError, match=f"--init {pocket_folder}: a base with another noise schedule. Name a base"
    ):
        learning_parts(str(pocket_folder), "cpu", other, option="--init")


def test_a_vae_of_another_factor_goes_on(data, family_folder, tmp_path):
    settings = {"steps": 1, "batch": 2, "sample_every": 0, "device": "cpu", "precision": "fp32"}
    folder = family_folder("sd1")
    made = train(Config(init=str(folder), decoder_only=True, data=data, output=tmp_path / "vae", **settings))
    vae = AutoencoderKL.from_pretrained(made)
    cache = Latents(vae, read_drawings(data), VARIANTS[:1], torch.device("cpu"))
    assert cache.means.shape[-2:] == (8, 8)


def test_the_sheet_shows_what_the_base_learns(monkeypatch, tmp_path):
    asked, seeds = [], []

    def pipeline(prompts, generator, guidance_scale, **_):
        asked.append(prompts)
        seeds.append([each.initial_seed() for each in generator])
        assert guidance_scale == 2.5
        return SimpleNamespace(images=torch.full((len(prompts), 3, 8, 8), 0.5))

    sheet(pipeline, ["oil"], ["crab", "sled", "house"], tmp_path / "known.png")
    sheet(pipeline, ["oil", "ink"], ["sled", "lamp"], tmp_path / "own.png")
    assert asked == [
        ["crab, oil style", "house, oil style"],
        ["sled, oil style", "lamp, oil style", "sled, ink style", "lamp, ink style"],
    ]
    assert seeds[1] == seeds[0] * 2  # by the column
    assert len(set(seeds[0])) == 2
    assert set(Image.open(tmp_path / "known.png").getdata()) == {(128, 128, 128)}


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
        return [json.loads(line)["loss"] for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]

    whole = run("whole", 4)
    run("halves", 2)
    assert run("halves", 4, resume=True, force=True) == whole


def test_the_judge_tells_real_pictures_apart_and_never_sees_withheld_ones(data):
    pictures = read_pictures(data)
    seen, _ = pictures.apart(withheld_cells(data))
    assert (len(pictures.pixels), len(seen.pixels)) == (6, 5)
    first, second = (train_judge(seen, steps=2, seed=0) for _ in range(2))
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_distances_of_a_set_from_another_of_its_kind_and_from_a_shifted_one():
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    assert abs(paired_kernel_distance(features[:100], features[100:])) < 0.2
    assert paired_kernel_distance(features[:100], features[100:] + 2) > 10


def test_a_unet_goes_on_from_a_base_with_its_vae_and_words(data, pocket_folder, tmp_path):
    settings = {"steps": 1, "batch": 2, "learning_rate": 1e-9, "sample_every": 0, "device": "cpu", "precision": "fp32"}
    model = train(Config(stage="unet", init=str(pocket_folder), data=data, output=tmp_path / "on", **settings))
    after, before = (load_base(base, precision=CPU) for base in (model, pocket_folder))
    for part in ("unet", "vae"):
        assert_close(getattr(after, part).state_dict(), getattr(before, part).state_dict(), rtol=0, atol=1e-6)
    assert after.tokenizers[0].get_vocab() == before.tokenizers[0].get_vocab()


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


def test_a_unet_that_is_told_less_of_thing_and_style_together_goes_on_where_it_stopped(data, pocket_folder, tmp_path):
    settings = {"batch": 4, "sample_every": 0, "device": "cpu", "precision": "fp32", "warmup": 0, "fall_at": 1}
    settings |= {"stage": "unet", "init": str(pocket_folder), "data": data, "train_text_encoder": False}

    def run(folder, steps, **more):
        train(Config(output=tmp_path / folder, steps=steps, **settings, **more))
        return [json.loads(line)["loss"] for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]

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


def test_a_share_of_the_first_weights_asks_for_a_base(tmp_path):
    with pytest.raises(ConfigError, match="--init-share keeps weights of a base: it needs --init"):
        train(Config(init_share=0.5, output=tmp_path / "on"))


def read_parts(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in read_tensors(file).items()}


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


def test_an_encoder_at_rest_has_no_divergence_to_learn(data, tmp_path):
    with pytest.raises(ConfigError, match="--kl has no effect without an encoder that learns"):
        train(Config(init="pocket", decoder_only=True, kl=0.1, data=data, output=tmp_path / "on"))


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


def test_other_drawings_show_nothing_that_is_withheld(data):
    (data / "other/flat").mkdir(parents=True)
    shutil.copy(data / "noto/key.png", data / "other/flat/key.png")
    with pytest.raises(DataError, match=r'key\.png shows what manifest\.json withholds, \["key", "flat"\]'):
        read_others(data)


def test_only_a_vae_with_a_base_has_a_decoder_to_go_on_with(data, tmp_path):
    for wrong in ({"stage": "vae"}, {"stage": "unet", "init": "pocket"}):
        with pytest.raises(ConfigError, match="--decoder-only goes on with the VAE of a base"):
            train(Config(decoder_only=True, data=data, output=tmp_path / "on", **wrong))


def test_other_drawings_take_their_share_of_a_batch(data, pocket_folder, tmp_path):
    (data / "other/noto").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(data / "other/noto/red-heart.png")
    assert read_others(data).names == [("red heart", "noto")]
    settings = {"steps": 1, "batch": 4, "sample_every": 0, "device": "cpu", "precision": "fp32"}

    def loss(folder, share):
        train(Config(stage="unet", init=str(pocket_folder), data=data, output=folder, others_share=share, **settings))
        return json.loads((folder / "log.jsonl").read_text().splitlines()[0])["loss"]

    assert loss(tmp_path / "with", 0.5) != loss(tmp_path / "without", 0.0)


NAMES = [("crab", "noto"), ("crab", "flat"), ("key", "noto"), ("heart", "flat"), ("heart", "noto")]


def lessons(**given):
    usual = dict.fromkeys(("flip", "group", "plain", "empty", "others", "varied", "crossed", "moved", "hands"), 0.0)
    shares = Shares(**{**usual, "crossed_from": 300, "moved_below": 600, **given})
    partners = partners_of(Pictures(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), NAMES))
    return Lessons(NAMES, 3, {"crab": "an animal", "key": "a tool"}, shares, 0, partners)


def test_a_name_alone_is_said_of_the_drawing_in_the_plain_style_or_of_the_first_where_that_is_withheld():
    steps = [lessons(plain=0.5, plain_style="flat", others=0.4).at(step, torch.zeros(5)) for step in range(20)]
    shown = {(text, asked) for step in steps for text, asked in zip(step.captions, step.asked, strict=True)}
    assert {(text, asked) for text, asked in shown if text in ("crab", "key")} == {("crab", 1), ("key", 2)}
    assert {("crab, noto style", 0), ("crab, flat style", 1), ("heart, flat style", 3)} <= shown
    assert all(step.seen == step.asked for step in steps)


def test_partners_show_the_thing_in_another_style_where_it_lies():
    pixels = torch.full((5, 3, 8, 8), 255, dtype=torch.uint8)
    for index, (first, last) in enumerate([(0, 4), (0, 5), (0, 4), (0, 3), (4, 8)]):
        pixels[index, index % 3, first:last] = 200
    pictures = Pictures(pixels, NAMES)
    assert partners_of(pictures) == [[1], [0], [], [4], [3]]
    assert partners_of(pictures, 0.8) == [[1], [0], [], [], []]
    assert partners_of(pictures, 0.81) == [[], [], [], [], []]


def test_a_crossed_picture_is_asked_for_where_another_style_shows_the_thing():
    steps = [lessons(crossed=1.0, others=0.4).at(step, torch.tensor([999, 999, 300, 299, 999])) for step in range(20)]
    texts = set()
    for step in steps:
        for place, (asked, seen, text) in enumerate(zip(step.asked, step.seen, step.captions, strict=True)):
            (what, style), (there, other) = NAMES[asked], NAMES[seen]
            if place == 3 or what == "key":  # too little noise, and a thing in one style alone
                assert seen == asked
            else:
                assert there == what
                assert other != style
                texts.add(text.replace(what, "THING").replace(style, "STYLE"))
    assert texts == {"THING, STYLE style", "STYLE style"}


def test_a_varied_picture_says_so_and_a_plain_one_says_nothing():
    lesson = lessons(varied=0.5).at(0, torch.zeros(64))
    said = {text.removeprefix("crab, ").removeprefix("key, ") for text in lesson.captions}
    assert len(set(lesson.variants)) > 6
    for variant, text in zip(lesson.variants, lesson.captions, strict=True):
        words = VARIANTS[variant].words
        assert text.endswith(words) if words else not text.endswith(("colors", "mirrored"))
    assert any("bgr colors, mirrored" in text for text in said)
    assert {*lessons(varied=1.0, empty=1.0).at(0, torch.zeros(64)).captions} <= {v.words for v in VARIANTS[1:]}


def test_a_picture_by_another_hand_names_it_and_shows_the_same_thing():
    plain, by_hand = (lessons(hands=share, empty=0.2).at(0, torch.zeros(400)) for share in (0.0, 0.6))
    assert plain.hands == {}
    assert by_hand.asked == by_hand.seen == plain.asked
    assert 0.5 < len(by_hand.hands) / 400 < 0.7
    assert len(set(by_hand.hands.values())) > 60
    for place, (before, text) in enumerate(zip(plain.captions, by_hand.captions, strict=True)):
        name = f"hand {hand_name(by_hand.hands[place])}" if place in by_hand.hands else ""
        assert text == ", ".join(part for part in (before, name) if part)


def test_pictures_are_moved_at_little_noise_alone_and_captions_do_not_tell():
    timesteps = torch.tensor([0, 599, 600, 999] * 16)
    still, moved = (lessons(moved=share).at(0, timesteps) for share in (0.0, 1.0))
    assert still.moves == {}
    assert sorted(moved.moves) == [place for place in range(64) if place % 4 < 2]
    assert (moved.asked, moved.captions) == (still.asked, still.captions)
    assert {move.turns for move in moved.moves.values()} == {0, 1, 2, 3}
    assert max(abs(move.down) for move in moved.moves.values()) <= FARTHEST
    assert lessons(moved=0.5).at(0, timesteps).moves.keys() < moved.moves.keys()


def test_a_move_turns_and_shifts_and_fills_with_white():
    picture = torch.arange(12, dtype=torch.uint8).view(1, 3, 4).expand(3, 3, 4)
    assert torch.equal(Move(0, 0, 0).of(picture), picture)
    assert Move(0, 1, -2).of(picture)[0].tolist() == [[255] * 4, [2, 3, 255, 255], [6, 7, 255, 255]]
    assert Move(1, 0, 0).of(picture)[0].tolist() == [[3, 7, 11], [2, 6, 10], [1, 5, 9], [0, 4, 8]]
    assert Move(2, 0, 9).of(picture).eq(255).all()


def test_latents_of_changed_and_crossed_pictures_are_those_of_the_pictures_as_they_come_to_be(data):
    drawn = read_drawings(data)
    vae = load_base("pocket", precision=CPU).vae
    cache = Latents(vae, drawn, VARIANTS[:2], torch.device("cpu"))
    move = Move(3, -5, 7)
    moves, hands = {0: move, 1: move}, {1: 7, 2: 8}
    lesson = Lesson(asked=[0, 1, 2], seen=[0, 3, 4], variants=[1, 0, 0], moves=moves, hands=hands, captions=[])
    lying = to_floats(torch.stack([move.of(drawn.pixels[0].flip(2)), move.of(drawn.pixels[1]), drawn.pixels[2]]))
    shown = to_floats(torch.stack([move.of(drawn.pixels[0].flip(2)), move.of(drawn.pixels[3]), drawn.pixels[4]]))
    changed = [torch.cat([pixels[:1], restyle(pixels[1:], [7, 8])]) for pixels in (lying, shown)]
    (mean, deviation), (seen, _) = (encode(vae, pixels) for pixels in changed)
    scaled = [vae.config.scaling_factor * part for part in (mean, deviation, seen)]
    assert_close(list(cache.of(lesson)), scaled, rtol=1e-4, atol=1e-4)


def test_variants_are_the_picture_and_eleven_lossless_changes_of_it(data):
    drawn = read_drawings(data)
    twelve = [drawn.varied(variant).pixels for variant in VARIANTS]
    assert torch.equal(twelve[0], drawn.pixels)
    assert torch.equal(twelve[1], drawn.pixels.flip(3))
    assert len({pixels.numpy().tobytes() for pixels in twelve}) == 12
    assert [variant.words for variant in VARIANTS[:3]] == ["", "mirrored", "rbg colors"]


def test_crossing_noise_makes_others_of_what_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    asked, seen, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    alpha_bar = torch.tensor([0.1, 0.5, 0.9])
    crossing = crossing_noise(asked, seen, noise, alpha_bar)
    noisy = noise_latents(asked, crossing, alpha_bar)
    assert_close(noisy, noise_latents(seen, noise, alpha_bar))
    # Whoever predicts the target, of either type, has predicted what is asked for.
    a = alpha_bar.view(-1, 1, 1, 1)
    assert_close(a.sqrt() * noisy - (1 - a).sqrt() * target("v_prediction", asked, crossing, alpha_bar), asked)
    assert_close((noisy - (1 - a).sqrt() * target("epsilon", asked, crossing, alpha_bar)) / a.sqrt(), asked)


@pytest.mark.slow
def test_crossed_varied_and_moved_pictures_are_learned_from(data, tmp_path):
    settings = {"steps": 1, "batch": 4, "sample_every": 0, "device": "cpu", "precision": "fp32"}

    def loss(name, **shares):
        train(Config(stage="unet", init="pocket", data=data, output=tmp_path / name, **settings, **shares))
        return json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["loss"]

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


def test_a_plain_style_that_the_pictures_lack_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="--plain-style oil"):
        train(Config(stage="unet", init="pocket", data=data, output=tmp_path / "on", plain_style="oil"))
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
            "no picture would be crossed",
        ),
        ({"stage": "unet", "init": "pocket", "moved_share": 0.1, "moved_below": 0}, "no picture would be moved"),
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


def test_a_sheet_with_a_black_or_broken_picture_is_not_written(tmp_path):
    grey = torch.zeros(2, 3, 8, 8)
    for value in (-1.0, float("nan"), float("inf")):
        broken = grey.clone()
        broken[1] = value
        with pytest.raises(BaseModelError, match="black or not finite"):
            save_sheet(broken, 2, tmp_path / "sheet.png")
        assert list(tmp_path.iterdir()) == []
    save_sheet(grey, 2, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (16, 8)


def test_latents_that_are_not_finite_name_the_pictures(data):
    vae = build_vae()
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] = float("nan")
    with pytest.raises(DataError, match=r"crab noto, .*: the VAE's latents are not finite"):
        encode_all(vae, read_drawings(data), torch.device("cpu"))
