"""The trainer of all weights: equal to a loop written from the formula and to DreamBooth's, and each of its outputs."""

import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from sfumato.trainers import finetune
from sfumato.trainers.finetune import Config, resolve
from torch.testing import assert_close

from bench.runs_resume import run
from sfumato import Adapter, cli, compose, data
from sfumato.files import read_lora
from sfumato.models import diffusion, load_base
from sfumato.models.family import FAMILIES
from sfumato.runs.run import Step
from sfumato.training.loss import objective
from sfumato.training.loss.prior import class_seed
from sfumato.utils import randomness
from tests.logged import log_beside
from tests.tiny import CPU

pytestmark = pytest.mark.usefixtures("quick")
STEPS = 3
FLAGS = ("--train-text-encoder", "--resume", "--fused", "--ema-on-cpu", "--gradient-checkpointing")


@pytest.fixture
def train(pocket_folder, pictures, tmp_path):
    """Train with these options on the tiny base; returns what was learned."""

    def run(name="run", *options, program="finetune", status=0):
        words = {"--images": pictures, "--output": tmp_path / name, "--base": pocket_folder, "--caption": "{caption}"}
        words |= {"--steps": STEPS, "--batch": 2, "--learning-rate": "1e-3", "--precision": "fp32"}
        words |= {} if program == "finetune" else {"--method": "full", "--prior-prompts": ""}
        words |= {"--sample-every": 0, "--measure-every": 0, "--checkpoint-every": 0}
        flags = [option for option in options if option in FLAGS]
        flags += ["--no-flip"] if program == "finetune" else []
        given = [option for option in options if option not in FLAGS]
        words |= dict(zip(given[::2], given[1::2], strict=True))
        shown = [str(word) for pair in words.items() if pair[1] is not None for word in pair]
        assert cli.main(["train", program, *shown, *flags]) == status
        folder = tmp_path / name / name
        return folder if folder.is_dir() else folder.with_suffix(".safetensors")

    return run


@pytest.fixture
def with_class(pictures, tmp_path):
    """A dataset.toml of the pictures under one caption, and of the same as pictures of a class under another."""
    one, other = ('words = "sks square"', 'words = "square"\nclass = true')
    path = tmp_path / "both.toml"
    path.write_text("".join(f'[[source]]\npath = "{pictures.as_posix()}"\n{lines}\n' for lines in (one, other)))
    return path


def losses(path):
    return [row["loss"] for row in log_beside(path) if "loss" in row]


def state_of(base):
    """A copy of all weights of the U-Net and the text encoder, by part and name."""
    states = {"unet": base.unet.state_dict(), "text": base.text_encoders[0].state_dict()}
    return {f"{part} {name}": tensor.clone() for part, state in states.items() for name, tensor in state.items()}


