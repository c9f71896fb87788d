"""Textual Inversion: equal to a plain loop over the whole table, exact to resume, and the base stays as it was."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from sfumato.trainers.textual_inversion import Config, default_prompts, read_examples, resolve
from torch.testing import assert_close

from sfumato import cli, data
from sfumato.adapters import Attached
from sfumato.adapters.embeddings import embedding
from sfumato.files import read_adapter, read_embedding, read_header, read_lora, read_tensors
from sfumato.generation.draw import draw
from sfumato.models import diffusion, load_base
from sfumato.models.family import FAMILIES
from sfumato.precision import decide
from sfumato.training.cards import adapter as card
from sfumato.utils import randomness
from tests.logged import log_beside
from tests.tiny import CPU

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def train(pocket_folder, pictures, tmp_path):
    """Train with these options on the tiny base; returns the embedding's path."""

    def run(name="run", *options, base=pocket_folder, placeholder=("<x>",), code=0, **flags):
        words = {"--images": str(pictures), "--output": str(tmp_path / name), "--base": str(base)}
        words |= {"--steps": "4", "--batch": "2", "--vectors": "2", "--learning-rate": "1e-2"}
        words |= {"--sample-every": "0", "--measure-every": "0", "--checkpoint-every": "0"}
        words |= dict(zip(options[::2], options[1::2], strict=True))
        argv = [word for pair in words.items() for word in pair]
        argv += [word for token in placeholder for word in ("--placeholder", token)]
        argv += [f"--{flag}" for flag in flags]
        assert cli.main(["train", "textual_inversion", *argv]) == code
        return tmp_path / name / f"{name}.safetensors"

    return run


