"""Sliders: equal to plain loops of both of the paper's forms, opposite at opposite weights, exact to resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from sfumato.trainers.slider import Config, check, resolve
from torch.testing import assert_close

from bench.runs_resume import run as run_apart
from sfumato import cli, data
from sfumato.adapters import attach, target_layers
from sfumato.files import read_header, read_lora, read_tensors
from sfumato.generation.draw import draw
from sfumato.models import diffusion, load_base
from sfumato.precision import decide
from sfumato.training.methods.slider import drawn_images, prompt_counts, slider_prompts
from sfumato.training.methods.subject import with_caption
from sfumato.utils import randomness
from tests.logged import log_beside
from tests.runs.said import lines
from tests.tiny import CPU

pytestmark = pytest.mark.usefixtures("quick")
WORDS = (
    "--concept",
    "square",
    "--concept",
    "dot",
    "--more",
    "{concept}, noto style",
    "--less",
    "{concept}, flat style",
)
WORDS += ("--drawn", "6")
CAPTION = "a {caption}"
EPS = 1e-5
"""Adam's own 1e-8 makes a step out of a gradient that is only rounding, which differs from CPU to CPU."""


@pytest.fixture
def pairs(tmp_path):
    """Two folders of four images of the same names: coloured squares, and grey ones with captions of their own."""
    for folder, colours in (("colour", ["red", "gold", "blue", "pink"]), ("grey", ["#444", "#888", "#222", "#bbb"])):
        (tmp_path / folder).mkdir()
        for place, colour in enumerate(colours):
            picture = Image.new("RGB", (64, 64), "white")
            picture.paste(colour, (8 + place, 8, 40, 48))
            picture.save(tmp_path / folder / f"square-{place}.png")
            if folder == "grey":
                (tmp_path / folder / f"square-{place}.txt").write_text("never read")
    (tmp_path / "grey/square-0.txt").unlink()
    return "--more-images", str(tmp_path / "colour"), "--less-images", str(tmp_path / "grey"), "--caption", CAPTION


@pytest.fixture
def train(pocket_folder, tmp_path):
    """Train with these options on the tiny base; returns the slider's path."""

    def run(name, way, *options, base=pocket_folder, code=0):
        words = {"--output": str(tmp_path / name), "--base": str(base), "--steps": "4", "--batch": "2", "--rank": "2"}
        words |= {"--learning-rate": "1e-2", "--precision": "fp32", "--sample-every": "0", "--measure-every": "0"}
        words |= {"--checkpoint-every": "0", "--optimizer-args": f"eps={EPS}"} | dict(
            zip(options[::2], options[1::2], strict=True)
        )
        assert cli.main(["train", "slider", *way, *(word for pair in words.items() for word in pair)]) == code
        return tmp_path / name / f"{name}.safetensors"

    return run


def plain_loop(base, samples, predict_targets, losses):
    """Four steps of AdamW on rank 2: at weights 1 and -1, the mean squared error of what `samples` gives."""
    lora = attach(target_layers(base.parts(text=False), "cross-attention"), rank=2, alpha=2.0, seed=3)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01, eps=EPS)
    for step, factor in enumerate(torch.arange(4)):
        noise = torch.stack([randomness.normal((4, 16, 16), 3, "noise", step, i) for i in range(2)])
        timesteps = diffusion.stratified_timesteps(2, range(1000), 3, step)
        a = base.alpha_bar[timesteps].view(-1, 1, 1, 1)
        total = 0.0
        found = samples(step)
        with torch.no_grad(), lora.disabled():
            targets = predict_targets(found, noise, timesteps, a)
        for weight, (latents, captions), target in zip((1, -1), found, targets, strict=True):
            noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
            for layer in lora.layers.values():
                layer.strength = weight
            with torch.no_grad():
                hidden = base.encode_text(captions).hidden
            said = base.unet(noisy, timesteps, encoder_hidden_states=hidden).sample
            loss = (said - target).square().mean() / 2
            loss.backward()
            total += float(loss.detach())
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in lora.parameters()]))
        for parameter in lora.parameters():
            parameter.grad *= min(1.0, 1.0 / (float(norm) + 1e-6))
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + torch.cos(torch.pi * factor / 4)).item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return lora


def assert_same(path, lora, losses):
    assert_close([row["loss"] for row in log_beside(path)], losses, rtol=1e-4, atol=1e-6)
    made = read_lora(path).modules
    for layer in lora.layers.values():
        layer.strength = 1.0
    for key, change in lora.changes().items():
        assert_close(made[key].up @ made[key].down, (change.up @ change.down).detach(), rtol=1e-3, atol=2e-5)
    assert max(float(layer.up.abs().max()) for layer in lora.layers.values()) > 1e-3


