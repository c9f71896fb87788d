"""The DreamBooth trainer: equal to a loop written from the paper, in every family, exact when it goes on."""

import copy
import shutil

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sfumato import data
from sfumato.files import read_adapter, read_lora, read_tensors
from sfumato.files.fingerprint import verify
from sfumato.models import diffusion, load_base
from sfumato.training.loss.class_images import read_class
from sfumato.training.loss.prior import class_seed
from sfumato.utils import randomness
from tests.dreambooth.subject import CLASS, PROMPT, STEPS, unet_of
from tests.in_peft import layers_of_peft
from tests.logged import log_beside
from tests.tiny import CPU

pytestmark = pytest.mark.usefixtures("quick")


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