def test_equal_to_a_plain_loop_over_the_whole_table(train, pocket_folder, pictures):
    """Gal et al. 2022: the table grows by the new rows, all of it gets gradients, AdamW steps on the new rows alone."""
    options = ["--seed", "3", "--clip", "0.5", "--start", "random", "--precision", "fp32", "--min-timestep", "150"]
    options += ["--noise-offset", "0.2", "--min-snr", "5", "--warmup", "2", "--weight-decay", "0.1"]
    path = train("run", "--caption", "a {caption}, {trigger}", *options)

    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    folder = data.read_folder(pictures, caption_template="a {caption}, {trigger}", trigger="<x>")
    dataset = data.prepare(folder, base, resolution=64, embed_text=False)
    encoder, tokenizer = base.text_encoders[0], base.tokenizers[0]
    with embedding.new_words(base, ["<x>"], vectors=2, start="random", seed=3) as words:
        start = words.rows[0].detach().clone()

    tokenizer.add_tokens(["<x>", "<y>"])
    encoder.resize_token_embeddings(len(tokenizer))
    table = encoder.get_input_embeddings().weight.requires_grad_()
    norms = table.detach()[:-2].norm(dim=1).sort().values
    low, high = (norms[round(share * (len(norms) - 1))] for share in (0.05, 0.95))
    with torch.no_grad():
        table[-2:] = start
    new = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([new], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    losses = []
    for step, factor in enumerate([0.5, 1.0, 1.0, 0.5]):  # of the rate: two steps of warm-up, then half a cosine
        batch = dataset.batch(3, step, 2)
        prompts = [caption.replace("<x>", "<x> <y>") for caption in batch.captions]
        ids = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        noise = torch.stack([randomness.normal(tuple(batch.latents.shape[1:]), 3, "noise", step, i) for i in range(2)])
        noise += 0.2 * torch.stack([randomness.normal((4, 1, 1), 3, "noise offset", step, i) for i in range(2)])
        timesteps = diffusion.stratified_timesteps(2, range(150, 1000), 3, step)
        a = base.alpha_bar[timesteps].view(-1, 1, 1, 1)
        noisy = a.sqrt() * batch.latents + (1 - a).sqrt() * noise
        velocity = a.sqrt() * noise - (1 - a).sqrt() * batch.latents
        hidden = encoder(ids).last_hidden_state
        snr = (a / (1 - a)).flatten()
        error = (base.unet(noisy, timesteps, encoder_hidden_states=hidden).sample - velocity).square().mean((1, 2, 3))
        loss = (error * snr.clamp(max=5) / (snr + 1)).mean()
        (gradient,) = torch.autograd.grad(loss, table)
        new.grad = gradient[-2:] * min(1.0, 0.5 / (float(gradient[-2:].norm()) + 1e-6))
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        optimizer.step()
        with torch.no_grad():
            norm = new.norm(dim=1, keepdim=True)
            new *= norm.clamp(low, high) / norm
            table[-2:] = new
        losses.append(float(loss.detach()))
    assert_close([row["loss"] for row in log_beside(path)], losses, rtol=1e-4, atol=1e-6)
    assert_close(read_tensors(path)["<x>"], new.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(new.detach(), start, atol=1e-3)


def test_without_keep_scale_vectors_may_be_longer_than_all_of_the_table(train, pocket_folder):
    path = train("run", "--steps", "1", "--batch", "1", "--learning-rate", "3", **{"no-keep-scale": True})
    encoder = read_tensors(pocket_folder / "text_encoder/model.safetensors")
    longest = next(tensor for key, tensor in encoder.items() if "token_embedding" in key).norm(dim=1).max()
    assert (read_tensors(path)["<x>"].norm(dim=1) > 2 * longest).all()


def test_the_mean_of_the_vectors_is_what_is_saved(train, pocket_folder):
    """After one step it is 0.9 of the way from the start."""
    one_step, plain = ("--start", "random", "--steps", "1", "--precision", "fp32"), {"no-keep-scale": True}
    whole, mean = train("whole", *one_step, **plain), train("mean", *one_step, "--ema", "0.75", **plain)
    base = load_base(str(pocket_folder), precision=CPU)
    with embedding.new_words(base, ["<x>"], vectors=2, start="random") as words:
        start = words.rows[0].detach().clone()
    end = read_tensors(whole)["<x>"]
    assert (end - start).abs().amax() > 1e-3
    assert_close(read_tensors(mean)["<x>"], start.lerp(end, 0.9))


def test_the_same_run_gives_the_same_file(train):
    first, second = (train(name, "--name", "x", "--steps", "2") for name in ("a", "b"))
    tensors = [read_tensors(path.parent / "x.safetensors")["<x>"] for path in (first, second)]
    assert torch.equal(*tensors)


def test_accumulating_is_a_larger_batch(train):
    exact = ["--precision", "fp32"]
    whole, parts = train("whole", *exact), train("parts", *exact, "--batch", "1", "--accumulate", "2")
    assert_close(read_tensors(whole)["<x>"], read_tensors(parts)["<x>"], rtol=1e-4, atol=1e-5)


def test_stopped_and_resumed_is_not_stopped(train):
    """From the checkpoint of step 2, by --resume and a changed clock, the very bytes of the run that went through."""
    options = ["--start", "random", "--checkpoint-every", "2", "--ema", "0.5", "--measure-every", "1"]
    path = train("run", *options)
    whole, log = read_tensors(path)["<x>"].clone(), log_beside(path)
    shutil.rmtree(path.parent / "checkpoints" / "000004")
    path.unlink()
    train("run", *options, resume=True)
    assert torch.equal(read_tensors(path)["<x>"], whole)
    assert log_beside(path) == log


def test_a_checkpoint_holds_the_new_rows_alone(train):
    """Rows and two moments: 3 x 4 bytes for each of 2 x 32 numbers, and a kilobyte or two of names."""
    path = train("run", "--checkpoint-every", "2")
    newest = path.parent / "checkpoints" / "000004"
    numbers = sum(tensor.numel() for tensor in read_tensors(newest / "state.safetensors").values())
    assert numbers <= 3 * 2 * 32 + 8
    assert sum(file.stat().st_size for file in newest.iterdir()) < 8_000


def test_the_base_is_bit_for_bit_what_it_was(train, monkeypatch):
    import sfumato.models

    kept = []

    def remember(*args, **kwargs):
        base = load_base(*args, **kwargs | {"unet": True})
        kept.append((base, base.tokenizers, [t.clone() for t in tensors(base)]))
        return base

    def tensors(base):
        return [t for module in (base.unet, base.vae, *base.text_encoders) for t in module.state_dict().values()]

    monkeypatch.setattr(sfumato.models, "load_base", remember)
    train("run", "--sample-every", "2", "--measure-every", "2")
    ((base, tokenizers, before),) = kept
    assert base.vae.encoder.conv_in.weight.is_meta, "it rests while nothing is drawn"
    base.lazy_weights.load("vae")
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(base), strict=True))
    assert base.tokenizers == tokenizers
    assert "<x>" not in tokenizers[0].get_vocab()
    assert not any(p.grad is not None for p in base.unet.parameters())