def test_words_are_equal_to_a_plain_loop(train, pocket_folder):
    """Gandikota et al. 2024, eq. 8, on images of the concepts and of both ends, with the concepts as captions."""
    path = train("run", WORDS, "--seed", "3", "--strength", "1.5")
    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    ends = slider_prompts(["square", "dot"], ["{concept}, noto style"], ["{concept}, flat style"])
    prompts = [prompt for one in ends for prompt in (one.concept, one.more, one.less)]
    pictures = [draw(base, prompt, 0)[0] for prompt in prompts]
    folder = path.parent / "own"
    folder.mkdir()
    for place, picture in enumerate(pictures):
        picture.save(folder / f"{place}.png")
        (folder / f"{place}.txt").write_text(("square", "dot")[place // 3])
    dataset = data.prepare(data.read_folder(folder), base, resolution=64, embed_text=False)

    def samples(step):
        batch = dataset.batch(3, step, 2)
        return [(batch.latents, batch.captions)] * 2

    def predict_targets(found, noise, timesteps, a):
        latents, captions = found[0]
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise

        def said(form):
            hidden = base.encode_text([form.format(caption) for caption in captions]).hidden
            return base.unet(noisy, timesteps, encoder_hidden_states=hidden).sample

        change = 1.5 * (said("{}, noto style") - said("{}, flat style"))
        return said("{}") + change, said("{}") - change

    losses: list[float] = []
    assert_same(path, plain_loop(base, samples, predict_targets, losses), losses)


def test_pairs_are_equal_to_a_plain_loop(train, pairs, pocket_folder, tmp_path):
    """Section 4.2: at weight 1 what was added to the one image, at -1 to the other; noise and caption are the same."""
    path = train("run", pairs, "--seed", "3")
    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    folders = [data.read_folder(tmp_path / name, caption_template=CAPTION) for name in ("colour", "grey")]
    sets = [data.prepare(folder, base, resolution=64, embed_text=False) for folder in folders]

    def samples(step):
        batches = [each.batch(3, step, 2) for each in sets]
        return [(batch.latents, batches[0].captions) for batch in batches]

    def predict_targets(found, noise, timesteps, a):
        return [a.sqrt() * noise - (1 - a).sqrt() * latents for latents, _ in found]  # pocket predicts v

    losses: list[float] = []
    assert_same(path, plain_loop(base, samples, predict_targets, losses), losses)


def change_of(path, base, weight):
    """What the slider at this weight changes in the prediction for a square."""
    noisy = randomness.normal((1, 4, 16, 16), 0, "noisy")
    text, at = base.encode_text(["square"]), torch.tensor([600])
    modules = read_lora(path).modules
    with torch.no_grad():
        before = base.predict(noisy, at, text, None)
        kept = {}
        for (_, name), module in modules.items():
            host = base.unet.get_submodule(name)
            kept[name] = host.weight.detach().clone()
            host.weight += weight * module.scale * (module.up @ module.down).view_as(host.weight)
        after = base.predict(noisy, at, text, None)
        for name, weights in kept.items():
            base.unet.get_submodule(name).weight.copy_(weights)
    return (after - before).flatten()


def test_pairs_that_come_in_no_step_are_told_once(train, pairs, capsys):
    train("run", pairs, "--steps", "1")
    assert len([line for line in lines(capsys) if "come in none" in line]) == 1


@pytest.mark.slow
def test_opposite_weights_move_opposite_ways_and_towards_what_the_words_say(train, pocket_folder):
    path = train("run", WORDS, "--steps", "20", "--measure-every", "20", "--learning-rate", "2e-2", "--seed", "1")
    fits = [row["fit"] for row in log_beside(path) if "fit" in row]
    assert fits[0] == pytest.approx(1.0, abs=1e-5)
    assert fits[-1] < 0.7
    base = load_base(str(pocket_folder), precision=CPU)
    up, down = (change_of(path, base, weight) for weight in (1.0, -1.0))
    assert torch.cosine_similarity(up, down, dim=0) < -0.9
    noisy, at = randomness.normal((1, 4, 16, 16), 0, "noisy"), torch.tensor([600])
    with torch.no_grad():
        more, less = (
            base.predict(noisy, at, base.encode_text([f"square, {style} style"]), None) for style in ("noto", "flat")
        )
    assert torch.cosine_similarity(up, (more - less).flatten(), dim=0) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("way", ["words", "pairs"])
def test_the_same_run_gives_the_same_file_and_accumulating_is_a_larger_batch(way, train, pairs):
    way = WORDS if way == "words" else pairs
    once, twice = train("a", way, "--batch", "4", "--name", "a"), train("b", way, "--batch", "4", "--name", "b")
    assert_equal(once, twice)
    parted = train("c", way, "--batch", "2", "--accumulate", "2")
    assert_near(once, parted)


def assert_equal(first, second):
    one, other = read_tensors(first), read_tensors(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def assert_near(first, second):
    one, other = read_tensors(first), read_tensors(second)
    assert one.keys() == other.keys()
    for key in one:
        assert_close(one[key], other[key], rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_checkpointed_layers_are_computed_again_at_the_weight_that_they_had(train, tmp_path):
    plain = train("plain", WORDS)
    assert_near(plain, train("recomputed", (*WORDS, "--gradient-checkpointing")))


@pytest.mark.slow
def test_prompts_that_shall_stay_stay_the_more_by_their_weight(train):
    alone = train("alone", WORDS)
    light, heavy = (
        train(f"held-{weight}", (*WORDS, "--prior-prompts", "a cat", "--prior-weight", weight), "--steps", "12")
        for weight in ("0.001", "30")
    )
    assert log_beside(light)[0]["prior_loss"] == pytest.approx(0.0, abs=1e-9)  # an adapter of nothing changes nothing
    assert log_beside(light)[0]["loss"] == pytest.approx(log_beside(alone)[0]["loss"], rel=1e-4)
    moved, held = (sum(row["prior_loss"] for row in log_beside(path)[-4:]) for path in (light, heavy))
    assert held < 0.5 * moved


@pytest.mark.slow
@pytest.mark.parametrize("way", ["words", "pairs"])
def test_two_processes_give_what_one_gives(way, train, pairs, pocket_folder, tmp_path):
    way = WORDS if way == "words" else pairs
    one, log = train("one", way, "--batch", "4"), tmp_path / "two.log"
    words = ["train", "slider", *way, "--output", str(tmp_path / "two"), "--base", str(pocket_folder), "--steps", "4"]
    words += ["--batch", "2", "--rank", "2", "--learning-rate", "1e-2", "--precision", "fp32", "--device", "cpu"]
    words += ["--sample-every", "0", "--measure-every", "0", "--optimizer-args", f"eps={EPS}"]
    assert run_apart(words, log=log, processes=2) == 0, log.read_text()[-2000:]
    assert_near(one, tmp_path / "two/two.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_family_learns(family, train, family_folder):
    path = train("run", WORDS, "--steps", "2", "--resolution", "64", base=family_folder(family))
    assert read_header(path).metadata["ss_base_model_version"].startswith("sd" if family == "sd1" else "sdxl")
    assert all(bool(tensor.isfinite().all()) for tensor in read_tensors(path).values())


@pytest.mark.slow
def test_diffusers_draws_it_at_a_weight_below_zero(train, pocket_folder, tmp_path):
    path = train("run", WORDS, "--steps", "10")
    ours = tmp_path / "ours.png"
    words = [
        "--base",
        str(pocket_folder),
        "--lora",
        f"{path}:-1",
        "--seed",
        "5",
        "--precision",
        "fp32",
        "-o",
        str(ours),
    ]
    assert cli.main(["generate", "square", *words]) == 0
    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    before = draw(base, "square", 5)[0]
    pipe = base.pipeline()
    pipe.load_lora_weights(str(path), adapter_name="slider")
    pipe.set_adapters("slider", -1.0)
    theirs = draw(base, "square", 5)[0]
    difference = torch.tensor(list(Image.open(ours).convert("RGB").tobytes())) - torch.tensor(list(theirs.tobytes()))
    assert int(difference.abs().max()) <= 1
    assert before.tobytes() != theirs.tobytes()


def test_samples_and_card_show_the_weights(train, tmp_path):
    options = ("--sample-every", "4", "--name", "style", "--over-steps", "0.2-1")
    path = train("run", (*WORDS, "--sample-prompts", "square", "--sample-prompts", "a cat --d 3"), *options)
    path = path.with_name("style.safetensors")
    first, last = (
        [(path.parent / f"samples/{step:06d}/{place}.png").read_bytes() for place in range(4)] for step in (0, 4)
    )
    assert first[:2] == first[2:]  # before the first step every weight draws the base's image
    assert last[0] != last[2]
    assert last[1] != last[3]
    card = (path.parent / "README.md").read_text(encoding="utf-8")
    assert "Weight 1 moves `square`, `dot` towards `{concept}, noto style`, weight -1 towards `{concept}, flat" in card
    assert "where {concept} is each of these. No image was learned from." in card
    assert "![the same prompts at several weights](images/weights.png)" in card
    assert "--x style=-1,-0.5,0,0.5,1" in card
    assert "in the steps from 0.2 to 1 of the way" in card
    assert "- text: square (-1)" in card
    assert "- text: a cat (+1)" in card
    assert "| images |" not in card
    assert "sha256" not in card
    told = read_header(path).metadata
    assert not {"ss_num_train_images", "ss_tag_frequency"} & told.keys()
    assert str(tmp_path) not in json.dumps(dict(told))


@pytest.mark.slow
def test_images_of_the_concept_take_the_place_of_generated_ones(train, pictures, pocket_folder):
    """As if the base model had drawn them: with the concept as the caption of each."""
    way = ("--concept", "square", "--more", "a gold square", "--images", str(pictures))
    path = train("run", way, "--seed", "3")
    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    folder = with_caption(data.read_folder(pictures, caption_template="{caption}"), "square")
    dataset = data.prepare(folder, base, resolution=64, embed_text=False)

    def samples(step):
        return [(dataset.batch(3, step, 2).latents, ["square"] * 2)] * 2

    def predict_targets(found, noise, timesteps, a):
        noisy = a.sqrt() * found[0][0] + (1 - a).sqrt() * noise
        plain, gold = (
            base.unet(noisy, timesteps, encoder_hidden_states=base.encode_text([text] * 2).hidden).sample
            for text in ("square", "a gold square")
        )
        return gold, 2 * plain - gold

    losses: list[float] = []
    assert_same(path, plain_loop(base, samples, predict_targets, losses), losses)
    card = (path.parent / "README.md").read_text(encoding="utf-8")
    assert "Weight 1 moves `square` towards `a gold square`, weight -1 towards `{concept}`, where" in card
    assert "Learned on 6 images." in card
    assert not (path.parent / "drawn").exists()


@pytest.mark.slow
def test_what_a_dataset_says_of_captions_does_not_touch_the_concept(train, pictures, tmp_path):
    options = "caption_dropout = 1.0\nshuffle_tags = true\ntag_dropout = 0.9\n"
    (tmp_path / "set.toml").write_text(f'[[source]]\npath = "{pictures.as_posix()}"\n{options}')
    ends = ("--concept", "a square, red", "--more", "a gold square")
    plain = train("plain", (*ends, "--images", str(pictures)), "--steps", "2")
    told = train("told", (*ends, "--images", str(tmp_path / "set.toml")), "--steps", "2")
    assert_equal(plain, told)


def test_the_card_of_pairs_tells_them(train, pairs):
    path = train("run", pairs, "--steps", "1")
    card = (path.parent / "README.md").read_text(encoding="utf-8")
    assert "Learned from 4 pairs of images: weight 1 moves towards the one, weight -1 to the other." in card
    assert "| images | 4 |" in card
    assert "weights.png" not in card  # without samples


@pytest.mark.slow
def test_the_config_of_a_run_runs_again(train, tmp_path):
    path = train("run", WORDS)
    shutil.move(path.parent, tmp_path / "before")
    words = ["train", "slider", str(tmp_path / "before/config.toml"), "--output", str(path.parent)]
    assert cli.main(words) == 0
    assert_equal(tmp_path / "before/run.safetensors", path)


@pytest.mark.slow
def test_it_goes_on_from_another_with_the_ranks_of_its_layers(train):
    rules = ("--rank-of", "up=1", "--rate-of", "mid=0")
    first = train("first", (*WORDS, *rules), "--steps", "2")
    ranks = {module.down.shape[0] for (_, name), module in read_lora(first).modules.items() if name.startswith("up")}
    assert ranks == {1}
    assert not any(name.startswith("mid") for _, name in read_lora(first).modules)
    again = train("again", (*WORDS, *rules, "--init-from", str(first)), "--steps", "1", "--learning-rate", "1e-12")
    assert_near(first, again)


def test_ends():
    (one,) = slider_prompts(["a person"], ["{concept}, old"], [])
    assert (one.concept, one.more, one.less) == ("a person", "a person, old", "a person")
    assert one.prompts == ["a person", "a person, old"]
    assert slider_prompts(["a cat"], ["a tiger"], [""])[0].less == ""
    each = slider_prompts(["cat", "dog"], ["tiger", "wolf"], ["a small {concept}"])
    assert [(one.more, one.less) for one in each] == [("tiger", "a small cat"), ("wolf", "a small dog")]


def test_each_prompt_has_its_share_of_the_images():
    images = drawn_images(slider_prompts(["a", "b"], ["{concept} x"], ["y"]), 8)
    assert [(image.prompt, image.concept) for image in images] == [
        ("a", "a"), ("a x", "a"), ("y", "a"), ("b", "b"), ("b x", "b"), ("y", "b"), ("a", "a"), ("a x", "a"),
    ]  # fmt: skip
    assert prompt_counts(images) == {"a": 2, "a x": 2, "y": 2, "b": 1, "b x": 1}


@pytest.mark.parametrize(
    ("family", "wanted"), [("pocket", (120, 4, 48)), ("sd1", (500, 1, 40)), ("sdxl", (500, 1, 40))]
)
def test_defaults(family, wanted):
    from tests.test_train_textual_inversion import base_of

    config = Config(output=Path("runs/a"), concept=("a",), more=("b",))
    found, filled = resolve(config, base_of(family), [], 1)
    assert (found.steps, found.batch, found.drawn) == wanted
    assert found.alpha == found.rank
    assert "min_snr" in filled


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--concept is missing"),
        (("--concept", "a"), "--more is missing"),
        (("--concept", "a", "--more", "{concept}"), "are both 'a'; a slider needs two different ends"),
        (("--concept", "a", "--more", "b", "--more", "c"), "--more is given 2 times for 1 concept; give it once"),
        (("--concept", "a", "--concept", "a", "--more", "b"), "--concept 'a' is given twice"),
        (("--concept", "a", "--more", "b", "--images", ".", "--drawn", "3"), "--images and --drawn are both given"),
        (("--concept", "a", "--concept", "c", "--more", "b", "--images", "."), "--images are of one concept"),
        (("--concept", "a", "--more", "b", "--images", "nowhere"), "nowhere: there is no such folder"),
        (("--concept", "a", "--more", "b", "--strength", "0"), "--strength is 0.0; it must be a positive number"),
        (("--concept", "a", "--more", "b", "--drawn", "0"), "--drawn is 0; it must be at least 1"),
        (("--concept", "a", "--more", "b", "--dora"), "--dora: it learns lengths"),
        (("--concept", "a", "--more", "b", "--epochs", "2", "--steps", ""), "--steps"),
        (("--concept", "a", "--more", "b", "--caption", "x"), "--caption has no effect without --more-images"),
        (("--concept", "a", "--more", "b", "--prior-weight", "2"), "--prior-weight has no effect"),
        (("--concept", "a", "--more", "b", "--over-steps", "1-0"), "over-steps"),
        (("--concept", "a", "--more", "b", "--init-from", "x.safetensors"), "--init-from x.safetensors: there is no"),
        (("--more-images", "nowhere"), "nowhere: no such folder"),
        (("--concept", "a", "--more-images", "."), "--less-images is missing"),
        (("--more-images", ".", "--less-images", ".", "--concept", "a"), "--concept and --more-images are both given"),
        (("--more-images", ".", "--less-images", ".", "--more", "a"), "--more has no effect without --concept"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_no_run(options, said, train, tmp_path, capsys):
    train("run", options, code=2)
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_epochs_of_words_are_refused():
    with pytest.raises(Exception, match="no images of yours; give --steps"):
        check(Config(output=Path("runs/a"), concept=("a",), more=("b",), epochs=2))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "colour/square-1.png").unlink(), "square-1 of {}/grey has no image of the same name"),
        (lambda folder: (folder / "grey/square-1.png").unlink(), "square-1 of {}/colour has no image of the same name"),
        (
            lambda folder: Image.new("RGB", (64, 48)).save(folder / "grey/square-0.png"),
            "square-0: 64x64 pixels in {}/colour and 64x48 in {}/grey",
        ),
        (
            lambda folder: Image.new("RGB", (64, 64)).save(folder / "grey/square-0.jpg"),
            "{}/grey: several images are named square-0",
        ),
    ],
)
def test_images_without_a_partner_are_refused(spoil, said, train, pairs, tmp_path, capsys):
    spoil(tmp_path)
    train("run", pairs, code=2)
    assert said.format(tmp_path, tmp_path) in capsys.readouterr().err


def test_a_run_is_not_written_among_the_pairs(train, pairs, tmp_path, capsys):
    train("colour", pairs, code=2)
    assert "is a folder of the images" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["loha", "lokr", "oft"])
def test_each_kind_learns(algo, train, pairs):
    path = train("run", pairs, "--algo", algo, "--measure-every", "4")
    assert log_beside(path)[-1]["fit"] != pytest.approx(log_beside(path)[0]["fit"])
