"""The DreamBooth trainer: equal to a loop written from the paper, exact when it goes on, and each of its outputs."""

import copy
import json
import re
import runpy
import shutil
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sfumato.trainers.dreambooth import Config, resolve
from torch.testing import assert_close

from bench.runs_resume import run
from sfumato import Adapter, cli, compose, data, diffusion, randomness
from sfumato.bases import load_base
from sfumato.bases.family import FAMILIES
from sfumato.errors import FileError
from sfumato.files import read_adapter, read_header, read_lora, read_tensors
from sfumato.files.fingerprint import verify
from sfumato.files.metadata import thumbnail_uri
from sfumato.runs.step import Step
from sfumato.training import noising
from sfumato.training.class_pictures import read_class
from sfumato.training.full import write_folder as full_writer
from sfumato.training.prior import class_seed
from tests.in_peft import layers_of_peft
from tests.logged import log_beside
from tests.tiny import CPU

pytestmark = pytest.mark.usefixtures("quick")
STEPS = 3
PROMPT, CLASS = "sks square", "square"


@pytest.fixture
def train(pocket_folder, pictures, tmp_path):
    """Train with these options on the tiny base; returns what was learned."""

    def run(name="run", *options, base=pocket_folder, status=0):
        words = {"--images": pictures, "--output": tmp_path / name, "--base": base, "--class-name": CLASS}
        words |= {"--instance-prompt": PROMPT, "--steps": STEPS, "--batch": 2, "--learning-rate": "1e-3", "--rank": 2}
        words |= {"--sample-every": 0, "--measure-every": 0, "--checkpoint-every": 0}
        words |= {"--class-count": 3, "--class-cache": tmp_path / "class"}
        given = list(options)
        known = (
            "--train-text-encoder",
            "--overwrite",
            "--resume",
            "--fused",
            "--ema-on-cpu",
            "--gradient-checkpointing",
            "--own-negative",
        )
        flags = [given.pop(given.index(flag)) for flag in known if flag in given]
        asked = dict(zip(given[::2], given[1::2], strict=True))
        if "lora" not in (asked.get("--method"), asked.get("--save")):
            words.pop("--rank")
        if asked.get("--prior") in ("none", "base"):
            words.pop("--class-count")
        words |= asked
        shown = [str(word) for pair in words.items() if pair[1] is not None for word in pair]
        assert cli.main(["train", "dreambooth", *shown, *flags]) == status
        folder = tmp_path / name / name
        return folder if folder.is_dir() else folder.with_suffix(".safetensors")

    return run


def unet_of(folder):
    return read_tensors(folder / "unet/diffusion_pytorch_model.safetensors")


