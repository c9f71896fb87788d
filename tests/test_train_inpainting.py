"""Training on inpainting models: samples with holes, every trainer, and a model made one."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.testing import assert_close

from bench.runs_resume import CASES, command, make_inputs, results, run
from sfumato import Adapter, cli, compose, data
from sfumato.data.options import Options
from sfumato.data.preparation import planning
from sfumato.data.preparation.latents import InpaintingMasks
from sfumato.data.preparation.planning import PreparationPlan
from sfumato.errors import ConfigError
from sfumato.generation.draw import Start, draw
from sfumato.models import Base, diffusion, load_base
from sfumato.precision.__init__ import forecast_precision
from sfumato.runs.processes import MicroBatch
from sfumato.training.loss.objective import draw_noised, per_sample_losses
from sfumato.training.loss.validation import Metrics
from sfumato.training.memory import MemorySetting, TrainingTask, drawing_memory, fake_base, step_memory
from sfumato.training.methods.full import make_inpainting, write_folder
from sfumato.training.methods.lcm import Distillation
from tests.pixels import difference
from tests.tiny import CPU

pytestmark = pytest.mark.usefixtures("quick")
SIDE = 64


@pytest.fixture(scope="session")
def inpainting_folder(pocket_folder, tmp_path_factory):
    """The tiny base widened, with random weights for what is new."""
    base = load_base(str(pocket_folder), precision=CPU)
    make_inpainting(base)
    new = base.unet.conv_in.weight.data[:, 4:]
    new.copy_(0.3 * torch.randn(new.shape, generator=torch.Generator().manual_seed(0)))
    return write_folder(base, tmp_path_factory.mktemp("inpainting") / "model", torch.float32)


@pytest.fixture(scope="module")
def base(inpainting_folder):
    return load_base(str(inpainting_folder), precision=CPU)


def prepared(base, pictures, **options):
    examples = data.read_folder(pictures, caption_template="{caption}", mask=options.pop("mask", "none"))
    return data.prepare(examples, base, resolution=SIDE, **options)


@pytest.fixture(scope="module")
def dataset(base, pictures):
    return prepared(base, pictures, flip=True)


def hidden_in(batch):
    return batch.known[:, :1]


def test_a_sample_is_the_same_in_whichever_batch(dataset):
    whole = dataset.batch(3, 5, 4)
    assert torch.equal(torch.cat([dataset.batch(3, 5, 4, first, 2).known for first in (0, 2)]), whole.known)
    assert not torch.equal(whole.known, dataset.batch(3, 6, 4).known)
    assert not torch.equal(whole.known, dataset.batch(4, 5, 4).known)


def test_what_is_known_is_of_the_very_sample(base, dataset, pictures):
    """Mirrored as it is."""
    batch = dataset.batch(0, 2, 6)
    pixels = []
    for index, mirrored in zip(batch.indices, batch.variants, strict=True):
        picture = torch.from_numpy(np.array(Image.open(pictures / dataset.names[index]), dtype=np.float32) / 127.5 - 1)
        pixels.append(picture.permute(2, 0, 1).flip(-1) if mirrored else picture.permute(2, 0, 1))
    hidden = [InpaintingMasks().draw((SIDE, SIDE), None, 0, 2, place) for place in range(6)]
    assert {0, 1} == set(batch.variants)
    assert_close(batch.known, base.known(torch.stack(pixels).contiguous(), torch.stack(hidden)), atol=1e-5, rtol=1e-4)


def test_the_share_of_wholes_and_masks_of_their_own(base, pictures, tmp_path):
    for name in ("red-square", "gold-square"):
        Image.open(pictures / f"{name}.png").save(tmp_path / f"{name}.png")
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((16, 16, 31, 47), fill=255)
    mask.save(tmp_path / "red-square.mask.png")
    whole = prepared(base, tmp_path, mask="files", inpaint_whole_share=1.0)
    assert all(hidden_in(whole.batch(0, step, 4)).all() for step in range(5))
    partly = prepared(base, tmp_path, mask="files", inpaint_whole_share=0.0)
    wanted = torch.zeros(1, 16, 16)
    wanted[:, 4:12, 4:8] = 1
    found = {0: [], 1: []}
    for step in range(30):
        batch = partly.batch(0, step, 4)
        for index, hidden in zip(batch.indices, hidden_in(batch), strict=True):
            found[index].append(torch.equal(hidden, wanted))
    masked, plain = partly.names.index("red-square.png"), partly.names.index("gold-square.png")
    assert 0.25 < sum(found[masked]) / len(found[masked]) < 0.75
    assert not any(found[plain])


def test_a_cache_keeps_the_pixels_and_is_not_that_of_other_bases(base, pocket_folder, pictures, dataset, tmp_path):
    plain = load_base(str(pocket_folder), precision=CPU)
    assert prepared(plain, pictures, flip=True, cache=tmp_path).batch(3, 5, 4).known is None
    for _ in range(2):  # written, and found
        batch = prepared(base, pictures, flip=True, cache=tmp_path).batch(3, 5, 4)
        assert torch.equal(batch.known, dataset.batch(3, 5, 4).known)
        assert torch.equal(batch.latents, dataset.batch(3, 5, 4).latents)
    assert len(list((tmp_path / "latents").rglob("*.safetensors"))) == 2 * len(dataset)


def test_other_bases_find_in_a_cache_what_was_there_before(monkeypatch):
    """The names of their entries do not tell that no pixels are kept, which was so when none were."""
    monkeypatch.setattr(planning, "cache_key", lambda **told: told)
    example = data.Example(Path("a.png"), "a", options=Options(resolution=SIDE))
    plain, keeping = (
        PreparationPlan({SIDE: [(SIDE, SIDE)]}, 8, False, "", "", keeps_pixels=kept) for kept in (False, True)
    )
    keys = [planning.latents_key(example, ["digest"], plan) for plan in (plain, keeping)]
    assert keys[0] | {"keeps_pixels": True} == keys[1]
    assert "keeps_pixels" not in keys[0]


def test_random_crops_are_hidden_where_they_are(base, pictures, tmp_path, monkeypatch):
    Image.open(pictures / "red-square.png").resize((100, 60)).save(tmp_path / "wide.png")
    early = prepared(base, tmp_path, crop="random", buckets=False)
    monkeypatch.setattr("sfumato.data.preparation.planning.MOST_VARIANTS", 0)
    late = prepared(base, tmp_path, crop="random", buckets=False)
    for step in range(3):
        one, other = early.batch(0, step, 2), late.batch(0, step, 2)
        assert_close(one.known, other.known)
        assert_close(one.latents, other.latents, atol=1e-5, rtol=1e-4)


def test_the_loss_is_that_of_the_unet_on_what_diffusers_scripts_give_it(base, dataset):
    """E |v - v_hat([x_t, mask, masked latents], t, c)|^2, as in train_dreambooth_inpaint.py."""
    noised = draw_noised(base, dataset, 3, MicroBatch(5, 4, 0, 4))
    batch = noised.batch
    with torch.no_grad():
        ours = per_sample_losses(base, [noised], encode=False)
        noisy = base.scheduler.add_noise(batch.latents, noised.noise, noised.timesteps)
        seen = torch.cat([noisy, batch.known], dim=1)
        prediction = base.unet(seen, noised.timesteps, batch.text.hidden).sample
    alpha_bar = base.alpha_bar[noised.timesteps]
    wanted = diffusion.prediction_target("v_prediction", batch.latents, noised.noise, alpha_bar)
    assert_close(ours, (prediction - wanted).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


@pytest.fixture
def told(monkeypatch):
    """What each call of a base was told of the pictures."""
    predict, told = Base.predict, []

    def listening(self, latents, timesteps, text, added=None, known=None):
        told.append(known)
        return predict(self, latents, timesteps, text, added, known)

    monkeypatch.setattr(Base, "predict", listening)
    return told


def test_a_distillation_shows_teacher_and_student_the_same(base, dataset, told):
    distillation = Distillation(base, dataset, guidance=2.0, solver_steps=50, pristine=nullcontext)
    noisy = distillation.draw(0, MicroBatch(0, 4, 0, 4))
    with torch.no_grad():
        distillation.errors(noisy)
    assert len(told) == 4  # the teacher with and without the prompt, and the student at both ends
    assert all(torch.equal(known, noisy.batch.known) for known in told)


def test_fit_is_measured_with_holes_and_drift_by_the_prompt_alone(base, dataset, told):
    metrics = Metrics(base, dataset, {"drift": ["a cat"]})
    assert told == [None]
    fit = metrics.fit()
    assert 0 < told[-1][:, :1].mean() < 1
    assert fit == Metrics(base, dataset, {}).fit()
    layer = base.unet.conv_in.weight
    before = layer.data.clone()
    try:
        layer.data[:, 5:] += 0.5 * torch.randn(layer[:, 5:].shape, generator=torch.Generator().manual_seed(1))
        changed = metrics.fit(), metrics.drift()
    finally:
        layer.data = before
    assert changed[0] != fit
    assert metrics.drift() == 0


def write_words(folder, pictures, output, *more):
    words = ["--images", pictures, "--output", output, "--base", folder, "--caption", "{caption}", "--batch", 2]
    words += ["--steps", 3, "--sample-every", 0, "--measure-every", 0, "--precision", "fp32"]
    return [*map(str, words), *map(str, more)]


def test_an_adapter_draws_in_diffusers_inpainting_pipeline_as_here(inpainting_folder, base, pictures, tmp_path):
    words = write_words(inpainting_folder, pictures, tmp_path / "run", "--learning-rate", "0.1", "--seed", 1)
    assert cli.main(["train", "lora", "--learn", "plain", *words]) == 0
    file = tmp_path / "run/run.safetensors"
    card = (tmp_path / "run/README.md").read_text()
    assert re.search(
        r"# image, mask: PIL images.*\n.*\nimage = pipe\('.*', image=image, mask_image=mask, num_inf", card
    )
    image, mask = Image.new("RGB", (SIDE, SIDE), "white"), Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((16, 16, 47, 47), fill=255)
    told = {"num_inference_steps": 3, "strength": 1.0, "width": SIDE, "height": SIDE}
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(inpainting_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    def theirs():
        generator = torch.Generator().manual_seed(7)
        made = pipe("a cat", image=image, mask_image=mask, generator=generator, guidance_scale=3.0, **told).images[0]
        return Image.composite(made, image, mask)

    plain = theirs()
    pipe.load_lora_weights(str(file))
    pipeline = base.pipeline("ddim")
    mix = compose(pipeline, Adapter(str(file)))
    settings = {"steps": 3, "guidance": 3.0, "width": SIDE, "height": SIDE}
    (ours,) = draw(pipeline, "a cat", 7, start=Start(image, 1.0, mask), **settings)
    mix.undo()
    assert difference(ours, theirs()) <= 1
    assert difference(ours, plain) > 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


ON_BASES = {case.split()[0]: case for case in reversed(CASES)}
ON_BASES = [case for name, case in ON_BASES.items() if name != "pretrain"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ON_BASES, "dreambooth fused, prior", "lora accumulated, averaged, dropped out"])
def test_every_trainer_learns_and_resumes_to_the_bit(case, inputs, inpainting_folder, tmp_path):
    plain = inputs["slider"][1]  # where the tiny base is
    own = {
        name: [str(inpainting_folder) if word == plain else word for word in words] for name, words in inputs.items()
    }
    words = [command(case, own, tmp_path / name) for name in ("whole", "killed")]
    log = tmp_path / "log"
    assert run(words[0], log=log) == 0, log.read_text()
    assert run(words[1], log=log, kill_at=3) == -9, log.read_text()
    assert run(["resume", str(tmp_path / "killed")], log=log) == 0, log.read_text()
    expected, found = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_base_that_is_made_one_predicts_as_before_until_it_has_learned(pocket_folder, pictures):
    base, plain = (load_base(str(pocket_folder), precision=CPU) for _ in range(2))
    noisy, timesteps = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([900, 10])
    text = plain.encode_text(["a cat", "a dog"])
    with torch.no_grad():
        before = plain.predict(noisy, timesteps, text)
        make_inpainting(base)
        assert base.inpaints
        known = base.known(torch.rand(2, 3, SIDE, SIDE), torch.zeros(2, 1, SIDE, SIDE))
        assert_close(base.predict(noisy, timesteps, text, known=known), before)
    with pytest.raises(ConfigError, match="is an inpainting model already"):
        make_inpainting(base)


def test_finetune_makes_an_inpainting_model(pocket_folder, pictures, tmp_path, monkeypatch):
    words = write_words(pocket_folder, pictures, tmp_path / "run", "--inpainting", "--learning-rate", "1e-3")
    assert cli.main(["train", "finetune", *words]) == 0
    folder = tmp_path / "run/run"
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    (card,) = re.findall(r"```python\n(.*?)```", (tmp_path / "run/README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "run")
    told = {"image": Image.new("RGB", (SIDE, SIDE)), "mask": Image.new("L", (SIDE, SIDE), "white")}
    exec(compile(card, "README.md", "exec"), told)
    assert difference(told["image"], Image.new("RGB", (SIDE, SIDE))) > 10
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert pipe.unet.config.in_channels == 9
    assert (pipe.unet.conv_in.weight[:, 4:].abs().amax((0, 2, 3)) > 1e-4).all()
    assert load_base(str(folder), precision=CPU).inpaints
    again = ["resume", str(tmp_path / "run"), "--steps", "5", "--force"]
    assert cli.main(again) == 0


@pytest.mark.parametrize(
    ("program", "more", "message"),
    [
        ("lora", ["--inpaint-whole-share", "0.5"], "--inpaint-whole-share 0.5: is for an inpainting base, and"),
        ("lora", ["--inpaint-whole-share", "1.5"], "inpaint-whole-share is 1.5; it must be 0 to 1."),
        ("finetune", ["--inpainting", "--save", "difference"], "--inpainting with --save difference: the base has no"),
    ],
)
def test_what_makes_no_sense_is_one_line(program, more, message, pocket_folder, pictures, tmp_path, capsys):
    assert cli.main(["train", program, *write_words(pocket_folder, pictures, tmp_path / "run", *more)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_generate_fills_a_mask_whole_unless_told_otherwise(inpainting_folder, base, tmp_path):
    Image.new("RGB", (SIDE, SIDE), "white").save(tmp_path / "image.png")
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((16, 16, 47, 47), fill=255)
    mask.save(tmp_path / "mask.png")
    words = ["generate", "a cat", "--base", inpainting_folder, "--image", tmp_path / "image.png"]
    for name, more in {"masked": ["--mask", tmp_path / "mask.png"], "plain": []}.items():
        assert cli.main([str(word) for word in (*words, *more, "-o", tmp_path / f"{name}.png")]) == 0
    strengths = [Image.open(tmp_path / f"{name}.png").text["parameters"] for name in ("masked", "plain")]
    assert ["Denoising strength: 1" in each for each in strengths] == [True, False]
    assert "Denoising strength: 0.6" in strengths[1]


def test_memory_counts_the_vae_that_stays(inpainting_folder, pocket_folder):
    setting = MemorySetting("cpu", forecast_precision("fp32", "cpu", adapting=True), SIDE, 1, 2)
    own, plain = (fake_base(str(folder), "cpu") for folder in (inpainting_folder, pocket_folder))
    inputs = 4 * own.unet.conv_in.weight[:, 4:].numel()
    vae = 4 * sum(p.numel() for p in own.vae.parameters())
    way = TrainingTask("", "lora")
    assert step_memory(own, way, setting).weights == step_memory(plain, way, setting).weights + inputs + vae
    assert drawing_memory(own, setting) >= drawing_memory(plain, setting) + inputs


def test_a_dry_run_shows_what_is_hidden(inpainting_folder, pictures, tmp_path):
    def sheet(share):
        words = write_words(inpainting_folder, pictures, tmp_path / "run", "--inpaint-whole-share", share, "--dry-run")
        assert cli.main(["train", "lora", "--learn", "plain", *words]) == 0
        return np.asarray(Image.open(tmp_path / "run.dry-run.png").convert("RGB"), dtype=int)

    whole, partly = sheet(1), sheet(0)
    assert whole.shape == partly.shape
    assert np.ptp(partly, axis=2).mean() > 1.1 * np.ptp(whole, axis=2).mean()  # grey takes from the colours