def weights_of(folder):
    """The same of a whole model that was written."""
    return state_of(load_base(str(folder), precision=CPU))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def plain_loop(base, dataset, class_set, groups, *, seed, weight, count, accumulate=1):
    """E w |v - v_hat(x_t, t, c)|^2 over the images with their captions, and the same of a class at its weight; w is
    min(SNR, 5) / (SNR + 1), which a prediction of v has by Hang et al. 2023."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    found, whole = [], count * accumulate
    assert base.prediction_type == "v_prediction"

    def error(images, own_seed, step):
        """The mean over a step's global batch."""
        batch = images.batch(own_seed, step, whole, embed_text=False)
        shape = tuple(batch.latents.shape[1:])
        noise = torch.stack([randomness.normal(shape, own_seed, "noise", step, place) for place in range(whole)])
        channels = [randomness.normal((4, 1, 1), own_seed, "noise offset", step, place) for place in range(whole)]
        noise = noise + 0.2 * torch.stack(channels)
        timesteps = diffusion.stratified_timesteps(whole, range(950), own_seed, step)
        noisy = base.scheduler.add_noise(batch.latents, noise, timesteps)
        wanted = base.scheduler.get_velocity(batch.latents, noise, timesteps)
        tokens = base.tokenizers[0](batch.captions, padding="max_length", truncation=True, return_tensors="pt")
        text = base.text_encoders[0](tokens.input_ids).last_hidden_state
        prediction = base.unet(noisy, timesteps, text).sample
        a = base.scheduler.alphas_cumprod[timesteps]
        snr = a / (1 - a)
        return ((prediction - wanted).square().mean((1, 2, 3)) * snr.clamp(max=5) / (snr + 1)).mean()

    for step in range(STEPS):
        loss = error(dataset, seed, step)
        if class_set is not None:
            loss = loss + weight * error(class_set, class_seed(seed), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (0.5 if step == 0 else 1)  # two steps of warm-up
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("options", "learns_text", "has_class"),
    [
        ([], False, False),
        (["--train-text-encoder", "--text-learning-rate", "3e-4"], True, False),
        (["--accumulate", "2"], False, False),
        (["--prior-weight", "0.7"], False, True),
    ],
    ids=["unet", "text encoder", "accumulated", "class"],
)
def test_equal_to_a_plain_loop_from_the_formula(
    options, learns_text, has_class, train, pocket_folder, pictures, with_class
):
    """Same start, noise, timesteps and batches: the same losses and final weights."""
    options = [*options, "--schedule", "constant", "--clip", "0.5", "--seed", "3", "--max-timestep", "950"]
    options += ["--noise-offset", "0.2", "--min-snr", "5", "--warmup", "2", "--weight-decay", "0.1"]
    options += ["--images", str(with_class), "--caption", None] if has_class else []
    path = train("run", *options)

    base = load_base(str(pocket_folder), precision=CPU)
    template = None if has_class else "{caption}"
    examples = data.read_folder(with_class if has_class else pictures, caption_template=template)
    dataset = data.prepare(examples.in_group("instance"), base, resolution=64, embed_text=False)
    of_class = examples.in_group("class")
    class_set = data.prepare(of_class, base, resolution=64, embed_text=False) if has_class else None
    encoder = base.text_encoders[0]
    start = state_of(base)
    groups = [{"params": list(base.unet.requires_grad_(True).parameters()), "lr": 1e-3}]
    groups += [{"params": list(encoder.requires_grad_(True).parameters()), "lr": 3e-4}] if learns_text else []
    accumulate = 2 if "--accumulate" in options else 1
    wanted = plain_loop(base, dataset, class_set, groups, seed=3, weight=0.7, count=2, accumulate=accumulate)

    assert_close(losses(path), wanted, rtol=1e-4, atol=1e-6)
    assert all(("prior_loss" in row) == has_class for row in log_beside(path) if "loss" in row)
    changes = {name: tensor - start[name] for name, tensor in state_of(base).items()}
    assert any(name.startswith("text") and change.any() for name, change in changes.items()) == learns_text
    for name, tensor in weights_of(path).items():
        # Of the whole change: a weight with almost no gradient goes where rounding tells AdamW's first steps to.
        off = (tensor - start[name] - changes[name]).norm()
        if not name.endswith("k_proj.bias"):  # on which attention does not depend
            assert off <= 1e-3 * changes[name].norm() + 2e-5, name


@pytest.mark.parametrize("has_class", [False, True])
def test_it_learns_what_dreambooth_learns_of_the_same_captions(has_class, train, with_class):
    """A word that is in them binds nothing by itself: the losses and weights are the same to the bit."""
    booth = ("--class-name", "square", "--caption", None, "--prior")
    if has_class:
        both = ("--images", str(with_class), "--prior-weight", "0.4")
        one = train("one", *both, "--caption", None)
        other = train("other", *both, *booth, "pictures", program="dreambooth")
    else:
        one = train("one", "--caption", "sks square")
        other = train("other", *booth, "none", program="dreambooth")
    assert losses(one) == losses(other)
    assert same(weights_of(one), weights_of(other))


def test_a_class_is_learned_at_its_weight_alone(train, with_class):
    """At 0 it is measured."""
    images = ("--images", str(with_class), "--caption", None)
    beside = train("beside", *images, "--prior-weight", "0")
    alone = train("alone", "--caption", "sks square")
    assert all(row["prior_loss"] > 0 for row in log_beside(beside) if "loss" in row)
    assert_close(losses(beside), losses(alone), rtol=1e-3, atol=0)
    config = Config(images=with_class, output=with_class.parent / "two")
    base = SimpleNamespace(family=FAMILIES["sd1"], defaults=FAMILIES["sd1"].defaults, alpha_bar=range(1000))
    found, _ = resolve(config, base, finetune.read_examples(config), 1)
    assert (found.batch, found.prior_weight) == (2, 1.0)


