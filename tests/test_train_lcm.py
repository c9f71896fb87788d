"""LCM-LoRA: equal to a plain loop on diffusers' schedulers, exact to resume, and drawn as its file asks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from PIL import Image
from sfumato.trainers.lcm import Config, resolve
from torch.testing import assert_close

from sfumato import cli, data
from sfumato.adapters import attach, target_layers
from sfumato.files import Sampling, read_header, read_lora, read_tensors, write_lora
from sfumato.files.metadata import sampling_of
from sfumato.generation.draw import draw
from sfumato.models import diffusion, load_base
from sfumato.precision import decide
from sfumato.training.methods.lcm import prompts_to_draw
from sfumato.training.pretrain.dataset import known_prompts
from sfumato.utils import randomness, schedulers
from tests.logged import log_beside

pytestmark = pytest.mark.usefixtures("quick")
EPS = 1e-5
"""Adam's own 1e-8 makes a step out of a gradient that is only rounding, which differs from CPU to CPU."""


@pytest.fixture
def train(pocket_folder, pictures, tmp_path):
    """Train with these options on the tiny base; returns the adapter's path."""

    def run(name, *options, base=pocket_folder, code=0):
        words = {"--images": str(pictures), "--caption": "{caption}", "--output": str(tmp_path / name)}
        words |= {"--base": str(base), "--steps": "3", "--batch": "2", "--rank": "2", "--targets": "cross-attention"}
        words |= {"--learning-rate": "1e-2", "--precision": "fp32", "--sample-every": "0", "--measure-every": "0"}
        words |= {"--checkpoint-every": "0", "--optimizer-args": f"eps={EPS}"}
        words |= dict(zip(options[::2], options[1::2], strict=True))
        given = [word for pair in words.items() if pair[1] for word in (pair if pair[1] != "yes" else pair[:1])]
        assert cli.main(["train", "lcm", *given]) == code
        return tmp_path / name / f"{name}.safetensors"

    return run


def test_equal_to_a_plain_loop_on_diffusers_schedulers(train, pocket_folder, pictures):
    """Algorithm 1 of Luo et al. 2023: the consistency function by LCMScheduler, the solver's step by DDIMScheduler."""
    path = train(
        "run", "--seed", "3", "--guidance", "4", "--schedule", "constant", "--clip", "0.5", "--solver-steps", "50"
    )
    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    dataset = data.prepare(data.read_folder(pictures, caption_template="{caption}"), base, resolution=64)
    lora = attach(target_layers(base.parts(text=False), "cross-attention"), rank=2, alpha=2.0, seed=3)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01, eps=EPS)
    lcm = LCMScheduler.from_config(base.scheduler.config)
    ddim = DDIMScheduler.from_config(
        base.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False
    )
    ddim.set_timesteps(50)

    def said(latents, t, captions):
        with torch.no_grad():
            hidden = base.encode_text(captions).hidden
        return base.unet(latents[None], t, encoder_hidden_states=hidden).sample[0]

    def end_of(latents, t, caption):
        lcm.set_timesteps(50)
        lcm._step_index = 49  # its last, which adds no noise
        return lcm.step(said(latents, t, [caption])[None], t, latents[None]).denoised[0]

    losses = []
    for step in range(3):
        batch = dataset.batch(3, step, 2)
        places = diffusion.stratified_timesteps(2, range(50), 3, step)
        loss = 0.0
        for i, (latents, caption, place) in enumerate(zip(batch.latents, batch.captions, places, strict=True)):
            t = torch.tensor(int(place) * 20 + 19)
            assert t in ddim.timesteps
            noisy = ddim.add_noise(latents, randomness.normal((4, 16, 16), 3, "noise", step, i), t)
            with torch.no_grad():
                with lora.disabled():
                    told, untold = said(noisy, t, [caption]), said(noisy, t, [""])
                moved = ddim.step(untold + 4 * (told - untold), t, noisy).prev_sample
                wanted = end_of(moved, (t - 20).clamp(min=0), caption)
            found = end_of(noisy, t, caption)
            loss = loss + (((found - wanted).square() + 1e-6).sqrt() - 1e-3).mean() / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lora.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert_close([row["loss"] for row in log_beside(path)], losses, rtol=1e-4, atol=1e-6)
    made = read_lora(path).modules
    for key, change in lora.changes().items():
        assert_close(made[key].up @ made[key].down, (change.up @ change.down).detach(), rtol=1e-3, atol=2e-5)
    assert max(float(layer.up.detach().abs().max()) for layer in lora.layers.values()) > 1e-3