def papers_loop(base, dataset, class_set, *, seed, weight, steps=STEPS, count=2):
    """Eq. 2 of Ruiz et al. 2023: E w |x - x_hat(x_t, c)|^2 + lambda w' |x_pr - x_hat(x_t', c_pr)|^2, as it is written;
    w is min(SNR, 5) / (SNR + 1), which a prediction of v has by Hang et al. 2023.

    class_set: pictures of the class, or a frozen copy of the U-Net whose prediction for the class is the target.
    Trained is what of the U-Net wants gradients.
    """
    unet = base.unet
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    subject, of_class = base.encode_text([PROMPT]).hidden, base.encode_text([CLASS]).hidden
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    losses = []
    assert base.prediction_type == "v_prediction"

    def error(prediction, wanted, timesteps):
        a = base.scheduler.alphas_cumprod[timesteps]
        snr = a / (1 - a)
        return ((prediction - wanted).square().mean((1, 2, 3)) * snr.clamp(max=5) / (snr + 1)).mean()

    def draw(data_set, order, seed, step):
        batch = data_set.batch(order, step, count)
        shape = tuple(batch.latents.shape[1:])
        noise = torch.stack([randomness.normal(shape, seed, "noise", step, place) for place in range(count)])
        channels = [randomness.normal((4, 1, 1), seed, "noise offset", step, place) for place in range(count)]
        noise = noise + 0.2 * torch.stack(channels)
        timesteps = diffusion.stratified_timesteps(count, range(950), seed, step)
        noisy = base.scheduler.add_noise(batch.latents, noise, timesteps)
        return noisy, timesteps, base.scheduler.get_velocity(batch.latents, noise, timesteps)

    for step in range(steps):
        noisy, timesteps, wanted = draw(dataset, seed, seed, step)
        prediction = unet(noisy, timesteps, subject.expand(count, -1, -1)).sample
        loss = error(prediction, wanted, timesteps)
        if class_set is not None:
            frozen = class_set if isinstance(class_set, torch.nn.Module) else None
            own = class_seed(seed)  # of noise and timesteps; the frozen base is asked about the subject's own pictures
            order, of_prior = (seed, dataset) if frozen else (own, class_set)
            noisy, timesteps, wanted = draw(of_prior, order, own, step)
            words = of_class.expand(count, -1, -1)
            if frozen:
                with torch.no_grad():
                    wanted = frozen(noisy, timesteps, words).sample
            loss = loss + weight * error(unet(noisy, timesteps, words).sample, wanted, timesteps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.param_groups[0]["lr"] = 1e-3 * (0.5 if step == 0 else 1)  # two steps of warm-up
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def shapes(tmp_path):
    """Four pictures of three shapes."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for place, size in enumerate([(64, 64), (128, 64), (64, 128), (128, 64)]):
        Image.new("RGB", size, (40 * place, 200, 30)).save(folder / f"{place}.png")
    return folder


@pytest.mark.parametrize(
    ("method", "prior", "folder"),
    [
        ("full", "none", "pictures"),
        ("full", "pictures", "pictures"),
        ("full", "base", "pictures"),
        ("full", "pictures", "shapes"),
        ("lora", "base", "pictures"),
    ],
)
def test_equal_to_a_plain_loop_from_the_paper(method, prior, folder, train, pocket_folder, tmp_path, request):
    """Same start, noise, timesteps and batches: the same losses and final weights, in pictures of all shapes; of a LoRA
    in peft's layers."""
    images = request.getfixturevalue(folder)
    options = ["--schedule", "constant", "--clip", "0.5", "--seed", "3", "--prior", prior]
    options += ["--prior-weight", "0.7"] if prior != "none" else []
    options += ["--max-timestep", "950", "--noise-offset", "0.2"]
    options += ["--min-snr", "5", "--warmup", "2", "--weight-decay", "0.1"]
    options += ["--method", "lora", "--targets", "attention", "--precision", "fp32"] if method == "lora" else []
    path = train("run", "--images", images, *options)

    base = load_base(str(pocket_folder), precision=CPU)
    dataset = data.prepare(data.read_folder(images, caption_template=PROMPT), base, resolution=64)
    class_set = copy.deepcopy(base.unet) if prior == "base" else None
    if prior == "pictures":
        drawn = read_class(base, {CLASS: 3}, resolution=64, folder=tmp_path / "class")
        class_set = data.prepare(drawn, base, resolution=64)
    start = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    layers = layers_of_peft(base.unet, "attention", seed=3) if method == "lora" else base.unet.requires_grad_(True)
    losses = papers_loop(base, dataset, class_set, seed=3, weight=0.7)

    assert_close([row["loss"] for row in log_beside(path)], losses, rtol=1e-4, atol=1e-6)
    assert len({row["class_loss"] for row in log_beside(path) if "class_loss" in row}) == (
        0 if prior == "none" else STEPS
    )
    if method == "lora":
        found = {name: module.delta() for (_, name), module in read_lora(path).modules.items()}
        wanted = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    else:
        wanted = {name: tensor - start[name] for name, tensor in layers.state_dict().items()}
        found = {name: tensor - start[name] for name, tensor in unet_of(path).items()}
    assert found.keys() == wanted.keys()
    for name, change in found.items():
        # Of the whole change: a weight with almost no gradient goes where rounding tells AdamW's first steps to.
        assert (change - wanted[name]).norm() <= 1e-3 * wanted[name].norm() + 2e-5, name


@pytest.mark.parametrize(
    ("method", "family", "wanted"),
    [
        ("full", "pocket", (1e-4, 240, 4, 64)),
        ("lora", "pocket", (6e-4, 240, 4, 64)),
        *[("full", family, (5e-6, 800, 1, 200)) for family in ("sd1", "sd2", "sdxl")],
        *[("lora", family, (1e-4, 500, 1, 200)) for family in ("sd1", "sd2", "sdxl")],
    ],
)
def test_each_method_has_its_own_defaults_in_each_family(method, family, wanted, tmp_path):
    one = FAMILIES[family]
    base = SimpleNamespace(family=one, defaults=one.defaults, alpha_bar=range(1000))
    config = Config(images=tmp_path, output=tmp_path, class_name=CLASS, method=method)
    config, _ = resolve(config, base, data.ExampleSet(()), 1)
    assert (config.learning_rate, config.steps, config.batch, config.class_count) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_pictures_of_several_shapes_learn_beside_the_bases_predictions(method, train, shapes):
    path = train("run", "--prior", "base", "--method", method, "--images", shapes, "--steps", "6")
    assert len(log_beside(path)) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "prior", "further"),
    [
        ("full", "base", []),  # which remembers the predictions of the steps to come
        ("lora", "pictures", []),
        pytest.param("full", "pictures", ["--optimizer", "adafactor", "--fused"], marks=pytest.mark.slow),
        pytest.param("lora", "base", ["--optimizer", "adafactor"], marks=pytest.mark.slow),
        pytest.param("full", "base", ["--optimizer", "muon"], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(method, prior, further, train):
    options = [
        "--method",
        method,
        "--prior",
        prior,
        "--checkpoint-every",
        "2",
        "--ema",
        "0.5",
        "--steps",
        "4",
        *further,
    ]
    path = train("run", *options)
    load = unet_of if path.is_dir() else read_tensors
    whole, log = {name: tensor.clone() for name, tensor in load(path).items()}, log_beside(path)
    # Forget what came after step 2, as if it had been killed there.
    shutil.rmtree(path.parent / "checkpoints/000004")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    again = load(train("run", *options, "--resume"))
    assert log_beside(path) == log
    assert again.keys() == whole.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_what_led_to_a_loss_is_gone_before_the_next_is_computed(train, monkeypatch):
    """Where fp16 overflows, --fused does not go back through it a second time, which would let go of it."""
    losses, alive = noising.per_sample_losses, []

    def looked_at(*args, **options):
        assert [each() for each in alive] == [None] * len(alive)
        found = losses(*args, **options)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(noising, "per_sample_losses", looked_at)

    def overflows(step, *_, **__):
        step.skipped = True
        return False

    monkeypatch.setattr(Step, "healthy", overflows)
    train("run", "--fused")
    assert len(alive) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("clip", [pytest.param("0", marks=pytest.mark.slow), "0.05"])
def test_fused_weights_are_those_of_the_plain_run(train, clip):
    plain, fused = train("plain", "--clip", clip), train("fused", "--clip", clip, "--fused")
    weights, others = unet_of(plain), unet_of(fused)
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    norms = [row["gradient_norm"] for row in log_beside(plain)]
    assert norms == [row["gradient_norm"] for row in log_beside(fused)]
    assert min(norms) > 0.05


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fused", "--accumulate", "2"], "--accumulate 2"),
        (["--class-name", None], "--class-name is unset"),
        (["--method", "lora", "--save", "folder"], "--save folder"),
        (["--keep-energy", "0.9"], "--keep-energy belongs"),
        (["--prior-weight", "-1"], "--prior-weight is -1"),
        (["--conv-rank", "2"], "--conv-rank has no effect without --method lora"),
        (["--rank-of", "mid=1"], "--rank-of has no effect without --method lora"),
        (["--rate-of", "mid=1"], "--rate-of has no effect without --method lora"),
        (["--method", "lora", "--rate-of", "IN11=0.5"], "--rate-of IN11=0.5: names none of the"),
        (["--save-every", "1"], "--save-every has no effect without --method lora"),
        (["--dropout", "0.1"], "--dropout has no effect without --method lora"),
        (["--rank-dropout", "0.1"], "--rank-dropout has no effect without --method lora"),
        (["--module-dropout", "0.1"], "--module-dropout has no effect without --method lora"),
        (
            ["--method", "lora", "--module-dropout", "0.1", "--targets", r"mid_block.*attn2\.to_q"],
            "--module-dropout 0.1: one layer is adapted, and it is never left out",
        ),
        (["--drift-limit", "0.1"], "--measure-every 0"),
        (["--identifier", " "], "--identifier is empty"),
        (["--class-prompt", " "], "--class-prompt is empty"),
        (["--class-prompt", ""], "--class-prompt is empty"),
        (["--instance-prompt", "", "--identifier", "sks"], "--instance-prompt is empty"),
        (["--caption", "{caption}"], "--instance-prompt and --caption"),
        (["--class-images", "nowhere", "--class-count", None], "nowhere"),
        (["--class-images", "nowhere"], "--class-count has no effect without --prior-prompts beside --class-images"),
        (["--identifier", "zwx"], "--identifier has no effect without it in --instance-prompt"),
    ],
)
def test_wrong_use_is_one_line(options, said, train, capsys, tmp_path):
    train("run", *options, status=2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfumato: ")]
    assert len(error) == 1
    assert said in error[0]
    assert not (tmp_path / "run/run.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--prior", "base")])
