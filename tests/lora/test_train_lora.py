"""The LoRA trainer: equal to a plain loop with peft, the same result every time, in every family."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from bench.runs_resume import run
from sfumato import cli, data
from sfumato.files import read_header, read_lora, read_tensors
from sfumato.models import diffusion, load_base
from sfumato.precision import decide
from sfumato.training.loss.objective import draw_noise
from sfumato.training.loss.prior import class_seed
from sfumato.utils import randomness
from tests.in_peft import layers_of_peft
from tests.logged import log_beside
from tests.tiny import CPU, tiny_pipeline, write_single_file

pytestmark = pytest.mark.usefixtures("quick")
ROOT = cli.source("sfumato.trainers.lora").parents[1]
DROPPED = ("--train-text-encoder", "--caption-dropout", "0.6", "--caption", "<x> {caption}", "--train-words", "<x>")


@pytest.mark.parametrize(
    ("prompts", "among", "huber", "perturbation", "ratio"),
    [
        ((), range(1000), None, 0, 1),
        (("cat", "a red house"), range(200, 900), None, 0, 1),
        (("cat", "a red house"), range(1000), 0.2, 0.3, 4),
    ],
)
def test_equal_to_a_plain_loop_with_peft(prompts, among, huber, perturbation, ratio, train, pocket_folder, pictures):
    """Same start, noise, timesteps and batches: the losses and the delta of peft's layers under torch's AdamW; and with
    the prior of Li & Hoiem 2017, |unet(x_t', t', c_pr; W + B A) - unet(x_t', t', c_pr; W)|^2 for the same pictures, at
    some of the timesteps alone. And with sd-scripts' Huber loss, a perturbed input, and LoRA+."""
    prior = [word for prompt in prompts for word in ("--prior-prompts", prompt)]
    weighted = [*prior, "--prior-weight", "0.7"] if prior else []
    options = ["--precision", "fp32", "--schedule", "constant", "--clip", "0.5", "--min-snr", "5", "--seed", "3"]
    options += ["--noise-offset", "0.2", "--warmup", "2", "--weight-decay", "0.1"]
    ends = ["--min-timestep", str(among.start), "--max-timestep", str(among.stop)] if among != range(1000) else []
    others = {"--huber": huber, "--input-perturbation": perturbation, "--loraplus-ratio": ratio}
    further = [word for option, value in others.items() for word in (option, str(value))] if huber else []
    path = train("run", *options, *weighted, *ends, *further)

    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    dataset = data.prepare(data.read_folder(pictures, caption_template="{caption}"), base, resolution=64)
    frozen = copy.deepcopy(base.unet)
    layers = layers_of_peft(base.unet, "cross-attention", seed=3)
    parameters = [p for p in base.unet.parameters() if p.requires_grad]
    sides = [[p for name, p in base.unet.named_parameters() if f"lora_{side}" in name] for side in "AB"]
    optimizer = torch.optim.AdamW([{"params": side} for side in sides], betas=(0.9, 0.99), weight_decay=0.1)
    losses = []

    def error(step, seed, text, asked=None):
        """min(SNR, 5)-weighted, of what `asked` predicts or of noise or v; the pictures are those of seed 3."""
        batch = dataset.batch(3, step, 2)
        shape = tuple(batch.latents.shape[1:])
        noise = torch.stack([randomness.normal(shape, seed, "noise", step, i) for i in range(2)])
        noise += 0.2 * torch.stack([randomness.normal((4, 1, 1), seed, "noise offset", step, i) for i in range(2)])
        timesteps = diffusion.stratified_timesteps(2, among, seed, step)
        a = base.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        further = torch.stack([randomness.normal(shape, seed, "input perturbation", step, i) for i in range(2)])
        noisy = base.scheduler.add_noise(batch.latents, noise + perturbation * further, timesteps)
        text = batch.text.hidden if text is None else text
        prediction = base.unet(noisy, timesteps, text).sample
        snr = (a / (1 - a)).flatten()
        if base.prediction_type == "v_prediction":
            wanted, weight = base.scheduler.get_velocity(batch.latents, noise, timesteps), snr.clamp(max=5) / (snr + 1)
        else:
            wanted, weight = noise, snr.clamp(max=5) / snr
        if asked:
            wanted = asked(noisy, timesteps, text).sample.detach()
        squares = (prediction - wanted).square()
        if huber:
            c = (1 - huber) / (1 + ((1 - a) / a) ** 0.5) ** 2 + huber
            squares = 2 * c * ((squares + c**2).sqrt() - c)
        return (squares.mean((1, 2, 3)) * weight).mean()

    for step in range(4):
        loss = error(step, 3, None)
        if prompts:
            loss = loss + 0.7 * error(step, class_seed(3), base.encode_text(prompts).hidden, frozen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for group, times in zip(optimizer.param_groups, (1, ratio), strict=True):
            group["lr"] = times * 1e-2 * (0.5 if step == 0 else 1)  # two steps of warm-up
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert_close([row["loss"] for row in log_beside(path)], losses, rtol=1e-4, atol=1e-6)
    for (_, name), module in read_lora(path).modules.items():
        wanted = layers[name].get_delta_weight("default").detach()
        # Of the whole: a number with almost no gradient goes where rounding tells AdamW's first steps to.
        assert (module.delta() - wanted).norm() <= 1e-3 * wanted.norm(), name


def test_the_same_command_twice_gives_equal_tensors_and_equal_files(train, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    options = ("--steps", "2", "--sample-every", "2")
    first = train("run", *options).read_bytes()
    second = train("run", *options, "--overwrite").read_bytes()
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize(
    "further", [(), pytest.param(("--train-text-encoder", "--sample-every", "4"), marks=pytest.mark.slow)]
)
def test_bf16_on_a_cpu_learns_nearly_the_same(train, further):
    """The adapter stays fp32 beside half-precision weights; its losses differ from fp32's by rounding and no more.
    What is drawn and measured meanwhile calls the text encoder outside autocast."""
    exact = train("exact", "--precision", "fp32", *further)
    rounded = train("rounded", "--precision", "bf16", *further)
    losses = [[row["loss"] for row in log_beside(path)] for path in (exact, rounded)]
    assert losses[0] != losses[1]
    assert_close(losses[1], losses[0], rtol=0.05, atol=0)
    assert {info.dtype for info in read_header(rounded).tensors.values()} == {"F32"}


def test_another_seed_gives_another_adapter(train):
    """It begins elsewhere, and with other noise, at which the base errs otherwise before the first step."""
    one, other = train("a", "--steps", "1"), train("b", "--steps", "1", "--seed", "1")
    downs = [key for key in read_tensors(one) if key.endswith("lora_down.weight")]
    assert not any(torch.equal(read_tensors(one)[key], read_tensors(other)[key]) for key in downs)
    assert log_beside(one)[0]["loss"] != log_beside(other)[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "further",
    [
        ("--dropout", "0.5", "--prior-prompts", "cat", "--train-text-encoder"),
        ("--rank-dropout", "0.2", "--module-dropout", "0.4", "--prior-prompts", "cat", "--train-text-encoder"),
        pytest.param(("--crossed-share", "0.5"), marks=pytest.mark.slow),
    ],
)
def test_accumulating_two_batches_is_one_batch_of_twice_the_size(further, train):
    exact = ["--precision", "fp32", *further]
    whole, parts = train("whole", *exact, "--batch", "4"), train("parts", *exact, "--batch", "2", "--accumulate", "2")
    for key, tensor in read_tensors(whole).items():
        # Adam makes a step of a gradient that is nearly 0, whose sign is rounding.
        assert_close(tensor, read_tensors(parts)[key], rtol=1e-3, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "further",
    [
        ("--crossed-share", "0.5", "--caption", "{caption}"),
        DROPPED,
        ("--dropout", "0.3", "--caption", "{caption}"),
        ("--rank-dropout", "0.4", "--module-dropout", "0.4", "--caption", "{caption}"),
    ],
)
def test_two_processes_give_the_result_of_one(further, train, pocket_folder, pictures, tmp_path):
    """`accelerate launch trainers/lora.py`, two CPU processes: one global batch of 4, to fp32 tolerance."""
    one = train("one", "--batch", "4", "--precision", "fp32", *further)
    words = ["--images", str(pictures), "--output", str(tmp_path / "two"), "--base", str(pocket_folder)]
    words += ["--learn", "plain", "--steps", "4", "--batch", "2", "--rank", "2", "--learning-rate", "1e-2"]
    words += ["--sample-every", "0", "--measure-every", "0", "--precision", "fp32", *further]
    log = tmp_path / "log"
    if further == DROPPED:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command += ["--num_processes", "2", "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "trainers/lora.py"), *words]
        # accelerate's own --cpu starts a single process where there is no MPI
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        with log.open("w") as said:
            code = subprocess.run(command, stdout=said, stderr=said, env=environment, timeout=300).returncode
    else:  # the same processes, which load torch once
        code = run(["train", "lora", *words], log=log, processes=2)
    assert code == 0, log.read_text()[-2000:]
    two = read_tensors(tmp_path / "two" / "two.safetensors")
    assert read_header(tmp_path / "two" / "two.safetensors").metadata["ss_total_batch_size"] == "4"
    # AdamW blows rounding up where a gradient is almost 0, as of a caption's words in a batch of dropped ones.
    for key, tensor in read_tensors(one).items():
        assert_close(two[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.slow) for family in ("sd1", "sd2", "sdxl")])
def test_every_family_trains_from_a_single_file_text_encoders_and_all(family, train, tmp_path):
    path = write_single_file(
        tiny_pipeline(family, shallow=True, whole_vocabulary=True), tmp_path / f"{family}.safetensors"
    )
    options = ["--train-text-encoder", "--resolution", "64", "--targets", "everything", "--steps", "1"]
    if family == "sd2":
        options += ["--prediction-type", "epsilon"]
    adapter = train(family, *options, base=path)
    read = read_lora(adapter)
    parts = {part for part, _ in read.modules}
    assert parts == {"unet", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    assert read.family == family
    assert any(module.up.abs().sum() > 0 for (part, _), module in read.modules.items() if part != "unet")


def test_a_folder_of_sdxl_trains_with_cached_text(train, family_folder):
    adapter = train("run", "--resolution", "64", "--steps", "1", base=family_folder("sdxl"))
    assert read_lora(adapter).family == "sdxl"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--train-text-encoder",),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("--caption", "<x>", "--train-words", "<x>"), marks=pytest.mark.slow),
    ],
)
def test_with_a_prior_other_prompts_move_less(options, train):
    def drift(name, *more):
        rising = log_beside(train(name, "--steps", "8", "--measure-every", "8", *options, *more))
        return [row["drift"] for row in rising if "drift" in row][-1]

    held = ("--prior-prompts", "a ball", "--prior-prompts", "a dog", "--prior-weight", "5")
    assert drift("held", *held) < 0.9 * drift("free")


@pytest.mark.slow
def test_the_priors_samples_take_half_of_the_default_batch(pocket_folder, pictures, tmp_path, capsys):
    words = ["--images", str(pictures), "--output", str(tmp_path / "run"), "--base", str(pocket_folder), "--steps", "1"]
    words += ["--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "0"]
    assert (
        cli.main(["train", "lora", "--learn", "plain", *words, "--caption", "{caption}", "--prior-prompts", "a cat"])
        == 0
    )
    assert "batch 4," in capsys.readouterr().err
    assert cli.main(["train", "lora", "--learn", "plain", *words, "--caption", "{caption}", "--overwrite"]) == 0
    assert "batch 8," in capsys.readouterr().err


@pytest.mark.slow
def test_drift_starts_at_nothing_and_grows(train):
    drifts = [row["drift"] for row in log_beside(train("run", "--measure-every", "2")) if "drift" in row]
    assert drifts[0] == 0
    assert len(drifts) == 3
    assert drifts[-1] > 0


@pytest.mark.slow
def test_measuring_and_drawing_do_not_change_the_training(train):
    quiet, watched = train("quiet"), train("watched", "--measure-every", "1", "--sample-every", "2")
    for key, tensor in read_tensors(quiet).items():
        assert torch.equal(tensor, read_tensors(watched)[key])


@pytest.mark.slow
def test_the_mean_of_the_weights_is_what_is_saved(train):
    """m <- d m + (1 - d) w from m = the start, so the saved `up` lies between start and end; d is 1/10 at first."""
    plain, mean = read_tensors(train("plain")), read_tensors(train("mean", "--ema", "0.5"))
    ups = [key for key in plain if key.endswith("lora_up.weight")]
    assert sum(mean[key].norm() for key in ups) < sum(plain[key].norm() for key in ups)
    one = read_tensors(train("one", "--steps", "1", "--ema", "0.75"))
    whole = read_tensors(train("wholly", "--steps", "1"))
    for key in ups:
        assert_close(one[key], 0.9 * whole[key])


def test_a_mask_keeps_what_is_outside_out_of_the_loss(train, pocket_folder, pictures, tmp_path):
    """Of masks that show a corner, the loss is the mean square error of that corner's latents alone."""
    images = shutil.copytree(pictures, tmp_path / "masked")
    for file in list(images.glob("*.png")):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (0, 0, 16, 32))
        mask.save(images / f"{file.stem}.mask.png")
    (row,) = log_beside(train("run", "--images", str(images), "--mask", "files", "--steps", "1", "--precision", "fp32"))

    base = load_base(str(pocket_folder), precision=CPU)
    batch = data.prepare(data.read_folder(pictures, caption_template="{caption}"), base, resolution=64).batch(0, 0, 2)
    noise, timesteps = draw_noise(batch, 0, 0, 0), diffusion.stratified_timesteps(2, range(1000), 0, 0)
    with torch.no_grad():
        noisy = base.scheduler.add_noise(batch.latents, noise, timesteps)
        prediction = base.unet(noisy, timesteps, batch.text.hidden).sample
    errors = (prediction - base.scheduler.get_velocity(batch.latents, noise, timesteps)).square()
    assert row["loss"] == pytest.approx(errors[..., :8, :4].mean().item(), rel=1e-4)
    assert row["loss"] != pytest.approx(errors.mean().item(), rel=1e-2)


def test_prodigy_finds_one_step_for_text_encoders_and_words_too(train):
    options = ("--learning-rate", "1", "--train-text-encoder", "--caption", "<x>", "--train-words", "<x>")
    path = train("run", "--optimizer", "prodigy", *options)
    assert len(log_beside(path)) == 4
    config = json.loads(read_header(path).metadata["sfumato.config"])
    assert config["text_learning_rate"] == config["word_learning_rate"] == 1.0