def test_the_files_sampling_is_drawn_with_where_nothing_else_is_asked_for(train, pocket_folder, tmp_path, capsys):
    path = train("run", "--drawn-steps", "3")
    assert sampling_of(read_header(path).metadata) == Sampling("lcm", 3, 1.0)
    words = ["generate", "a square", "--base", str(pocket_folder), "--lora", str(path), "--seed", "5", "-o"]
    assert cli.main([*words, str(tmp_path / "asked.png")]) == 0
    assert "run: asks for 3 steps of lcm at guidance 1; --sampler, --steps and" in capsys.readouterr().err
    told = json.loads(Image.open(tmp_path / "asked.png").info["sfumato"])
    assert (told["sampler"], told["steps"], told["guidance"]) == ("LCM", 3, 1.0)
    assert cli.main([*words, str(tmp_path / "given.png"), "--steps", "2", "--sampler", "tcd"]) == 0
    told = json.loads(Image.open(tmp_path / "given.png").info["sfumato"])
    assert (told["sampler"], told["steps"], told["guidance"]) == ("TCD", 2, 1.0)
    grid = ["grid", "--base", str(pocket_folder), "--lora", str(path), "--x", "run=0,1", "--y", "prompt=a square"]
    capsys.readouterr()
    assert cli.main([*grid, "--size", "32", "-o", str(tmp_path / "grid")]) == 0
    assert "run: asks for 3 steps of lcm at guidance 1, in the images that it is in." in capsys.readouterr().err
    cells = [json.loads(Image.open(each).info["sfumato"]) for each in (tmp_path / "grid/cells").glob("*.png")]
    usual = load_base(str(pocket_folder)).defaults
    assert sorted((each["sampler"], each["steps"]) for each in cells) == [
        (schedulers.find_sampler(usual.sampler).label, usual.sampling_steps),
        ("LCM", 3),
    ]
    card = (path.parent / "README.md").read_text(encoding="utf-8")
    assert "LCMScheduler.from_config(pipe.scheduler.config)" in card
    assert "num_inference_steps=3, guidance_scale=1.0" in card
    assert "Draw in 3 steps of lcm at guidance 1" in card


def test_an_adapter_of_some_images_alone_is_not_followed_and_a_mix_asks_for_what_all_ask_for(
    train, pocket_folder, tmp_path, capsys
):
    path = train("run")
    words = ["--base", str(pocket_folder), "--size", "32", "--lora-folder", str(path.parent), "-o"]
    assert cli.main(["generate", "a dot <lora:run:0>", *words, str(tmp_path / "idle")]) == 0
    assert "asks for" not in capsys.readouterr().err
    some = ["generate", "a dot", "a dot <lora:run:1>", *words]
    assert cli.main([*some, str(tmp_path / "some")]) == 0
    assert "run: asks for 4 steps of lcm at guidance 1, but is not in every image. " in capsys.readouterr().err
    told = [json.loads(Image.open(each).info["sfumato"]) for each in (tmp_path / "some").glob("*.png")]
    assert {each["steps"] for each in told} == {load_base(str(pocket_folder)).defaults.sampling_steps}
    assert cli.main([*some, str(tmp_path / "given"), "--steps", "2", "--sampler", "lcm", "--guidance", "1"]) == 0
    assert "asks for" not in capsys.readouterr().err
    assert cli.main(["generate", "a dot <lora:run:1>", *words, str(tmp_path / "tagged")]) == 0
    assert "run: asks for 4 steps of lcm" in capsys.readouterr().err
    assert cli.main(["convert", str(path), "--to", "peft", "-o", str(tmp_path / "folder")]) == 0
    peft = ["generate", "a dot", "--lora", str(tmp_path / "folder"), *words, str(tmp_path / "peft")]
    assert cli.main(peft) == 0
    assert "folder: asks for 4 steps of lcm" in capsys.readouterr().err
    half, both = tmp_path / "half.safetensors", tmp_path / "both.safetensors"
    assert cli.main(["merge", f"{path}:0.5", f"{path}:0.5", "-o", str(half)]) == 0
    assert sampling_of(read_header(half).metadata) == Sampling("lcm", 4, 1.0)
    other = write_lora(tmp_path / "other.safetensors", read_lora(path).modules, family="pocket")
    capsys.readouterr()
    assert cli.main(["merge", f"{path}:1", f"{other}:1", "-o", str(both)]) == 0
    assert sampling_of(read_header(both).metadata) is None
    assert "run.safetensors: asks for 4 steps of lcm at guidance 1, " in capsys.readouterr().err