def test_what_is_dropped_of_a_lora_is_the_same_however_a_step_is_computed(options, train):
    """As one batch or two, with activations computed twice, or fused; of each step other updates are left out."""
    lora = ("--method", "lora", "--precision", "fp32", "--targets", "attention", *options)
    dropped = (*lora, "--dropout", "0.2", "--rank-dropout", "0.3", "--module-dropout", "0.4")
    whole, without = (
        read_tensors(train(name, *words, "--batch", "4")) for name, words in (("a", dropped), ("b", lora))
    )
    ups = [key for key in whole if key.endswith("lora_up.weight")]  # which began at 0
    size = sum(whole[key].square().sum() for key in ups).sqrt()

    def off(other):
        return sum((other[key] - whole[key]).square().sum() for key in ups).sqrt() / size

    assert off(without) > 0.1
    for name, *how in (("parts", "--accumulate", "2"), ("twice", "--batch", "4", "--gradient-checkpointing"),
                       ("fused", "--batch", "4", "--fused")):  # fmt: skip
        assert off(read_tensors(train(name, *dropped, *how))) < 0.01, name


def test_module_dropout_of_dreambooth_leaves_whole_updates_out_of_a_step(train):
    """What is left out of both steps is as it began."""
    found = read_lora(train("run", "--method", "lora", "--steps", "2", "--module-dropout", "0.5")).modules
    out = [
        {(part, path) for part, path in found if randomness.uniform(0, f"module dropout/{part}/{path}", step) < 0.5}
        for step in range(2)
    ]
    assert out[0] - out[1]
    assert {key for key, module in found.items() if not module.up.any()} == out[0] & out[1] != set()


