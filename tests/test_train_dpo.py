"""Preferences: equal to a plain loop of the paper's loss, measured against the start, exact to resume."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sfumato.trainers.dpo import Config, resolve
from torch.testing import assert_close

from bench.runs_resume import run as run_apart
from sfumato import cli, data
from sfumato.adapters import attach, target_layers
from sfumato.data import ExampleSet
from sfumato.data.preparation import prepare
from sfumato.files import Description, Sampling, describe, read_header, read_lora, read_tensors
from sfumato.files.metadata import adapter_guidance_of, negatives_of, over_steps_of, sampling_of, trigger_words
from sfumato.models import diffusion, load_base
from sfumato.precision import decide
from sfumato.training import sampling
from sfumato.utils import randomness
from tests.logged import log_beside
from tests.runs.said import lines
from tests.test_train_slider import assert_equal, assert_near

pytestmark = pytest.mark.usefixtures("quick")
BETA = 300.0
EPS = 1e-5
"""Adam's own 1e-8 makes a step out of a gradient that is only rounding, which differs from CPU to CPU."""


@pytest.fixture
def pairs(tmp_path):
    """Two folders of four images of the same names, coloured squares and grey ones."""
    for folder, colours in (("good", ["red", "gold", "blue", "pink"]), ("bad", ["#444", "#888", "#222", "#bbb"])):
        (tmp_path / folder).mkdir()
        for place, colour in enumerate(colours):
            picture = Image.new("RGB", (64, 64), "white")
            picture.paste(colour, (8 + place, 8, 40, 48))
            picture.save(tmp_path / folder / f"square-{place}.png")
    return {"--preferred": str(tmp_path / "good"), "--rejected": str(tmp_path / "bad"), "--caption": "a square"}


@pytest.fixture
def train(pocket_folder, pairs, tmp_path):
    """Train with these options on the tiny base; returns the adapter's path."""

    def run(name, *options, base=pocket_folder, code=0):
        words = {**pairs, "--output": str(tmp_path / name), "--base": str(base), "--steps": "4", "--batch": "2"}
        words |= {"--rank": "2", "--learning-rate": "1e-2", "--precision": "fp32", "--sample-every": "0"}
        words |= {"--targets": "cross-attention", "--resolution": "64", "--beta": str(BETA)}
        words |= {"--measure-every": "0", "--checkpoint-every": "0", "--optimizer-args": f"eps={EPS}"}
        words |= {"--save-precision": "fp32"}
        words |= dict(zip(options[::2], options[1::2], strict=True))
        given = [word for pair in words.items() for word in ((pair[0],) if pair[1] == "yes" else pair)]
        assert cli.main(["train", "dpo", *given]) == code
        return tmp_path / name / f"{name}.safetensors"

    return run


def plain_loop(folder, tmp_path, start=None):
    """Four steps of AdamW on rank 2 against eq. 14, written out; returns the losses and the changes."""
    base = load_base(str(folder), precision=decide("fp32", device="cpu"))
    sets = [
        data.prepare(
            data.read_folder(tmp_path / name, caption_template="a square"), base, resolution=64, embed_text=False
        )
        for name in ("good", "bad")
    ]
    lora = attach(target_layers(base.parts(text=False), "cross-attention"), rank=2, alpha=2.0, seed=3)
    before = attach(target_layers(base.parts(text=False), "cross-attention"), rank=2, alpha=2.0, seed=3)
    before.detach()
    if start is not None:
        lora.load(read_lora(start).modules, "start")
        before.load(read_lora(start).modules, "start")
    fixed = [parameter.detach().clone() for parameter in before.parameters()]
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01, eps=EPS)
    with torch.no_grad():
        hidden = base.encode_text(["a square"] * 2).hidden
    losses = []
    for step in range(4):
        batches = [each.batch(3, step, 2) for each in sets]
        shape = batches[0].latents.shape[1:]
        noise = torch.stack([randomness.normal(tuple(shape), 3, "noise", step, i) for i in range(2)])
        t = diffusion.stratified_timesteps(2, range(1000), 3, step)
        a = base.alpha_bar[t].view(-1, 1, 1, 1)

        def errors(latents, noise=noise, t=t, a=a):
            said = base.unet(a.sqrt() * latents + (1 - a).sqrt() * noise, t, encoder_hidden_states=hidden).sample
            v = a.sqrt() * noise - (1 - a).sqrt() * latents
            wanted = noise if base.prediction_type == "epsilon" else v
            return (said - wanted).square().mean((1, 2, 3))

        now = [parameter.detach().clone() for parameter in lora.parameters()]
        with torch.no_grad():
            for parameter, value in zip(lora.parameters(), fixed, strict=True):
                parameter.copy_(value)
            ref_w, ref_l = (errors(batch.latents) for batch in batches)
            for parameter, value in zip(lora.parameters(), now, strict=True):
                parameter.copy_(value)
        w, l = (errors(batch.latents) for batch in batches)  # noqa: E741  # the paper's letters
        loss = -torch.log(torch.sigmoid(-BETA / 2 * ((w - ref_w) - (l - ref_l)))).mean()
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in lora.parameters()]))
        for parameter in lora.parameters():
            parameter.grad *= min(1.0, 1.0 / (float(norm) + 1e-6))
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 4))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {key: (change.up @ change.down).detach() for key, change in lora.changes().items()}