def test_diffusers_draws_our_picture(train, pocket_folder):
    path = train("run", "--learning-rate", "0.1")
    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    settings = {"steps": 4, "guidance": 3.0, "sampler": "ddim"}
    without = np.asarray(draw(base, "a <x>", 5, **settings)[0], dtype=int)
    with embedding.load(base, path):
        ours = np.asarray(draw(base, "a <x>", 5, **settings)[0], dtype=int)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pocket_folder, safety_checker=None)
    pipe.load_textual_inversion(str(path))
    theirs = pipe(
        "a <x>",
        num_inference_steps=4,
        guidance_scale=3.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert abs(np.asarray(theirs, dtype=int) - ours).max() <= 1
    assert abs(without - ours).max() > 5


@pytest.mark.parametrize(
    "family", ["sdxl", pytest.param("sd1", marks=pytest.mark.slow), pytest.param("sd2", marks=pytest.mark.slow)]
)
def test_every_family_learns(family, train, family_folder):
    base = family_folder(family)
    options = ("--resolution", "64", "--steps", "1", "--templates", "object")
    path = train(family, *options, "--initial-words", "red square", base=base)
    file = read_embedding(path)
    (parts,) = file.embeddings.values()
    assert parts.keys() == {"text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    assert file.family == family
    plain = load_base(str(base), precision=decide("fp32", device="cpu"))
    with embedding.new_words(plain, ["<x>"], vectors=2, start="words", initial=["red square"]) as start:
        for part, learned in parts.items():
            assert (start.vectors()["<x>"][part] - learned).abs().amax() > 1e-3
    with embedding.load(plain, path) as words:
        assert list(words.tokens) == ["<x>"]


@pytest.mark.slow
def test_words_on_the_way_are_those_of_runs_that_end_there(train):
    steady = ("--schedule", "constant")
    path = train("run", *steady, "--save-every", "2")
    kept = path.parent / "adapters/run-step00000002.safetensors"
    assert [read_header(each).metadata["ss_steps"] for each in (kept, path)] == ["2", "4"]
    ended = train("ended", *steady, "--steps", "2")
    assert torch.equal(read_tensors(kept)["<x>"], read_tensors(ended)["<x>"])
    assert not torch.equal(read_tensors(kept)["<x>"], read_tensors(path)["<x>"])


def test_several_words_in_one_run_have_a_file_each(train, tmp_path):
    train("run", "--caption", "<a> {caption} <b>", placeholder=("<a>", "<b>"))
    tensors = {token: read_tensors(tmp_path / "run" / f"run-{token[1]}.safetensors") for token in ("<a>", "<b>")}
    assert {token: list(found) for token, found in tensors.items()} == {"<a>": ["<a>"], "<b>": ["<b>"]}
    assert not torch.equal(tensors["<a>"]["<a>"], tensors["<b>"]["<b>"])
    text = (tmp_path / "run" / "README.md").read_text()
    assert "run-a.safetensors" in text
    assert "run-b.safetensors" in text
    assert "instance_prompt" not in text  # the hub would tell to write both of them


def test_a_placeholder_takes_the_place_of_words(train, pictures):
    path = train("run", "--caption", "one {caption}", "--stands-for", "square")
    tags = json.loads(read_header(path).metadata["ss_tag_frequency"])["run"]
    assert set(tags) == {f"one {colour} <x>" for colour in ("red", "green", "blue", "gold", "black", "pink")}


def base_of(family):
    """What is asked of a base to fill a config."""
    one = FAMILIES[family]
    return SimpleNamespace(family=one, defaults=one.defaults, alpha_bar=range(1000))


@pytest.mark.parametrize(
    ("family", "options", "templates"),
    [
        ("sd1", {}, "object"),
        ("sdxl", {}, "object"),
        ("pocket", {}, "none"),
        ("sd1", {"caption": "{caption} {trigger}"}, "none"),
        ("sd1", {"stands_for": ("sks otter",)}, "none"),
        ("sd1", {"placeholder": ("<x>", "<y>")}, "none"),
        ("sd1", {"templates": "style"}, "style"),
        ("pocket", {"templates": "object"}, "object"),
    ],
)
def test_sentences_are_put_around_a_placeholder_that_is_alone(family, options, templates, tmp_path):
    """pocket has not seen such sentences."""
    config = Config(**{"images": tmp_path, "output": tmp_path, "placeholder": ("<x>",)} | options)
    assert resolve(config, base_of(family), data.ExampleSet(()), 1)[0].templates == templates


@pytest.mark.parametrize(
    ("family", "wanted"),
    [("pocket", (2e-2, 300, 8)), ("sd1", (2e-3, 3000, 4)), ("sd2", (2e-3, 3000, 4)), ("sdxl", (1e-3, 3000, 2))],
)
def test_each_family_has_its_own_rate_steps_and_batch(family, wanted, tmp_path):
    config, _ = resolve(
        Config(images=tmp_path, output=tmp_path, placeholder=("<x>",)), base_of(family), data.ExampleSet(()), 1
    )
    assert (config.learning_rate, config.steps, config.batch) == wanted
    assert config.vectors == 4


def test_samples_show_the_word_where_it_was_not_learned_however_many_captions_there_are():
    captions = ("<x> in fog", "<x> in fog", "a <x>, red", "<x> asleep", "two <x>")
    prompts = default_prompts([data.Example(Path("a.png"), caption) for caption in captions], ["<x>"])
    assert prompts == ["<x> in fog", "a <x>, red", "a drawing of a <x>", "<x> on a table"]


def test_a_template_may_have_wildcards_and_samples_show_the_first(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    given = {"images": tmp_path, "output": tmp_path / "run", "placeholder": ("<x>",), "wildcards": True}
    found = read_examples(Config(caption="{photo|picture} of <x>", **given))
    assert found.captions == ["photo of <x>", "picture of <x>"]
    assert default_prompts(found, ["<x>"])[0] == "photo of <x>"


@pytest.mark.slow
def test_measuring_and_drawing_do_not_change_the_training(train):
    quiet, watched = train("quiet"), train("watched", "--measure-every", "1", "--sample-every", "2")
    assert torch.equal(read_tensors(quiet)["<x>"], read_tensors(watched)["<x>"])
    assert len([row for row in log_beside(watched) if "fit" in row]) == 5


def test_a_batch_without_captions_teaches_nothing_and_breaks_nothing(train):
    path = train("run", "--caption-dropout", "0.999", "--weight-decay", "0", "--start", "random")
    assert all(np.isfinite(row["loss"]) for row in log_beside(path))


@pytest.mark.usefixtures("plotted")
def test_the_run_folder_tells_everything_and_no_path(train, tmp_path, pictures):
    path = train("run", "--sample-every", "2", "--measure-every", "2", "--resolution", "32")
    with Image.open(path.parent / "samples/000002/0.png") as sample:
        assert sample.size == (32, 32)
    names = {file.name for file in path.parent.iterdir()}
    assert {"config.toml", "log.jsonl", "plot.png", "samples.png", "README.md", "run.safetensors"} <= names
    metadata = read_header(path).metadata
    assert metadata["modelspec.trigger_phrase"] == metadata["sfumato.token"] == "<x>"
    assert metadata["modelspec.architecture"].endswith("/textual-inversion")
    assert len(metadata["sfumato.nearest_words"].splitlines()) == 2
    assert metadata["sfumato.nearest_words"].count("<x> ") == 2
    readme = (path.parent / "README.md").read_text()
    text = json.dumps(dict(metadata)) + readme
    assert str(tmp_path) not in text
    assert str(pictures) not in text
    assert 'load_textual_inversion("run.safetensors")' in readme
    assert "instance_prompt: <x>" in readme
    assert path.stat().st_size < 50_000


@pytest.mark.slow
def test_the_config_of_a_run_runs_again(train, tmp_path):
    first = train("run", "--seed", "5")
    words = [str(tmp_path / "run/config.toml"), "--output", str(tmp_path / "again")]
    assert cli.main(["train", "textual_inversion", *words]) == 0
    assert torch.equal(read_tensors(first)["<x>"], read_tensors(tmp_path / "again" / "run.safetensors")["<x>"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--vectors", "17"], "--vectors is 17"),
        (["--vectors", "0"], "--vectors is 0"),
        (["--caption", "{caption}"], "hold no placeholder"),
        (["--trigger", "zwx"], "--trigger zwx"),
        (["--placeholder", "red"], "is a word already"),
        (["--initial-words", " "], "are none"),
        (["--vectors", "16", "--caption", "{trigger}" + " {trigger}" * 4], "80 tokens"),
        (["--sample-prompts", "<x> " * 40], "80 tokens"),
        (["--learning-rate", "-1"], "--learning-rate is -1"),
        (["--caption-dropout", "1"], "--caption-dropout 1 drops the new word from every caption"),
        (["--placeholder", " "], "--placeholder is empty; give a new word"),
        (["--optimizer", "muon"], "--optimizer muon is for matrices, and a new word has none"),
        (["--initial-words", "red", "--start", "random"], "--initial-words and --start random"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_no_run(options, said, train, tmp_path, capsys):
    capsys.readouterr()
    placeholder = (options[1],) if options[0] == "--placeholder" else ("<x>",)
    train("run", *(options if options[0] != "--placeholder" else []), placeholder=placeholder, code=2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfumato: ")]
    assert len(error) == 1
    assert said in error[0]
    assert not (tmp_path / "run").exists()


def test_words_that_are_in_no_caption_are_refused(train, capsys):
    train("run", "--caption", "<a> {caption}", placeholder=("<a>", "<b>"), code=2)
    assert "<b> is in no caption" in capsys.readouterr().err
    train(
        "run", "--caption", "<a> <b>", "--initial-words", "red", "--stands-for", "a", placeholder=("<a>", "<b>"), code=2
    )
    assert "--stands-for is given 1 time for 2 placeholders" in capsys.readouterr().err
    train("run", "--caption", "a {caption}", "--stands-for", "", code=2)
    assert "--stands-for '': wanted words of the captions" in capsys.readouterr().err


# Pivotal tuning: trainers/lora.py --train-words


@pytest.fixture
def pivotal(pocket_folder, pictures, tmp_path):
    """Train a LoRA and the word <x> with these options on the tiny base; returns the two files."""

    def run(name="run", *options, base=pocket_folder, code=0):
        words = {"--images": str(pictures), "--output": str(tmp_path / name), "--base": str(base), "--rank": "2"}
        words |= {"--caption": "a {caption}, <x>", "--train-words": "<x>", "--word-vectors": "2", "--seed": "3"}
        words |= {"--steps": "4", "--batch": "2", "--learning-rate": "1e-2", "--word-learning-rate": "1e-2"}
        words |= {"--sample-every": "0", "--measure-every": "0", "--checkpoint-every": "0"}
        given = [option for option in options if option not in ("--bundle", "--resume")]
        words |= dict(zip(given[::2], given[1::2], strict=True))
        flags = [option for option in options if option in ("--bundle", "--resume")]
        assert (
            cli.main(["train", "lora", "--learn", "plain", *(word for pair in words.items() for word in pair), *flags])
            == code
        )
        return tmp_path / name / f"{name}.safetensors", tmp_path / name / f"{name}-x.safetensors"

    return run


@pytest.mark.slow
def test_in_turn_the_words_are_those_of_textual_inversion(pivotal, train):
    """Words first for 2 of 4 steps: the vectors of 2 steps of Textual Inversion, to the bit, and then a LoRA."""
    adapter, word = pivotal("run", "--words-first", "2")
    alone = train("alone", "--caption", "a {caption}, {trigger}", "--seed", "3", "--steps", "2")
    assert torch.equal(read_tensors(word)["<x>"], read_tensors(alone)["<x>"])
    assert [row["loss"] for row in log_beside(word)][:2] == [row["loss"] for row in log_beside(alone)]
    ups = [tensor for key, tensor in read_tensors(adapter).items() if key.endswith("lora_up.weight")]
    assert all(up.abs().sum() > 0 for up in ups)


@pytest.mark.slow
def test_a_bundle_goes_on_with_its_words(pivotal, capsys):
    first, _ = pivotal("first", "--bundle")
    still = ("--init-from", str(first), "--steps", "1", "--learning-rate", "1e-12", "--word-learning-rate", "1e-12")
    second, word = pivotal("second", *still)
    before = read_adapter(first)
    assert_close(read_tensors(word)["<x>"], before.embeddings["<x>"]["text_encoder"], rtol=1e-5, atol=1e-6)
    found = read_lora(second).modules
    for target, module in read_lora(first, words=True).modules.items():
        assert_close(found[target].delta(), module.delta(), rtol=1e-4, atol=1e-6)
    capsys.readouterr()
    pivotal("more", *still, "--word-vectors", "3", code=2)
    assert "first.safetensors: <x> has 2 vectors of width" in capsys.readouterr().err
    pivotal("words", *still, "--initial-words", "red", code=2)
    assert "--initial-words: <x> starts from its vectors in first.safetensors" in capsys.readouterr().err
    pivotal("other", *still, "--train-words", "<y>", "--caption", "a {caption}, <y>")
    assert 'first.safetensors: its word <x> is left behind; `train lora --train-words "<x>"` learns it on' in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_together_both_learn_from_the_first_step(pivotal, train):
    adapter, word = pivotal("run")
    alone = train("alone", "--caption", "a {caption}, {trigger}", "--seed", "3")
    ours, theirs = ([row["loss"] for row in log_beside(path)] for path in (word, alone))
    assert ours[0] == theirs[0]
    assert ours[1:] != theirs[1:]
    assert not torch.equal(read_tensors(word)["<x>"], read_tensors(alone)["<x>"])
    assert read_header(adapter).metadata["modelspec.trigger_phrase"] == "<x>"
    assert "load_textual_inversion" in (adapter.parent / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("turns", [(), ("--words-first", "3")])
def test_pivotal_tuning_stopped_and_resumed_is_not_stopped(turns, pivotal):
    options = [*turns, "--checkpoint-every", "2"]
    paths = pivotal("run", *options)
    whole = [{key: tensor.clone() for key, tensor in read_tensors(path).items()} for path in paths]
    shutil.rmtree(paths[0].parent / "checkpoints" / "000004")
    pivotal("run", *options, "--resume")
    for path, before in zip(paths, whole, strict=True):
        after = read_tensors(path)
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_one_bundle_on_request(pivotal, monkeypatch):
    beside, word = pivotal("beside")
    write_card, there = card.write_card, []

    def spied(folder, adapter, *rest):
        there.extend(read_adapter(adapter).embeddings)
        return write_card(folder, adapter, *rest)

    monkeypatch.setattr(card, "write_card", spied)
    bundle, none = pivotal("bundle", "--bundle")
    assert there == ["<x>"]  # a run that is killed on the way leaves no adapter without its words
    assert not none.exists()
    assert torch.equal(read_adapter(bundle).embeddings["<x>"]["text_encoder"], read_tensors(word)["<x>"])
    assert read_adapter(bundle).changes.keys() == read_adapter(beside).changes.keys()
    assert "bundle_emb.<x>.string_to_param.*" in read_header(bundle).tensors
    assert 'compose(pipe, Adapter("bundle.safetensors"))' in (bundle.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_each_adapter_on_the_way_has_its_words_and_its_step(pivotal, monkeypatch):
    """Those of step 2 are those of a run that ends there, beside them or bundled."""
    steady = ("--schedule", "constant")
    write, found = Attached.write, []

    def spied(adapter, path, **named):
        found.append(path.with_name(f"{path.stem}-x.safetensors").exists())
        return write(adapter, path, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Attached, "write", spied)
        adapter, _ = pivotal("run", "--save-every", "2", *steady)
    assert found == [True] * 3  # a run that is killed on the way leaves no adapter without its words
    ended, word = pivotal("ended", "--steps", "2", *steady)
    kept = adapter.parent / "adapters/run-step00000002.safetensors"
    assert read_header(kept).metadata["ss_steps"] == "2"
    beside = kept.with_name("run-step00000002-x.safetensors")
    assert torch.equal(read_tensors(beside)["<x>"], read_tensors(word)["<x>"])
    bundle, _ = pivotal("bundle", "--save-every", "2", "--bundle", *steady)
    inside = read_adapter(bundle.parent / "adapters/bundle-step00000002.safetensors")
    assert torch.equal(inside.embeddings["<x>"]["text_encoder"], read_tensors(word)["<x>"])
    assert inside.changes.keys() == read_adapter(ended).changes.keys()


def test_the_rate_is_that_of_what_learns(pivotal):
    """Either turn has its own cosine, from the whole rate to nothing."""
    _, word = pivotal("run", "--words-first", "2", "--word-learning-rate", "0.5")
    assert [row["rate"] for row in log_beside(word)] == pytest.approx([0.5, 0.25, 0.01, 0.005])


def test_what_is_said_of_words_is_said_of_a_loras_too(pivotal, capsys):
    options = ("--train-words", "zyxo", "--caption", "a {caption}, zyxo", "--initial-words", "a red crab")
    pivotal("run", *options, "--steps", "1", "--batch", "1")
    said = capsys.readouterr().err
    assert "zyxo is spelt like a word" in said
    assert "--initial-words 'a red crab': of " in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--words-first", "4"], "--words-first 4"),
        (["--words-first", "2", "--cycles", "2"], "--cycles 2: in 2 steps the learning rate can fall 1 time at most"),
        (["--words-first", "2", "--optimizer", "prodigy"], "--words-first with --optimizer prodigy"),
        (["--caption", "{caption}"], "hold no placeholder"),
        (["--word-vectors", "17"], "--word-vectors is 17"),
        (["--prior-prompts", "an <X>"], "holds <x>"),
        (["--stands-for", " "], "--stands-for ' '"),
        (["--train-words", "<x.1>", "--caption", "<x.1>", "--bundle"], "<x.1> has a dot"),
        (["--optimizer", "prodigy", "--learning-rate", "1"], "--word-learning-rate 0.01 beside --learning-rate 1.0"),
        (["--sample-prompts", "<x> " * 40], "80 tokens"),
    ],
)
def test_wrong_use_of_words_is_one_line(options, said, pivotal, capsys, tmp_path):
    capsys.readouterr()
    pivotal("run", *options, code=2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfumato: ")]
    assert len(error) == 1
    assert said in error[0]
    assert not (tmp_path / "run").exists()


def test_a_file_of_one_s_own_under_a_word_s_name_is_left_alone(train, tmp_path, capsys):
    mine = tmp_path / "run/run-x.safetensors"
    mine.parent.mkdir()
    mine.write_text("mine")
    train("run", "--caption", "{caption} <x> <y>", placeholder=("<x>", "<y>"), code=2)
    assert "holds run-x.safetensors and no run" in capsys.readouterr().err
    assert mine.read_text() == "mine"
