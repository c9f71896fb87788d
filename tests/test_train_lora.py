"""The LoRA trainer: equal to a plain loop with peft, the same result every time, files that diffusers draws from."""

import copy
import dataclasses
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from bench.runs_resume import run
from sfumato import cli, data, diffusion, randomness
from sfumato.bases import load_base
from sfumato.bases.family import FAMILIES
from sfumato.drawing.pictures import draw
from sfumato.errors import ConfigError
from sfumato.files import Description, describe, read_header, read_lora, read_tensors, write_lora, write_tensors
from sfumato.precision import decide
from sfumato.runs.samples import Samples
from sfumato.training.objective import draw_noise
from sfumato.training.prior import class_seed
from tests.in_peft import layers_of_peft
from tests.logged import log_beside
from tests.tiny import CPU, tiny_pipeline, write_single_file

pytestmark = pytest.mark.usefixtures("quick")
ROOT = cli.source("sfumato.trainers.lora").parents[1]
DROPPED = ("--train-text-encoder", "--caption-dropout", "0.6", "--caption", "<x> {caption}", "--train-words", "<x>")


@pytest.fixture
def train(pocket_folder, pictures, tmp_path):
    """Train with these options on the tiny base; returns the adapter's path."""

    def run(name="run", *options, base=pocket_folder):
        words = {"--images": str(pictures), "--output": str(tmp_path / name), "--base": str(base)}
        words |= {"--caption": "{caption}", "--steps": "4", "--batch": "2", "--rank": "2", "--learning-rate": "1e-2"}
        words |= {"--sample-every": "0", "--measure-every": "0", "--checkpoint-every": "0"}
        given = list(options)
        known = ("--train-text-encoder", "--overwrite", "--gradient-checkpointing", "--own-negative")
        flags = [given.pop(given.index(flag)) for flag in known if flag in given]
        unsaid = [word for pair in words.items() if pair[0] not in given for word in pair]
        assert cli.main(["train", "lora", *unsaid, *given, *flags]) == 0
        return tmp_path / name / f"{name}.safetensors"

    return run


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
def test_crossed_samples_are_the_same_on_every_run_and_do_something(train, pictures, tmp_path):
    images = tmp_path / "two"  # each is drawn over
    images.mkdir()
    for name in ("red-square.png", "gold-square.png"):
        shutil.copy(pictures / name, images)
    plain = ("--steps", "2", "--images", str(images))
    crossed = (*plain, "--crossed-share", "1", "--flip")
    one, two, three = (
        read_tensors(train(name, *words)) for name, words in {"a": crossed, "b": crossed, "c": plain}.items()
    )
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    assert any(not torch.equal(tensor, three[key]) for key, tensor in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--dropout", "--rank-dropout", "--module-dropout"])
def test_dropout_is_the_same_on_every_run_and_does_something(option, train):
    first = train("a", "--steps", "2", option, "0.5")
    torch.manual_seed(123)
    second, without = train("b", "--steps", "2", option, "0.5"), train("c", "--steps", "2")
    one, two, three = (read_tensors(path) for path in (first, second, without))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    assert any(not torch.equal(tensor, three[key]) for key, tensor in one.items())


@pytest.mark.parametrize(
    "optimizer", ["adamw", *(pytest.param(each, marks=pytest.mark.slow) for each in ("adafactor", "muon"))]
)
def test_what_module_dropout_leaves_out_of_a_step_stays_as_it_is(optimizer, train):
    """Weight decay moves it no more than a gradient does; the first step changes all that is left."""
    shared = ("--steps", "1", "--optimizer", optimizer, "--weight-decay", "0.5")
    plain = read_lora(train("plain", *shared)).modules
    found = read_lora(train("run", *shared, "--module-dropout", "0.5")).modules
    out = {(part, path) for part, path in found if randomness.uniform(0, f"module dropout/{part}/{path}", 0) < 0.5}
    assert 0 < len(out) < len(found)
    assert {key for key, module in found.items() if not module.up.any()} == out
    start = read_lora(train("start", *shared[:4], "--learning-rate", "1e-30")).modules
    assert all(torch.equal(module.down, start[key].down) == (key in out) for key, module in found.items())
    assert not any(torch.equal(module.down, start[key].down) for key, module in plain.items())


def test_samples_and_measures_are_of_the_whole_adapter(train):
    """What is dropped is dropped of a step alone: an adapter that goes on is measured as it was left."""
    first = train("first", "--measure-every", "4")
    dropped = ("--dropout", "0.9", "--rank-dropout", "0.9", "--module-dropout", "0.9")
    second = train("second", "--init-from", str(first), "--measure-every", "4", *dropped)
    fits = [[row["fit"] for row in log_beside(path) if "fit" in row] for path in (first, second)]
    assert_close(fits[1][0], fits[0][-1], rtol=1e-6, atol=0)
    assert fits[0][0] != fits[0][-1]


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
@pytest.mark.parametrize("dropout", [("--dropout", "0.5"), ("--rank-dropout", "0.5", "--module-dropout", "0.5")])
def test_what_is_dropped_is_the_same_where_activations_are_computed_twice(dropout, train):
    once, twice = train("once", *dropout), train("twice", *dropout, "--gradient-checkpointing")
    for key, tensor in read_tensors(once).items():
        assert_close(tensor, read_tensors(twice)[key], rtol=1e-3, atol=1e-6)


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
    words += ["--steps", "4", "--batch", "2", "--rank", "2", "--learning-rate", "1e-2"]
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


def test_plain_diffusers_draws_the_same_picture(train, pocket_folder):
    """`pipe.load_lora_weights(file)` and nothing else: our mix to 1/255 a pixel, and not the base's picture."""
    from diffusers import StableDiffusionPipeline

    from sfumato import Adapter, compose

    path = train("run", "--learning-rate", "0.1")
    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    options = {"steps": 4, "guidance": 3.0, "width": 64, "height": 64, "sampler": "ddim"}
    without = np.asarray(draw(base, "red square", 5, **options)[0], dtype=int)
    with compose(base, Adapter(path)):
        ours = np.asarray(draw(base, "red square", 5, **options)[0], dtype=int)
    pipe = StableDiffusionPipeline.from_pretrained(pocket_folder, safety_checker=None)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    theirs = pipe(
        "red square",
        num_inference_steps=4,
        guidance_scale=3.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert abs(np.asarray(theirs, dtype=int) - ours).max() <= 1
    assert abs(without - ours).max() > 5


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
def test_the_config_of_a_run_runs_again(train, tmp_path):
    first = train("run", "--seed", "5", "--steps", "2")
    assert cli.main(["train", "lora", str(tmp_path / "run/config.toml"), "--output", str(tmp_path / "again")]) == 0
    again = read_tensors(tmp_path / "again" / "run.safetensors")
    for key, tensor in read_tensors(first).items():
        assert torch.equal(tensor, again[key])


def run_here(file, words, monkeypatch):
    """As a script does, without the seconds that a process of its own takes to import torch."""
    monkeypatch.setattr(sys, "argv", [str(file), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 0


def run_elsewhere(file, words, monkeypatch):
    done = subprocess.run([sys.executable, str(file), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("run", [run_here, pytest.param(run_elsewhere, marks=pytest.mark.slow)])
def test_a_copy_of_the_program_runs(run, pocket_folder, pictures, tmp_path, monkeypatch):
    assert cli.main(["cp", "lora", str(tmp_path / "mine.py")]) == 0
    words = ["--images", str(pictures), "--base", str(pocket_folder), "--output", str(tmp_path / "run")]
    words += ["--caption", "{caption}", "--steps", "1", "--sample-every", "0", "--measure-every", "0"]
    run(tmp_path / "mine.py", words, monkeypatch)
    assert (tmp_path / "run/run.safetensors").is_file()


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
    assert cli.main(["train", "lora", *words, "--caption", "{caption}", "--prior-prompts", "a cat"]) == 0
    assert "batch 4," in capsys.readouterr().err
    assert cli.main(["train", "lora", *words, "--caption", "{caption}", "--overwrite"]) == 0
    assert "batch 8," in capsys.readouterr().err


@pytest.mark.slow
def test_a_copys_training_is_not_gone_on_with_by_another_program(
    pocket_folder, pictures, tmp_path, monkeypatch, capsys
):
    assert cli.main(["cp", "lora", str(tmp_path / "mine.py")]) == 0
    words = ["--images", str(pictures), "--base", str(pocket_folder), "--output", str(tmp_path / "run")]
    words += ["--caption", "{caption}", "--rank", "1", "--steps", "2", "--checkpoint-every", "1"]
    run_here(tmp_path / "mine.py", [*words, "--sample-every", "0", "--measure-every", "0"], monkeypatch)
    capsys.readouterr()
    assert cli.main(["resume", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"its program is {tmp_path / 'mine.py'}" in said
    shown = shlex.split(said.partition("Go on with: python ")[2])
    assert cli.main(["train", "lora", *shown[1:]]) == 2
    assert f"program {tmp_path / 'mine.py'} -> its own" in capsys.readouterr().err
    run_here(shown[0], shown[1:], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("sdxl", "trained for SDXL, this base is pocket. Begin with an adapter of this family"),
        ("pocket", "other.safetensors: learned where the base predicts epsilon, and this one predicts v_prediction"),
    ],
)
def test_what_it_starts_from_was_learned_on_such_a_base(family, said, train, tmp_path, capsys):
    first, other = train("first"), tmp_path / "other.safetensors"
    modules = read_lora(first).modules
    write_lora(
        other,
        modules,
        family=family,
        metadata=describe(Description(title="other", family=family, prediction_type="epsilon")),
    )
    with pytest.raises(AssertionError) if family == "sdxl" else nullcontext():
        train("second", "--init-from", str(other), "--steps", "1")
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_starting_from_an_adapter_goes_on_where_it_stopped(train):
    first = train("first", "--measure-every", "4")
    second = train("second", "--init-from", str(first), "--measure-every", "4")
    fits = [[row["fit"] for row in log_beside(path) if "fit" in row] for path in (first, second)]
    assert_close(fits[1][0], fits[0][-1], rtol=1e-4, atol=0)
    assert fits[0][0] != fits[0][-1]


@pytest.mark.slow
def test_a_run_goes_on_without_the_adapter_that_it_started_from(train, capsys):
    """What it says about that one is in the run's folder, where another's would be found out."""
    first, other = train("first"), train("other", "--seed", "9")
    whole = train("second", "--init-from", str(first), "--checkpoint-every", "2")
    wanted = read_tensors(whole)
    shutil.rmtree(whole.parent / "checkpoints/000004")
    first.rename(first.with_name("moved.safetensors"))
    assert cli.main(["resume", str(whole.parent)]) == 0
    for name, tensor in read_tensors(whole).items():
        assert torch.equal(tensor, wanted[name]), name
    assert cli.main(["resume", str(whole.parent), "--init-from", str(first.with_name("moved.safetensors"))]) == 0
    capsys.readouterr()
    assert cli.main(["resume", str(whole.parent), "--init-from", str(other)]) == 2
    assert "was trained with other things than these: init " in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_with_a_tucker_core_is_started_from_without_it(train, tmp_path):
    options = ("--targets", r".*mid_block.*conv1")
    plain = train("plain", *options)
    core = {}
    for name, tensor in read_tensors(plain).items():
        if name.endswith("lora_down.weight"):
            rank, inner = tensor.shape[:2]
            core[name] = torch.ones(rank, inner, 1, 1)
            core[name.replace("lora_down", "lora_mid")] = torch.ones(rank, rank, 3, 3)
        else:
            core[name] = tensor
    tucker = write_tensors(tmp_path / "tucker.safetensors", core, dict(read_header(plain).metadata))
    started = train("started", *options, "--init-from", str(tucker), "--steps", "1", "--learning-rate", "1e-12")
    found = read_lora(started).modules
    for target, module in read_lora(tucker).modules.items():
        assert_close(found[target].delta(), module.delta(), rtol=1e-4, atol=1e-5)


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


def test_a_file_tells_of_its_training_as_sd_scripts_does(train, monkeypatch):
    """Of three processes, each of which has two batches of two pictures a step."""
    monkeypatch.setattr(Samples, "processes", 3)
    path = train("run", "--batch", "2", "--accumulate", "2", "--steps", "1", "--seed", "5", "--learning-rate", "2e-3")
    metadata = read_header(path).metadata
    assert metadata["ss_total_batch_size"] == "12"
    assert metadata["ss_steps"] == metadata["ss_max_train_steps"] == "1"
    assert metadata["ss_learning_rate"] == "0.002"
    assert metadata["ss_seed"] == "5"
    assert metadata["ss_num_train_images"] == "6"
    assert not metadata.keys() & {"ss_clip_skip", "modelspec.encoder_layer", "modelspec.timestep_range"}


def test_a_snapshot_tells_the_steps_of_its_training_and_what_it_learned_of(train):
    path = train("run", "--save-every", "1", "--steps", "2", "--clip-skip", "1", "--max-timestep", "600")
    metadata = read_header(path.parent / "adapters" / "run-step00000001.safetensors").metadata
    assert (metadata["ss_steps"], metadata["ss_max_train_steps"]) == ("1", "2")
    assert (metadata["ss_clip_skip"], metadata["modelspec.timestep_range"]) == ("2", "0,600")


@pytest.mark.usefixtures("plotted")
def test_the_run_folder_tells_everything_and_no_path(train, tmp_path, pictures, pocket_folder):
    path = train("run", "--trigger", "zwx", "--caption", "{caption} zwx", "--sample-every", "2",
                 "--measure-every", "2", "--over-steps", "0-0.8",
                 "--resolution", "32", "--own-negative")  # fmt: skip
    with Image.open(path.parent / "samples/000002/0.png") as sample:
        assert sample.size == (32, 32)
    names = {file.name for file in path.parent.iterdir()}
    assert {"config.toml", "log.jsonl", "plot.png", "samples.png", "README.md", "run.safetensors"} <= names
    metadata = read_header(path).metadata
    assert metadata["modelspec.trigger_phrase"] == "zwx"
    assert metadata["sfumato.over_steps"] == "0-0.8"
    assert metadata["sfumato.negatives"] == '["zwx"]'
    assert json.loads(metadata["sfumato.config"])["rank"] == 2
    base = load_base(pocket_folder, precision=CPU, unet=False)
    assert metadata["sfumato.base_fingerprint"] == base.adapted_fingerprint()
    text = json.dumps(dict(metadata)) + (path.parent / "README.md").read_text()
    assert str(tmp_path) not in text
    assert str(pictures) not in text
    assert "zwx" in (path.parent / "README.md").read_text()
    assert ", width=32, height=32, num_inference_steps=" in text  # as the samples
    assert " --size 32x32 --lora" in text
    steps = [row for row in log_beside(path) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "nowhere"], "nowhere"),
        (["--rank", "0"], "--rank is 0"),
        (["--rank", "65"], "--rank 65: the widest layer has 64 directions"),
        (["--conv-rank", "0"], "--conv-rank is 0"),
        (["--conv-alpha", "1"], "--conv-rank and --conv-alpha are for convolutions of more than 1x1, and none is"),
        (["--rank-of", "te=1"], "--rank-of te=1: names none of the"),
        (["--rank-of", "mid=65"], "--rank-of mid=65: the widest layer has 64 directions"),
        (["--rate-of", "mid"], "--rate-of 'mid': wanted PATTERN=FACTOR, such as up.1=0.5, or mid=0 to leave it out"),
        (
            ["--rate-of", "mid=0.5", "--optimizer", "prodigy"],
            "--rate-of mid=0.5 with --optimizer prodigy: it finds one",
        ),
        (["--learning-rate", "-1"], "--learning-rate is -1"),
        (["--dropout", "1"], "--dropout is 1"),
        (["--rank-dropout", "1"], "--rank-dropout is 1.0; it must be at least 0 and below 1"),
        (["--module-dropout", "-0.1"], "--module-dropout is -0.1; it must be at least 0 and below 1"),
        (
            ["--module-dropout", "0.1", "--targets", r"mid_block.*attn2\.to_q", "--rank", "2"],
            "--module-dropout 0.1: one layer is adapted, and it is never left out; leave the option out, or",
        ),
        (["--steps", "2", "--epochs", "2"], "--steps and --epochs"),
        (["--targets", "nothing"], "matches none"),
        (["--init-from", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--base", "nowhere/at-all.safetensors"], "at-all.safetensors"),
        (["--resolution", "4"], "--resolution 4"),
        (["--resolution", "1000000"], "--resolution 1000000: is the side of a square in pixels; wanted at most 8192"),
        (["--sample-prompts", "a --s 5000", "--sample-every", "1"], "--s 5000 in a prompt: 5000 steps"),
        (["--sample-prompts", "a --d -1", "--sample-every", "1"], "--d -1 in a prompt: seed -1"),
        (["--caption-dropout", "1", "--caption", "<x>", "--train-words", "<x>"], "--caption-dropout 1 drops the new"),
        (["--tag-dropout", "1", "--caption", "<x>", "--train-words", "<x>"], "--tag-dropout 1 drops the new word from"),
        (["--attention", "xformers"], "xformers"),
        (["--precision", "fp16", "--device", "cpu"], "fp16"),
        (["--warmup", "50"], "--warmup 50"),
        (["--min-timestep", "900", "--max-timestep", "300"], "--min-timestep 900, --max-timestep 300: the base's"),
        (["--max-timestep", "1001"], "a larger end of at most 1000"),
        (["--over-steps", "0.8"], "--over-steps 0.8: wanted START-END, progress from 0 to 1, such as 0-0.5"),
        (["--own-negative", "--no-overwrite"], "--own-negative: give the words of the subject by --trigger"),
        (
            ["--own-negative", "--no-overwrite", "--trigger", "zwx"],
            "--own-negative: no caption holds the trigger 'zwx'; pass --caption",
        ),
        (["--prior-weight", "2"], "--prior-weight is for what shall draw as before; name it with --prior-prompts, or"),
        (["--text-learning-rate", "1e-4"], "--text-learning-rate has no effect without --train-text-encoder"),
        (["--prior-prompts", "a cat", "--prior-weight", "-1"], "--prior-weight is -1"),
        (["--prior-prompts", "an <x>", "--caption", "<x>", "--train-words", "<x>"], "holds <x>"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_no_adapter(options, said, pocket_folder, pictures, tmp_path, capsys):
    words = {"--images": str(pictures), "--output": str(tmp_path / "run"), "--base": str(pocket_folder)}
    words |= {"--caption": "{caption}", "--steps": "2", "--sample-every": "0"}
    words |= dict(zip(options[::2], options[1::2], strict=True))
    capsys.readouterr()
    assert cli.main(["train", "lora", *(word for pair in words.items() for word in pair)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfumato: ")]
    assert len(error) == 1
    assert said in error[0]
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_a_run_without_a_checkpoint_does_not_go_on_without_what_it_began_from(train, capsys):
    first = train("first")
    run = train("second", "--init-from", str(first)).parent
    shutil.rmtree(run / "checkpoints")  # killed before its first
    (run / "second.safetensors").unlink()
    kept = first.rename(first.with_name("kept"))
    assert cli.main(["resume", str(run)]) == 2
    assert f"--init-from {first}: there is no such file; name the adapter to begin with." in capsys.readouterr().err
    kept.rename(first)
    assert cli.main(["resume", str(run)]) == 0


def test_prodigy_finds_one_step_for_text_encoders_and_words_too(train):
    options = ("--learning-rate", "1", "--train-text-encoder", "--caption", "<x>", "--train-words", "<x>")
    path = train("run", "--optimizer", "prodigy", *options)
    assert len(log_beside(path)) == 4
    config = json.loads(read_header(path).metadata["sfumato.config"])
    assert config["text_learning_rate"] == config["word_learning_rate"] == 1.0


def test_a_run_is_not_overwritten_unasked(train, pocket_folder, pictures, tmp_path, capsys):
    before = train("run").read_bytes()
    words = ["--images", str(pictures), "--output", str(tmp_path / "run"), "--base", str(pocket_folder)]
    assert cli.main(["train", "lora", *words, "--caption", "{caption}", "--steps", "1"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "run/run.safetensors").read_bytes() == before


def test_a_rank_stabilised_scale_is_1_at_the_familys_rank(tmp_path):
    """And falls with the root of the rank: its default rate is for a scale of 1, and any rank learns as fast."""
    from trainers.lora import Config, resolve

    family = FAMILIES["sd1"]
    base = SimpleNamespace(family=family, defaults=family.defaults, alpha_bar=range(1000))
    for rank, stabilised, alpha in ((None, True, 4), (64, True, 4), (64, False, 64)):
        config = Config(images=tmp_path, output=tmp_path, rank=rank, rank_stabilised=stabilised)
        assert resolve(config, base, data.ExampleSet(()), 1, kinds=1)[0].alpha == alpha


def test_unset_convolutions_have_the_rank_and_the_scale_of_the_other_layers(tmp_path):
    from trainers.lora import Config, resolve

    family = FAMILIES["sd1"]
    base = SimpleNamespace(family=family, defaults=family.defaults, alpha_bar=range(1000))
    for options, wanted in (
        ({}, (None, None)),
        ({"conv_rank": 4}, (4, 2.0)),
        ({"conv_alpha": 1.0}, (16, 1.0)),
        ({"conv_rank": 4, "rank_stabilised": True}, (4, 8.0)),
    ):
        config = Config(images=tmp_path, output=tmp_path, alpha=8.0, **options)
        config = resolve(config, base, data.ExampleSet(()), 1, kinds=1)[0]
        assert (config.conv_rank, config.conv_alpha) == wanted


@pytest.mark.slow
def test_convolutions_learn_within_their_own_rank(train, capsys):
    """With that of the others what is learned is the same to the bit. The file says it as sd-scripts does."""
    everything = ("--targets", r"mid_block.*(to_q|conv1|conv_shortcut|proj_in)$")
    plain, same = train("plain", *everything), train("same", *everything, "--conv-rank", "2")
    assert all(torch.equal(read_tensors(plain)[name], value) for name, value in read_tensors(same).items())
    path = train("own", *everything, "--conv-rank", "1", "--conv-alpha", "4", "--ema", "0.5")
    metadata = read_header(path).metadata
    assert metadata["ss_network_dim"] == "2"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "1", "conv_alpha": "2"}  # one alpha in a file
    ranks = {module.rank for (_, name), module in read_lora(path).modules.items() if name.endswith("conv1")}
    assert ranks == {1}
    assert "| conv_rank | 1 |\n| conv_alpha | 4.0 |" in (path.parent / "README.md").read_text()
    went_on = train("on", *everything, "--conv-rank", "1", "--init-from", str(path))
    assert read_header(went_on).metadata["ss_network_dim"] == "2"
    capsys.readouterr()
    with pytest.raises(AssertionError):
        train("refused", *everything, "--init-from", str(path))
    assert "Give the --rank, --conv-rank and --rank-of it was trained with" in capsys.readouterr().err


def test_a_crossing_of_no_sample_is_refused(tmp_path):
    """It would cost the base's drawings, and no step would see one."""
    from trainers.lora import Config, resolve

    family = FAMILIES["sd1"]
    base = SimpleNamespace(family=family, defaults=family.defaults, alpha_bar=range(1000))
    config = Config(images=tmp_path, output=tmp_path, crossed_share=0.5, max_timestep=301)
    assert resolve(config, base, data.ExampleSet(()), 1, kinds=1)
    with pytest.raises(ConfigError, match="samples are crossed from timestep 300 on, and --max-timestep 300 leaves"):
        resolve(dataclasses.replace(config, max_timestep=300), base, data.ExampleSet(()), 1, kinds=1)


def test_what_lies_beside_the_adapter_is_known_before_it_is_written(tmp_path):
    from trainers.lora import Config, written

    plain = Config(images=tmp_path, output=tmp_path, name="n")
    assert written(plain) == []
    words = dataclasses.replace(plain, train_words=("<otter>", "<hat>"), save_every=5)
    assert written(words) == ["adapters", "n-otter.safetensors", "n-hat.safetensors"]
    assert written(dataclasses.replace(words, bundle=True)) == ["adapters"]


def test_layers_have_ranks_and_rates_of_their_own(train, capsys):
    """A layer that is left out is not in the file, which says the rules and the ranks. One whose rate is a tenth has
    learned a tenth as much: AdamW's first step is as long as the rate."""
    rules = ("--rank-of", "to_k=0", "--rank-of", "mid=1", "--rate-of", "up=0.1", "--steps", "1", "--alpha", "4")
    path = train("run", *rules, "--weight-decay", "0", "--schedule", "constant", "--precision", "fp32", "--clip", "0")
    modules = read_lora(path).modules
    assert {name.split(".")[-1] for _, name in modules} == {"to_q", "to_v", "0"}
    assert {name.split("_")[0]: module.rank for (_, name), module in modules.items()} == {"down": 2, "mid": 1, "up": 2}
    for (_, name), module in modules.items():  # the scale is 2 in each; the file has one alpha, and the rest in B
        most = module.scale * module.up.abs().max()
        assert_close(float(most), 2e-2 * (0.1 if name.startswith("up") else 1), rtol=1e-3, atol=0)
    metadata = read_header(path).metadata
    assert json.loads(metadata["ss_network_args"]) == {"rank_of": "to_k=0 mid=1", "rate_of": "up=0.1"}
    assert json.loads(metadata["sfumato.config"])["rank_of"] == ["to_k=0", "mid=1"]
    assert {row["rate"] for row in log_beside(path) if "rate" in row} == {1e-2}
    assert "| rank_of | ['to_k=0', 'mid=1'] |" in (path.parent / "README.md").read_text()
    capsys.readouterr()
    assert cli.main(["inspect", str(path)]) == 0
    assert "ranks      2 (18), 1 (3)\n" in capsys.readouterr().out  # in so many layers
    for wrong, said in ((rules[:2], "; the file has 1, 2."), (rules[2:4], "that left layers out")):
        with pytest.raises(AssertionError):
            train("refused", *wrong, "--init-from", str(path))
        assert said in capsys.readouterr().err