@pytest.mark.parametrize("family", ["pocket", "sd1"])
def test_equal_to_a_plain_loop(family, train, family_folder, pocket_folder, tmp_path):
    """Wallace et al. 2023, eq. 14; pocket predicts v, and SD 1.x noise."""
    folder = pocket_folder if family == "pocket" else family_folder(family)
    path = train("run", "--seed", "3", base=folder)
    losses, changes = plain_loop(folder, tmp_path)
    assert_close([row["loss"] for row in log_beside(path)], losses, rtol=1e-4, atol=1e-5)
    assert losses[0] == pytest.approx(math.log(2))
    made = read_lora(path).modules
    for key, change in changes.items():
        assert_close(made[key].up @ made[key].down, change, rtol=1e-3, atol=1e-4)
    assert max(float(change.abs().max()) for change in changes.values()) > 1e-3


def test_one_that_goes_on_is_measured_against_its_start(train, pocket_folder, tmp_path):
    first = train("first", "--seed", "9")
    path = train("run", "--seed", "3", "--init-from", str(first))
    losses, changes = plain_loop(pocket_folder, tmp_path, first)
    assert_close([row["loss"] for row in log_beside(path)], losses, rtol=1e-4, atol=1e-5)
    made = read_lora(path).modules
    for key, change in changes.items():
        assert_close(made[key].up @ made[key].down, change, rtol=1e-3, atol=1e-4)


def test_one_that_goes_on_from_a_style_is_drawn_as_the_style_is(train, tmp_path, monkeypatch):
    asked = {"adapter_guidance": 2.0, "over_steps": (0.25, 1.0), "negatives": ("ink",), "trigger": ["ink style"]}
    asked["sampling"] = Sampling("lcm", 3, 1.0)
    style = read_tensors(train("first", "--seed", "9"))
    save_file(style, tmp_path / "style.safetensors", describe(Description("style", "pocket", **asked)))
    drawn = []
    monkeypatch.setattr(sampling, "make_sampler", lambda *given, **more: drawn.append((*given[2:], more)) or give_white)
    path = train("run", "--init-from", str(tmp_path / "style.safetensors"), "--sample-every", "4")
    told = read_header(path).metadata
    assert adapter_guidance_of(told) == 2.0
    assert over_steps_of(told) == (0.25, 1.0)
    assert negatives_of(told) == ("ink",)
    assert trigger_words(told) == ["ink style"]
    assert sampling_of(told) == asked["sampling"]
    [(strength, span, more)] = drawn
    assert (strength, span, more["negatives"]) == (2.0, (0.25, 1.0), ("ink",))
    assert more["usual"] == {"sampler": "lcm", "steps": 3, "guidance": 1.0}
    own = train("own", "--init-from", str(tmp_path / "style.safetensors"), "--over-steps", "0-0.5")
    assert over_steps_of(read_header(own).metadata) == (0.0, 0.5)


def give_white(prompts, seeds):
    return [Image.new("RGB", (64, 64), "white") for _ in seeds]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [["--algo", "loha"], ["--algo", "lokr"], ["--algo", "oft"], ["--dora", "yes"]])