def test_of_files_that_ask_differently_the_first_counts_and_the_other_is_named(train, pocket_folder, tmp_path, capsys):
    paths = [train(name, "--drawn-steps", steps) for name, steps in (("two", "2"), ("three", "3"), ("also", "2"))]
    words = ["--base", str(pocket_folder), "--size", "32", "-o"]
    capsys.readouterr()
    for order, first, other in ((paths, "two", "three"), (paths[1::-1], "three", "two")):
        adapters = [word for path in order for word in ("--lora", str(path))]
        steps = {"two": 2, "three": 3}
        overruled = (
            f"{other}: asks for {steps[other]} steps of lcm at guidance 1, but {first} counts, which is named before"
            f" it. Name {other} first, or give --sampler, --steps and --guidance."
        )
        assert cli.main(["generate", "a dot", *adapters, *words, str(tmp_path / f"{first}.png")]) == 0
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "counts" in line] == [overruled]
        told = json.loads(Image.open(tmp_path / f"{first}.png").info["sfumato"])
        assert told["steps"] == steps[first]
        axis = ["--x", "prompt=a dot", "--y", "seed=1"]
        assert cli.main(["grid", *adapters, *axis, *words, str(tmp_path / f"{first}-grid")]) == 0
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "counts" in line] == [overruled]
        [cell] = (tmp_path / f"{first}-grid/cells").glob("*.png")
        assert json.loads(Image.open(cell).info["sfumato"])["steps"] == steps[first]


@pytest.mark.parametrize(
    "said",
    [
        *("", "[]", "{}", '{"sampler": "none", "steps": 4, "guidance": 1}'),
        '{"sampler": "lcm", "steps": 0, "guidance": 1}',
        '{"sampler": "lcm", "steps": "4", "guidance": 1}',
        '{"sampler": "lcm", "steps": 4, "guidance": -1}',
    ],
)
def test_a_file_that_asks_for_what_is_impossible_asks_for_nothing(said):
    assert sampling_of({"sfumato.sampling": said}) is None


def test_it_learns_to_draw_in_few_steps_what_is_drawn_in_many(train, pocket_folder):
    path = train("run", "--steps", "60", "--measure-every", "60", "--targets", "everything", "--rank", "4")
    fits = [row["fit"] for row in log_beside(path) if "fit" in row]
    assert fits[0] == pytest.approx(1.0)
    assert fits[-1] < 0.8


def test_on_what_the_base_draws_the_prompts_are_captions(train, pocket_folder, tmp_path):
    (tmp_path / "some.txt").write_text("a red square\na blue dot\n")
    own = ("--images", "", "--caption", "", "--prompts", str(tmp_path / "some.txt"), "--drawn", "3")
    path = train("run", *own, "--sample-every", "3", "--drawn-steps", "2")
    assert len(list((path.parent / "drawn").rglob("*.png"))) == 3
    assert "sfumato.dataset_sha256" not in read_header(path).metadata
    assert "a red square" in (path.parent / "config.toml").read_text()
    assert (path.parent / "samples.png").exists()