@pytest.mark.slow
def test_checkpointing_accumulating_and_the_mean_on_the_cpu_change_no_weight(train, pocket_folder):
    """To rounding, which AdamW blows up where a gradient is almost 0: measured against how far the weights moved."""
    plain, start = unet_of(train("plain", "--batch", "4", "--ema", "0.5")), unet_of(pocket_folder)
    moved = sum((tensor - start[key]).square().sum() for key, tensor in plain.items()).sqrt()
    for name, *options in (("checkpointed", "--batch", "4", "--gradient-checkpointing", "--ema-on-cpu"),
                           ("parts", "--accumulate", "2")):  # fmt: skip
        other = unet_of(train(name, "--ema", "0.5", *options))
        assert sum((other[key] - tensor).square().sum() for key, tensor in plain.items()).sqrt() < 0.01 * moved


def test_the_folder_is_whole_and_plain_diffusers_loads_it_as_its_card_says(train, pocket_folder):
    """Everything but the U-Net is the base's, the scheduler included, and nothing half-written stays."""
    from diffusers import DiffusionPipeline

    path = train("run", "--prior", "none", "--steps", "1", "--sample-every", "1", "--resolution", "32")
    with Image.open(path.parent / "samples/000001/0.png") as sample:
        assert sample.size == (32, 32)
    pipe = DiffusionPipeline.from_pretrained(path)
    before = DiffusionPipeline.from_pretrained(pocket_folder)
    assert dict(pipe.scheduler.config) == dict(before.scheduler.config)
    for part in ("vae", "text_encoder"):
        written = getattr(pipe, part).state_dict()
        for name, tensor in getattr(before, part).state_dict().items():
            assert torch.equal(tensor, written[name])
    learned = pipe.unet.state_dict()
    assert any(not torch.equal(t, learned[n]) for n, t in before.unet.state_dict().items())
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".run")]
    assert load_base(str(path), precision=CPU).family.name == "pocket"
    assert 'DiffusionPipeline.from_pretrained("run")' in (path.parent / "README.md").read_text()
    assert (path.parent / "images/before_after.png").is_file()