def test_each_kind_begins_with_nothing_learned_and_so_does_one_that_goes_on(kind, train):
    own = [*kind, "--beta", "5000", "--measure-every", "4"]
    first = train("first", *own)
    assert log_beside(first)[0]["fit"] == pytest.approx(1.0)
    assert log_beside(first)[-1]["fit"] < 0.95
    again = train("again", *own, "--init-from", str(first), "--dropout", "0.5" if "--dora" not in kind else "0")
    assert log_beside(again)[0]["fit"] == pytest.approx(1.0)
    assert log_beside(again)[0]["drift"] == 0
    assert log_beside(again)[-1]["fit"] != pytest.approx(1.0, abs=1e-3)


def test_pairs_that_come_in_no_step_are_told_once_and_captions_embedded_once(train, monkeypatch, capsys):
    embedded, own = [], prepare.CaptionEmbeddings
    monkeypatch.setattr(prepare, "CaptionEmbeddings", lambda *given: embedded.append(given) or own(*given))
    train("run", "--steps", "1")
    assert len(embedded) == 1
    assert len([line for line in lines(capsys) if "come in none" in line]) == 1


def test_it_learns_to_tell_them_apart(train):
    path = train("run", "--steps", "30", "--measure-every", "30", "--seed", "1", "--batch", "4")
    told = log_beside(path)
    assert told[0]["fit"] == pytest.approx(1.0)
    assert told[-1]["fit"] < 0.5
    last = [row for row in told if "loss" in row][-1]
    assert last["accuracy"] == 1.0
    assert last["margin"] > 1
    assert last["preferred"] < last["rejected"]