@pytest.mark.parametrize(
    ("family", "wanted"),
    [("pocket", (1e-4, 240, 8)), ("sd1", (1e-5, 4000, 4)), ("sd2", (1e-5, 4000, 4)), ("sdxl", (1e-6, 4000, 2))],
)
def test_each_family_has_defaults_of_its_own(family, wanted, tmp_path):
    base = SimpleNamespace(family=FAMILIES[family], defaults=FAMILIES[family].defaults, alpha_bar=range(1000))
    config, filled = resolve(Config(images=tmp_path, output=tmp_path), base, data.ExampleSet(()), 1)
    assert (config.learning_rate, config.steps, config.batch) == wanted
    assert (config.save, config.rank, "rank" in filled) == ("folder", None, False)
    by_rank, _ = resolve(Config(images=tmp_path, output=tmp_path, save="lora"), base, data.ExampleSet(()), 1)
    assert by_rank.rank == FAMILIES[family].defaults.rank
    by_energy = Config(images=tmp_path, output=tmp_path, save="lora", keep_energy=0.9)
    assert resolve(by_energy, base, data.ExampleSet(()), 1)[0].rank is None


@pytest.mark.slow
@pytest.mark.parametrize("further", [["--train-text-encoder"], ["--accumulate", "2", "--ema-on-cpu"], ["--fused"]])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(further, train):
    options = ["--checkpoint-every", "2", "--ema", "0.5", "--steps", "4", *further]
    path = train("run", *options)
    whole, log = {name: tensor.clone() for name, tensor in weights_of(path).items()}, log_beside(path)
    # Forget what came after step 2, as if it had been killed there.
    shutil.rmtree(path.parent / "checkpoints/000004")
    shutil.rmtree(path)
    assert same(whole, weights_of(train("run", *options, "--resume")))
    assert log_beside(path) == log


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["0", "0.05"])
def test_fused_weights_are_those_of_the_plain_run(clip, train):
    plain, fused = train("plain", "--clip", clip), train("fused", "--clip", clip, "--fused")
    assert same(weights_of(plain), weights_of(fused))
    assert losses(plain) == losses(fused)


def test_what_led_to_a_loss_is_gone_before_the_next_is_computed(train, with_class, monkeypatch):
    """Where fp16 overflows, --fused does not go back through it a second time, which would let go of it."""
    errors, alive = objective.per_sample_losses, []

    def looked_at(*args, **options):
        assert [each() for each in alive] == [None] * len(alive)
        found = errors(*args, **options)
        alive.append(weakref.ref(found))
        return found

    def overflows(step, *_, **__):
        step.skipped = True
        return False

    monkeypatch.setattr(objective, "per_sample_losses", looked_at)
    monkeypatch.setattr(Step, "healthy", overflows)
    train("run", "--images", str(with_class), "--caption", None, "--fused")
    assert len(alive) == STEPS


@pytest.mark.slow
def test_memory_that_is_saved_changes_nothing(train):
    """A mean on the CPU is the mean, and activations that are computed twice are the same."""
    plain = train("plain", "--ema", "0.5")
    for flag in ("--ema-on-cpu", "--gradient-checkpointing"):
        assert same(weights_of(plain), weights_of(train(flag.strip("-"), "--ema", "0.5", flag)))
    assert not same(weights_of(plain), weights_of(train("last")))