@pytest.mark.slow
def test_a_folder_in_half_precision_draws_with_the_lines_of_its_card(train, monkeypatch, capsys):
    """Text encoders are read in the dtype of their files unless one is asked for, the U-Net in fp32."""
    path = train("run", "--prior", "none", "--steps", "1", "--save-precision", "fp16")
    assert "Writing model shards" not in capsys.readouterr().err
    code = re.search("```python\n(.*?)```", (path.parent / "README.md").read_text(), re.DOTALL)[1]
    *loading, drawing = code.splitlines()
    assert drawing.startswith("image = pipe(")
    monkeypatch.chdir(path.parent)
    known: dict[str, object] = {}
    exec("\n".join(loading), known)
    picture = known["pipe"](PROMPT, num_inference_steps=1, output_type="np").images[0]
    assert picture.std() > 0


@pytest.mark.slow
def test_base_and_difference_are_the_trained_weights(train, pocket_folder):
    options = ("--prior", "none", "--steps", "2", "--train-text-encoder")
    whole, change = train("whole", *options), train("change", *options, "--save", "difference")
    file = read_adapter(change)
    assert set(file.kinds) == {"difference"}
    assert file.family == "pocket"
    assert json.loads(file.metadata["sfumato.config"])["method"] == "full"
    base, trained = (load_base(str(folder), precision=CPU) for folder in (pocket_folder, whole))
    parts = {"unet": "unet", "text_encoder": "text_encoders"}
    seen = set()
    for (part, place), one in file.changes.items():
        old, new = (getattr(b, parts[part]) for b in (base, trained))
        old, new = ((m[0] if isinstance(m, tuple) else m).get_submodule(place) for m in (old, new))
        assert_close(old.weight + one.delta(old.weight), new.weight, rtol=0, atol=1e-6)
        if one.bias_delta is not None:
            assert_close(old.bias + one.bias_delta, new.bias, rtol=0, atol=1e-6)
        seen.add(part)
    assert seen == set(parts)
    with compose(base, Adapter(change)):
        mixed = base.unet.state_dict()
        for name, tensor in trained.unet.state_dict().items():
            assert_close(mixed[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("lora", "sd2"),
        pytest.param("full", "sdxl", marks=pytest.mark.slow),  # two text encoders, whose weights differ
        pytest.param("full", "sd1", marks=pytest.mark.slow),
        pytest.param("full", "sd2", marks=pytest.mark.slow),
        pytest.param("lora", "sd1", marks=pytest.mark.slow),
        pytest.param("lora", "sdxl", marks=pytest.mark.slow),
    ],
)
def test_every_family_learns_text_encoders_and_all(family, method, train, family_folder):
    options = ["--train-text-encoder", "--resolution", "64", "--method", method, "--steps", "1", "--prior", "base"]
    options += ["--precision", "bf16"] if method == "lora" else ["--save", "difference"]
    made = train("run", *options, base=family_folder(family))
    file = read_adapter(made)
    verify(file.metadata, file.changes, made.name)
    wanted = {"unet", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    assert {part for part, _ in file.changes} == wanted
    assert file.family == family


@pytest.mark.slow
def test_drift_of_class_and_unrelated_prompts_is_logged_from_nothing_on(train):
    path = train("run", "--prior", "none", "--steps", "4", "--measure-every", "2")
    measured = [row for row in log_beside(path) if "drift" in row]
    assert len(measured) == 3
    assert measured[0]["drift"] == measured[0]["class_drift"] == 0
    assert measured[-1]["drift"] > 0
    assert measured[-1]["class_drift"] > 0


@pytest.mark.slow
def test_a_prior_moves_the_class_less(train):
    options = ["--measure-every", "8", "--steps", "8"]
    held, free = (
        [row["class_drift"] for row in log_beside(train(prior[1], *prior, *options)) if "class_drift" in row]
        for prior in (["--prior", "base", "--prior-weight", "5"], ["--prior", "none"])
    )
    assert held[0] == free[0] == 0
    assert held[-1] < 0.8 * free[-1]


@pytest.mark.slow
def test_the_drift_limit_stops_saves_and_holds_when_it_goes_on(train, capsys):
    options = ["--prior", "none", "--measure-every", "1", "--drift-limit", "1e-6", "--checkpoint-every", "1"]
    path = train("run", *options)
    assert path.is_dir()
    assert max(row["step"] for row in log_beside(path)) == 1
    assert "--drift-limit" in capsys.readouterr().err
    again = train("run", *options, "--resume")
    assert max(row["step"] for row in log_beside(again)) == 1


def test_pictures_with_captions_keep_them_and_the_class_has_their_form(train, pictures, tmp_path, capsys):
    folder = tmp_path / "captioned"
    shutil.copytree(pictures, folder)
    for place, file in enumerate(sorted(folder.glob("*.png"))):
        if place:
            file.with_suffix(".txt").write_text("zwx square, flat style")
    options = ("--method", "lora", "--steps", "1", "--instance-prompt", None)
    train("run", "--images", folder, "--identifier", "zwx", *options)
    said = capsys.readouterr().err
    assert "class images: 3 of square, square, flat style" in said
    about = sorted(json.loads(file.read_text())["prompt"] for file in (tmp_path / "class").glob("*/about.json"))
    assert about == ["square", "square, flat style"]


def test_captions_may_bind_the_subject_to_another_word_than_the_default(train, pictures, tmp_path, capsys):
    """Which the file then names, and the class has the captions' forms; an identifier that is given must be in one."""
    folder = tmp_path / "captioned"
    shutil.copytree(pictures, folder)
    for file in folder.glob("*.png"):
        file.with_suffix(".txt").write_text("zwx square, flat style")
    options = ("--method", "lora", "--steps", "1", "--instance-prompt", None, "--images", folder)
    path = train("run", *options)
    said = capsys.readouterr().err
    assert "identifier 'zwx'" in said
    assert "class images: 3 of square, square, flat style" in said
    assert read_header(path).metadata["modelspec.trigger_phrase"] == "zwx square"
    train("other", *options, "--identifier", "ohwx", status=2)
    assert "--identifier has no effect without it in a caption" in capsys.readouterr().err


def test_the_run_tells_how_the_identifier_is_cut_and_warns_of_a_word(train, capsys):
    options = ("--method", "lora", "--prior", "none", "--steps", "1", "--instance-prompt", None)
    train("run", "--identifier", "dog", *options)
    said = capsys.readouterr().err
    assert "identifier 'dog': 3 pieces (d + o + g)" in said
    assert "'dog' is an ordinary word" in said
    train("other", *options)
    assert "ordinary" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("plotted")
def test_a_lora_describes_itself_and_no_file_tells_a_path(train, tmp_path, pictures):
    path = train("run", "--method", "lora", "--steps", "1", "--sample-every", "1", "--measure-every", "1",
                 "--over-steps", "0-0.8", "--resolution", "32", "--own-negative")  # fmt: skip
    metadata = read_header(path).metadata
    assert metadata["sfumato.over_steps"] == "0-0.8"
    assert json.loads(metadata["sfumato.negatives"]) == [PROMPT]
    assert metadata["modelspec.trigger_phrase"] == PROMPT
    assert json.loads(metadata["sfumato.config"])["prior"] == "pictures"
    with Image.open(path.parent / "samples/000001/0.png") as subject:  # not the class, nor what is unrelated
        assert subject.size == (32, 32)
        assert metadata["modelspec.thumbnail"] == thumbnail_uri(subject)
    assert read_lora(path).family == "pocket"
    text = json.dumps(dict(metadata)) + (path.parent / "README.md").read_text()
    assert str(tmp_path) not in text
    assert str(pictures) not in text
    names = {file.name for file in path.parent.iterdir()}
    assert {"config.toml", "log.jsonl", "plot.png", "samples.png", "README.md"} <= names


def test_the_mean_of_the_weights_is_what_is_saved(train):
    """After one step it is 0.9 of the way from the start, at which an update's `up` is 0."""
    one_step = ("--method", "lora", "--prior", "none", "--steps", "1")
    whole, mean = read_tensors(train("whole", *one_step)), read_tensors(train("mean", *one_step, "--ema", "0.75"))
    ups = [key for key in whole if key.endswith("lora_up.weight")]
    assert any(whole[key].any() for key in ups)
    for key in ups:
        assert_close(mean[key], 0.9 * whole[key])


@pytest.mark.slow
def test_adapters_on_the_way_are_those_of_runs_that_end_there(train):
    steady = ("--method", "lora", "--prior", "none", "--schedule", "constant")
    path = train("run", *steady, "--save-every", "2")
    kept = sorted((path.parent / "adapters").iterdir())
    assert [each.name for each in kept] == ["run-step00000002.safetensors", "run-step00000003.safetensors"]
    ended = train("ended", *steady, "--steps", "2")
    assert read_header(kept[0]).metadata["ss_steps"] == "2"
    first, last = read_tensors(kept[0]), read_tensors(ended)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in last)
    end = read_tensors(path)
    assert not all(torch.equal(first[name], end[name]) for name in end)