@pytest.mark.slow
def test_the_same_run_gives_the_same_file_and_accumulating_is_a_larger_batch(train):
    own = ("--caption-dropout", "0.4", "--noise-offset", "0.1", "--min-snr", "5")
    once, twice = train("a", *own, "--batch", "4", "--name", "a"), train("b", *own, "--batch", "4", "--name", "b")
    assert_equal(once, twice)
    assert_near(once, train("c", *own, "--batch", "2", "--accumulate", "2"))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(train, pairs, pocket_folder, tmp_path):
    one, log = train("one", "--batch", "4"), tmp_path / "two.log"
    words = [*(word for pair in pairs.items() for word in pair), "--output", str(tmp_path / "two")]
    words += ["--base", str(pocket_folder), "--steps", "4", "--batch", "2", "--rank", "2", "--learning-rate", "1e-2"]
    words += ["--precision", "fp32", "--device", "cpu", "--sample-every", "0", "--measure-every", "0"]
    words += ["--optimizer-args", f"eps={EPS}", "--targets", "cross-attention", "--beta", str(BETA)]
    assert run_apart(["train", "dpo", *words], log=log, processes=2) == 0, log.read_text()[-2000:]
    assert_near(one, tmp_path / "two/two.safetensors")
    for mine, theirs in zip(log_beside(one), log_beside(tmp_path / "two/two.safetensors"), strict=True):
        for name in ("loss", "accuracy", "margin", "preferred", "rejected"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_checkpointed_layers_are_computed_again_as_they_were(train):
    first = train("first")
    own = ("--init-from", str(first), "--dropout", "0.3")
    assert_near(train("plain", *own), train("recomputed", *own, "--gradient-checkpointing", "yes"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_family_learns(family, train, family_folder):
    path = train("run", "--steps", "2", "--beta", "5000", base=family_folder(family))
    assert (
        read_header(path)
        .metadata["ss_base_model_version"]
        .startswith({"sdxl": "sdxl", "sd2": "sd_v2"}.get(family, "sd_v1"))
    )
    assert all(bool(tensor.isfinite().all()) for tensor in read_tensors(path).values())
    losses = [row["loss"] for row in log_beside(path)]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_in_bf16_an_adapter_of_nothing_has_no_margin(train):
    assert log_beside(train("run", "--precision", "bf16", "--beta", "5000"))[0]["margin"] == 0.0


@pytest.mark.slow
def test_prompts_that_shall_stay_stay_the_more_by_their_weight(train):
    light, heavy = (
        train(f"held-{weight}", "--prior-prompts", "a cat", "--prior-weight", weight, "--steps", "12")
        for weight in ("0.001", "1000")
    )
    assert log_beside(light)[0]["prior_loss"] == pytest.approx(0.0, abs=1e-9)  # an adapter of nothing changes nothing
    moved, held = (sum(row["prior_loss"] for row in log_beside(path)[-4:]) for path in (light, heavy))
    assert held < 0.5 * moved


@pytest.mark.slow
def test_generated_images_are_sorted_into_folders_and_learned_from(pocket_folder, tmp_path):
    words = ["--base", str(pocket_folder), "--seed", "3", "--count", "4"]
    assert cli.main(["generate", "a crab", "a (red) key", *words, "-o", str(tmp_path / "drawn")]) == 0
    files = sorted((tmp_path / "drawn").glob("*.png"))
    assert len(files) == 8
    for place, file in enumerate(files):
        folder = tmp_path / ("good" if place % 4 == 1 else "bad")
        folder.mkdir(exist_ok=True)
        shutil.move(file, folder / file.name)
    own = ["--preferred", str(tmp_path / "good"), "--rejected", str(tmp_path / "bad"), "--base", str(pocket_folder)]
    own += ["--output", str(tmp_path / "run"), "--steps", "1", "--sample-every", "1", "--measure-every", "0"]
    assert cli.main(["train", "dpo", *own]) == 0
    card = (tmp_path / "run/README.md").read_text(encoding="utf-8")
    assert "learned from 6 pairs of images" in card
    assert "a (red) key" in card
    assert str(tmp_path) not in json.dumps(dict(read_header(tmp_path / "run/run.safetensors").metadata))


@pytest.mark.slow
def test_the_config_of_a_run_runs_again(train, tmp_path):
    path = train("run")
    shutil.move(path.parent, tmp_path / "before")
    words = ["train", "dpo", str(tmp_path / "before/config.toml"), "--output", str(path.parent)]
    assert cli.main(words) == 0
    assert_equal(tmp_path / "before/run.safetensors", path)


@pytest.mark.slow
def test_a_run_goes_on_with_folders_that_were_moved_and_not_with_other_images(train, tmp_path, capsys):
    path = train("run", "--steps", "2")
    for name in ("good", "bad"):
        (tmp_path / name).rename(tmp_path / f"{name}-moved")
    words = ["resume", str(path.parent), "--preferred", str(tmp_path / "good-moved")]
    assert cli.main([*words, "--rejected", str(tmp_path / "bad-moved")]) == 0
    for folder in ("good-moved", "bad-moved"):
        (tmp_path / folder / "square-0.png").unlink()
    capsys.readouterr()
    assert cli.main([*words, "--rejected", str(tmp_path / "bad-moved")]) == 2
    assert "square-0.png is gone" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["pocket", "sd1", "sd2", "sdxl"])
def test_defaults(family):
    from tests.test_train_textual_inversion import base_of

    config = Config(output=Path("runs/a"), preferred=Path("a"), rejected=Path("b"))
    found, filled = resolve(config, base_of(family), ExampleSet(()), 1)
    assert None not in (found.beta, found.steps, found.batch)
    assert (found.min_snr, found.alpha) == (0.0, found.rank)
    assert "beta" in filled


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--preferred", "nowhere"), "--preferred nowhere: no such folder; give one that holds an image of each pair."),
        (("--rejected", "nowhere"), "--rejected nowhere: no such folder"),
        (("--beta", "0"), "--beta is 0.0; it must be a positive number"),
        (("--huber", "0.1"), "--huber has no effect here: the loss compares squared errors"),
        (("--caption-dropout", "2"), "--caption-dropout is 2.0; it must be 0 to 1"),
        (("--prior-weight", "2"), "--prior-weight has no effect without --prior-prompts"),
        (("--over-steps", "1-0"), "over-steps"),
        (("--init-from", "x.safetensors"), "--init-from x.safetensors: there is no such file"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_no_run(options, said, train, tmp_path, capsys):
    train("run", *options, code=2)
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_one_folder_is_no_pair_of_folders(train, pairs, capsys):
    train("run", "--rejected", pairs["--preferred"], code=2)
    assert "sort the images into two folders" in capsys.readouterr().err


@pytest.mark.parametrize("left", [20, 300])
def test_of_a_bad_image_no_option_is_advised_that_there_is_not(left, train, tmp_path, capsys):
    file = tmp_path / "bad" / "square-1.png"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:left])  # without its header, and without its end
    train("run", code=2)
    error = capsys.readouterr().err.strip()
    assert "1 of 4 images" in error
    assert error.endswith("Mend or remove them.")


def test_a_run_is_not_written_among_the_pairs(train, capsys):
    train("good", code=2)
    assert "is a folder of the images" in capsys.readouterr().err