def test_with_ema_the_mean_is_saved(train, pocket_folder):
    """After one step 0.9 of the change: the decay of a young mean is (1 + 0) / (10 + 0)."""
    start, last = weights_of(pocket_folder), weights_of(train("last", "--steps", "1"))
    mean = weights_of(train("mean", "--steps", "1", "--ema", "0.5", "--ema-on-cpu"))
    for name, tensor in start.items():
        assert_close(mean[name] - tensor, 0.9 * (last[name] - tensor), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(train, pocket_folder, pictures, tmp_path):
    """One global batch of 4, to rounding; a prior of a class's images is no less so."""
    one = train("one", "--batch", "4")
    words = [
        "train",
        "finetune",
        "--images",
        str(pictures),
        "--output",
        str(tmp_path / "two"),
        "--caption",
        "{caption}",
        "--no-flip",
    ]
    words += ["--base", str(pocket_folder), "--steps", str(STEPS), "--batch", "2", "--learning-rate", "1e-3"]
    words += ["--sample-every", "0", "--measure-every", "2", "--precision", "fp32"]
    log = tmp_path / "log"
    assert run(words, log=log, processes=2) == 0, log.read_text()[-2000:]
    two = tmp_path / "two/two"
    assert_close(losses(one), losses(two), rtol=1e-5, atol=0)
    start, whole, parts = (weights_of(folder) for folder in (pocket_folder, one, two))
    off, change = (
        torch.stack([(a[name] - b[name]).norm() for name in start]).norm() for a, b in ((whole, parts), (whole, start))
    )
    assert off < 0.01 * change


@pytest.mark.slow
def test_each_form_that_is_saved_is_the_change(train, pocket_folder, capsys):
    """The whole model less the base, its difference, and the LoRA of all of its energy."""
    start, trained = (weights_of(folder) for folder in (pocket_folder, train("whole", "--train-text-encoder")))
    path = train("change", "--train-text-encoder", "--save", "difference")
    assert "differ from the base's" in capsys.readouterr().err
    base = load_base(str(pocket_folder), precision=CPU)
    compose(base.pipeline(), Adapter(path))
    for name, tensor in state_of(base).items():
        assert_close(tensor, trained[name], rtol=1e-4, atol=1e-5, msg=name)
    file = read_lora(train("all", "--save", "lora", "--keep-energy", "1"))
    assert "of the energy" in capsys.readouterr().err
    unet = weights_of(train("unet"))
    for (part, place), module in file.modules.items():
        old, new = (weights[f"{part} {place}.weight"] for weights in (start, unet))
        assert_close(module.delta(old), new - old, rtol=1e-2, atol=1e-5)
    assert {module.rank for module in read_lora(train("one", "--save", "lora", "--rank", "1")).modules.values()} == {1}


@pytest.mark.slow
def test_the_drift_limit_stops_saves_and_holds_when_it_goes_on(train, with_class, capsys):
    options = ["--images", str(with_class), "--caption", None]
    options += ["--measure-every", "1", "--drift-limit", "1e-6", "--checkpoint-every", "1"]
    path = train("run", *options)
    assert path.is_dir()
    assert max(row["step"] for row in log_beside(path)) == 1
    assert {"drift", "class_drift"} <= log_beside(path)[0].keys() | log_beside(path)[1].keys()
    assert "stopped after step 1: " in capsys.readouterr().err
    assert max(row["step"] for row in log_beside(train("run", *options, "--resume"))) == 1


def test_its_card_says_how_it_was_learned(train):
    path = train("run", "--steps", "1", "--caption", "{caption}, zwx style", "--trigger", "zwx")
    card = (path.parent / "README.md").read_text(encoding="utf-8")
    assert "`pocket` (pocket) fine-tuned on 6 images and their captions." in card
    assert "dreambooth" not in card.lower()
    assert "Write `zwx` in the prompt." in card
    assert "| learning_rate | 0.001 |" in card


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prior-weight", "1"], "--prior-weight is for images of a class"),
        (["--rank", "2"], "--rank has no effect without --save lora"),
        (["--keep-energy", "0.9"], "--keep-energy has no effect without --save lora"),
        (["--save", "lora", "--keep-energy", "2"], "--keep-energy is 2.0; it must be above 0 and at most 1."),
        (["--text-learning-rate", "1e-5"], "--text-learning-rate has no effect without --train-text-encoder"),
        (["--ema-on-cpu"], "--ema-on-cpu has no effect without --ema"),
        (["--drift-limit", "0.1"], "--measure-every 0"),
        (["--fused", "--accumulate", "2"], "--accumulate 2"),
        (["--name", "checkpoints"], "--name 'checkpoints'"),
        (["--name", "class"], "--name 'class'"),
        (["--caption", None, "--images", "nowhere"], "nowhere"),
    ],
)
def test_wrong_use_is_one_line(options, said, train, capsys, tmp_path):
    train("run", *options, status=2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfumato: ")]
    assert len(error) == 1
    assert said in error[0]
    assert not (tmp_path / "run/run").exists()
