"""Pivotal tuning, a word and a LoRA learned together: equal to a plain loop."""

import errno
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch.testing import assert_close

from sfumato import cli, data
from sfumato.adapters.embeddings import embedding
from sfumato.files import read_lora, read_tensors
from sfumato.files.header import read_header
from sfumato.files.metadata import embedding_files_of
from sfumato.models import diffusion, load_base
from sfumato.utils import randomness
from tests.in_peft import layers_of_peft
from tests.logged import log_in
from tests.tiny import CPU

STEPS, SEED = 4, 3
RATE, WORD_RATE, CLIP = 1e-2, 3e-2, 0.5


def test_equal_to_a_plain_loop_over_peft_and_the_whole_table(pocket_folder, pictures, tmp_path):
    """One loss, |v - unet(x_t, t, text(c; v*); W + B A)|^2, whose gradient moves B, A (Hu et al. 2021) and the word's
    rows v* of the whole table (Gal et al. 2022) in the same step, each at its own rate."""
    words = ["--images", str(pictures), "--output", str(tmp_path / "run"), "--base", str(pocket_folder), "--rank", "2"]
    words += ["--caption", "a {caption}, <x>", "--train-words", "<x>", "--word-vectors", "2", "--batch", "2"]
    words += ["--steps", str(STEPS), "--seed", str(SEED), "--clip", str(CLIP), "--learning-rate", str(RATE)]
    words += ["--word-learning-rate", str(WORD_RATE), "--sample-every", "0", "--measure-every", "0"]
    words += ["--precision", "fp32"]
    assert cli.main(["train", "lora", "--learn", "plain", *words]) == 0

    base = load_base(str(pocket_folder), precision=CPU)
    folder = data.read_folder(pictures, caption_template="a {caption}, <x>")
    dataset = data.prepare(folder, base, resolution=64, embed_text=False)
    encoder, tokenizer = base.text_encoders[0], base.tokenizers[0]
    with embedding.new_words(base, ["<x>"], vectors=2, start="mean", seed=SEED) as new:
        start = new.rows[0].detach().clone()
    layers = layers_of_peft(base.unet, "cross-attention", seed=SEED)
    adapted = [p for p in base.unet.parameters() if p.requires_grad]

    tokenizer.add_tokens(["<x>", "<y>"])
    encoder.resize_token_embeddings(len(tokenizer))
    table = encoder.get_input_embeddings().weight.requires_grad_()
    norms = table.detach()[:-2].norm(dim=1).sort().values
    low, high = (norms[round(share * (len(norms) - 1))] for share in (0.05, 0.95))
    rows = torch.nn.Parameter(start.clone())
    groups = [{"params": adapted, "lr": RATE}, {"params": [rows], "lr": WORD_RATE}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        with torch.no_grad():
            table[-2:] = rows
        batch = dataset.batch(SEED, step, 2)
        prompts = [caption.replace("<x>", "<x> <y>") for caption in batch.captions]
        ids = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        shape = tuple(batch.latents.shape[1:])
        noise = torch.stack([randomness.normal(shape, SEED, "noise", step, place) for place in range(2)])
        timesteps = diffusion.stratified_timesteps(2, range(1000), SEED, step)
        a = base.alpha_bar[timesteps].view(-1, 1, 1, 1)
        noisy = a.sqrt() * batch.latents + (1 - a).sqrt() * noise
        velocity = a.sqrt() * noise - (1 - a).sqrt() * batch.latents
        hidden = encoder(ids).last_hidden_state
        loss = (base.unet(noisy, timesteps, encoder_hidden_states=hidden).sample - velocity).square().mean()
        loss.backward()
        rows.grad, table.grad = table.grad[-2:].clone(), None
        torch.nn.utils.clip_grad_norm_([*adapted, rows], CLIP)
        for group, rate in zip(optimizer.param_groups, (RATE, WORD_RATE), strict=True):
            group["lr"] = rate * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            norm = rows.norm(dim=1, keepdim=True)
            rows *= norm.clamp(low, high) / norm
        losses.append(loss.item())

    log = log_in(tmp_path / "run")
    assert_close([row["loss"] for row in log], losses, rtol=1e-4, atol=1e-6)
    assert_close(read_tensors(tmp_path / "run/run-x.safetensors")["<x>"], rows.detach(), rtol=1e-3, atol=1e-5)
    modules = read_lora(tmp_path / "run/run.safetensors").modules
    assert {name for _, name in modules} == layers.keys()
    for (_, name), module in modules.items():
        assert_close(module.delta(), layers[name].get_delta_weight("default").detach(), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(rows.detach(), start, atol=1e-3)
    assert max(module.delta().abs().max() for module in modules.values()) > 1e-3
    adapter, word = (read_header(tmp_path / "run" / name).metadata for name in ("run.safetensors", "run-x.safetensors"))
    assert embedding_files_of(adapter) == {"<x>": "run-x.safetensors"}
    assert embedding_files_of(word) == {}


@pytest.mark.slow
def test_a_lora_learns_beside_the_words_that_are_saved(pocket_folder, pictures, tmp_path):
    """With a running mean, which is what the words' file holds, and exactly so where the run was cut between."""
    words = [
        "train",
        "lora",
        "--learn",
        "plain",
        "--images",
        str(pictures),
        "--base",
        str(pocket_folder),
        "--caption",
        "<x> {caption}",
    ]
    words += [
        "--train-words",
        "<x>",
        "--steps",
        "4",
        "--batch",
        "1",
        "--rank",
        "1",
        "--ema",
        "0.9",
        "--words-first",
        "2",
    ]
    words += ["--schedule", "constant", "--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "1"]
    words += ["--keep", "9"]
    assert cli.main([*words, "--output", str(tmp_path / "run")]) == 0
    saved = read_tensors(tmp_path / "run/run-x.safetensors")["<x>"]

    def raw(step):
        held = read_tensors(tmp_path / f"run/checkpoints/{step:06d}/state.safetensors")
        return next(tensor for name, tensor in held.items() if name.startswith("/kept/words"))

    assert not torch.equal(raw(2), saved)
    assert_close(raw(3), saved, rtol=0, atol=0)
    assert_close(raw(4), saved, rtol=0, atol=0)
    whole = (tmp_path / "run/run.safetensors").read_bytes()
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"run/checkpoints/{step:06d}")
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    for name, tensor in read_tensors(tmp_path / "run/run.safetensors").items():
        assert torch.equal(tensor, load(whole)[name])


@pytest.mark.slow
def test_words_and_crossed_samples_go_on_with_what_they_began_from(pocket_folder, pictures, tmp_path, capsys):
    """Their crossed samples are drawn with the words as they were at the start, which no checkpoint holds."""
    words = [
        "train",
        "lora",
        "--learn",
        "plain",
        "--images",
        str(pictures),
        "--base",
        str(pocket_folder),
        "--caption",
        "<x> {caption}",
    ]
    words += ["--train-words", "<x>", "--batch", "1", "--rank", "1", "--sample-every", "0", "--measure-every", "0"]
    assert cli.main([*words, "--steps", "2", "--bundle", "--output", str(tmp_path / "first")]) == 0
    begin = ["--init-from", str(tmp_path / "first/first.safetensors"), "--crossed-share", "0.5", "--steps", "2"]
    assert cli.main([*words, *begin, "--checkpoint-every", "1", "--output", str(tmp_path / "run")]) == 0
    shutil.rmtree(tmp_path / "run/checkpoints/000002")
    shutil.rmtree(tmp_path / "first")
    capsys.readouterr()
    assert cli.main(["resume", str(tmp_path / "run")]) == 2
    assert "first.safetensors: there is no such file; name the adapter to begin with" in capsys.readouterr().err


@pytest.mark.slow
def test_a_card_that_lacks_the_words_is_written_by_going_on(pocket_folder, pictures, tmp_path, monkeypatch, capsys):
    """The adapter's own end is not the run's: the words come after it."""
    folder = tmp_path / "run"
    words = [
        "train",
        "lora",
        "--learn",
        "plain",
        "--images",
        str(pictures),
        "--output",
        str(folder),
        "--base",
        str(pocket_folder),
    ]
    words += ["--caption", "<x>", "--train-words", "<x>", "--steps", "1", "--batch", "1", "--rank", "1"]
    words += ["--sample-every", "0", "--measure-every", "0", "--device", "cpu"]

    def full(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device", "README.md")

    with monkeypatch.context() as broken:
        broken.setattr("sfumato.training.cards.methods.add_words_section", full)
        assert cli.main(words) == 2
    assert f"the rest is written by: sfumato resume {folder}" in capsys.readouterr().err
    assert cli.main(["resume", str(folder)]) == 0
    assert "<x>" in (folder / "README.md").read_text()