def test_a_copy_of_the_program_runs(pocket_folder, pictures, tmp_path, monkeypatch):
    """As a script does; tests/lora/test_lora_again.py has a copy run in a process of its own."""
    assert cli.main(["cp", "dreambooth", str(tmp_path / "mine.py")]) == 0
    words = ["--images", str(pictures), "--base", str(pocket_folder), "--output", str(tmp_path / "run")]
    words += ["--class-name", "square", "--prior", "base", "--method", "lora", "--steps", "1"]
    words += ["--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "0"]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "mine.py"), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tmp_path / "mine.py"), run_name="__main__")
    assert ended.value.code == 0
    assert (tmp_path / "run/run.safetensors").is_file()


@pytest.mark.slow
def test_the_extracted_lora_is_the_change_and_says_what_it_keeps(train, pocket_folder, capsys):
    """At full rank the layers' very change; at rank 1 less, and both report it."""
    options = ("--prior", "none", "--steps", "2")
    trained = load_base(str(train("whole", *options)), precision=CPU).unet
    base = load_base(str(pocket_folder), precision=CPU).unet
    capsys.readouterr()
    file = read_lora(train("all", *options, "--save", "lora", "--keep-energy", "1", "--rank", None))
    said = capsys.readouterr().err
    assert "of the energy" in said
    for (_, place), module in file.modules.items():
        old, new = (model.get_submodule(place).weight.detach() for model in (base, trained))
        assert_close(module.delta(old), new - old, rtol=1e-2, atol=1e-5)
    one = read_lora(train("one", *options, "--save", "lora", "--rank", "1"))
    assert {module.rank for module in one.modules.values()} == {1}
    kept = [float(f.metadata["sfumato.kept_energy"]) for f in (file, one)]
    assert kept[1] < kept[0] <= 1


@pytest.mark.slow
def test_two_processes_draw_one_class_and_give_the_result_of_one(train, pocket_folder, pictures, tmp_path):
    """Two CPU processes: one global batch of 4, to rounding."""
    one = train("one", "--batch", "4", "--method", "lora", "--save", "lora", "--precision", "fp32")
    words = ["train", "dreambooth", "--images", str(pictures), "--output", str(tmp_path / "two")]
    words += ["--base", str(pocket_folder), "--class-name", CLASS, "--instance-prompt", PROMPT, "--steps", str(STEPS)]
    words += ["--batch", "2", "--learning-rate", "1e-3", "--rank", "2", "--method", "lora", "--class-count", "3"]
    words += ["--sample-every", "0", "--measure-every", "2", "--precision", "fp32"]
    # A cache of its own: both processes draw.
    log = tmp_path / "log"
    assert run(words, log=log, processes=2) == 0, log.read_text()[-2000:]
    assert len(list((tmp_path / "two/class").glob("*/*.png"))) == 3
    whole, parts = read_tensors(one), read_tensors(tmp_path / "two" / "two.safetensors")
    ups = [key for key in whole if key.endswith("lora_up.weight")]  # which began at 0
    off = sum((parts[key] - whole[key]).square().sum() for key in ups).sqrt()
    assert off < 0.01 * sum(whole[key].square().sum() for key in ups).sqrt()


def test_a_folder_of_one_s_own_is_never_taken_for_an_earlier_base(train, tmp_path, capsys):
    mine = tmp_path / "run/run/mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    train("run", status=2)
    assert "run holds run and no run; a run would write over that" in capsys.readouterr().err
    with pytest.raises(FileError, match="holds something that is no base, so it was not replaced"):
        full_writer(None, mine.parent, torch.float32)
    assert mine.read_text() == "mine"