@pytest.mark.slow
def test_settings_of_prompts_are_no_words_of_the_images(train, tmp_path, capsys):
    (tmp_path / "some.json").write_text(
        json.dumps([{"prompt": "a red square", "width": 96, "negative_prompt": "dull"}])
    )
    own = ("--images", "", "--caption", "", "--prompts", str(tmp_path / "some.json"), "--drawn", "1", "--steps", "1")
    path = train("run", *own)
    [about] = (path.parent / "drawn").rglob("about.json")
    assert json.loads(about.read_text())["prompt"] == "a red square"
    assert "settings in prompts are left out; all images are generated alike" in capsys.readouterr().err


def test_a_sample_prompt_with_more_steps_than_the_sampler_takes_is_refused_before_the_training(train, tmp_path, capsys):
    train("run", "--sample-prompts", "a dot --s 60", "--sample-every", "1", code=2)
    assert "--s 60 in a prompt: 60 steps; this sampler takes at most 50" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_no_more_steps_are_drawn_than_the_solver_has():
    from tests.test_train_textual_inversion import base_of

    asked = {"output": Path("runs/a"), "prompts": ("a dot",)}
    for given, drawn in (({}, 4), ({"solver_steps": 2}, 2), ({"solver_steps": 20}, 4)):
        found, _ = resolve(Config(**asked, **given), base_of("sd1"), None, 1)
        assert found.drawn_steps == drawn


def test_prompts_are_drawn_in_turn():
    found = prompts_to_draw(["a", "b", "c"], 7, seed=0)
    assert sorted(found.count(each) for each in "abc") == [2, 2, 3]
    assert "crab, flat style" in known_prompts()
    assert "crab" in known_prompts()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--min-snr", "5"], "--min-snr has no effect here, where the loss is no error of noise; leave it out."),
        (["--noise-offset", "0.1"], "--noise-offset has no effect here"),
        (["--drawn-steps", "51"], "--drawn-steps is 51; it must be 1 to 50."),
        (["--drawn-steps", "3", "--solver-steps", "2"], "--drawn-steps is 3; it must be 1 to 2."),
        (["--drawn-steps", "11"], "--drawn-steps is 11; it must be 1 to 10."),
        (["--epochs", "2"], "--epochs: prompts are learned from, and no images of yours; give --steps."),
        (["--guidance", "-1"], "guidance -1: wanted 0 to 100; 3 to 9 is usual."),
        (["--solver-steps", "0"], "--solver-steps is 0; it must be 1 to 1000."),
        (["--caption", "a {caption}"], "--caption has no effect without --images"),
        (["--prompts", "<lora:ink:1> a dog"], "--prompts: <lora:ink:...> is not read here; leave it out."),
        (["--prompts", " "], "--prompts ' ': no words in it; write what is to be drawn."),
        (["--base", "x/y"], "--prompts is missing; give prompts of what you will draw, a file of them, or --images"),
        (
            ["--images", "here", "--drawn", "3"],
            "--drawn is for images that are generated, and --images are given; leave one out.",
        ),
    ],
)
def test_wrong_use_is_one_line(options, said, tmp_path, capsys):
    assert cli.main(["train", "lcm", "--output", str(tmp_path / "run"), *options]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfumato: ")]
    assert len(error) == 1
    assert said in error[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_family_learns(family, train, family_folder, pictures):
    path = train("run", "--steps", "2", "--resolution", "64", "--sample-every", "2", base=family_folder(family))
    assert all(bool(tensor.isfinite().all()) for tensor in read_tensors(path).values())
    assert sampling_of(read_header(path).metadata) == Sampling("lcm", 4, 1.0)


@pytest.mark.slow
def test_diffusers_draws_with_it_what_we_draw(train, pocket_folder):
    from sfumato import Adapter, compose

    path = train("run", "--steps", "10")
    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    with compose(base, Adapter(path)):
        [ours] = draw(base, "a square", 3, steps=4, sampler="lcm", guidance=1.0)
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(path))
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(3)}
    theirs = pipe("a square", **settings).images[0]
    pipe.unload_lora_weights()
    assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [["--algo", "loha"], ["--algo", "lokr"], ["--algo", "oft"], ["--dora"]])
def test_each_kind_learns(kind, train):
    path = train("run", *kind, *(["yes"] if len(kind) == 1 else []), "--measure-every", "3")
    assert log_beside(path)[-1]["fit"] != pytest.approx(log_beside(path)[0]["fit"])
