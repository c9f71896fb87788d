"""Sample pictures are drawn as what is learned will be drawn with."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from sfumato.errors import ConfigError
from sfumato.training.sampling import make_sampler


def test_samples_of_a_lora_are_drawn_with_its_adapter_guidance(monkeypatch):
    """3 of guidance and 2 of strength: two thirds of the weight, in the second half of rows; with 0 as it is."""
    from sfumato.generation import draw as drawing

    seen, told = [], {"factor": 1.0, "off": False}

    class Unet(nn.Module):
        def forward(self, sample):
            seen.append((sample.tolist(), told["factor"], told["off"]))
            return (sample,)

    @contextmanager
    def now(**changes):
        before = dict(told)
        told.update(changes)
        yield
        told.update(before)

    def draw(base, prompts, seeds, **size):
        base.denoiser(torch.tensor([1.0, 2.0]))
        return [None] * len(prompts)

    monkeypatch.setattr(drawing, "draw_each", draw)
    base = SimpleNamespace(
        lazy_weights=SimpleNamespace(restored_after=nullcontext),
        denoiser=Unet(),
        defaults=SimpleNamespace(guidance=3.0),
    )
    lora = SimpleNamespace(scaled=lambda factor: now(factor=factor), disabled=lambda: now(off=True))
    make_sampler(base, lora, 2.0)(["a"], [5])
    make_sampler(base, lora, 0.0)(["a"], [5])
    make_sampler(base)(["a"], [5])
    plain = ([1.0, 2.0], 1.0, False)
    assert seen == [([1.0], 2 / 3, True), ([2.0], 2 / 3, False), plain, plain]
    assert told == {"factor": 1.0, "off": False}


def test_samples_have_the_negative_prompt_that_the_file_asks_for(monkeypatch):
    from sfumato.generation import draw as drawing

    given = []

    def draw(base, prompts, seeds, *, negative, **size):
        given.append((prompts, seeds, negative))
        return [f"{prompt} {seed}" for prompt, seed in zip(prompts, seeds, strict=True)]

    monkeypatch.setattr(drawing, "draw_each", draw)
    base = SimpleNamespace(lazy_weights=SimpleNamespace(restored_after=nullcontext))
    prompts = ["<a>, flat", "a dog", "<a> at sea", "<a>"]
    assert make_sampler(base, negatives=["<a>"])(prompts, [1, 2, 3, 4]) == [
        "<a>, flat 1", "a dog 2", "<a> at sea 3", "<a> 4",
    ]  # fmt: skip
    assert given == [(["<a>, flat", "<a> at sea"], [1, 3], "<a>"), (["a dog", "<a>"], [2, 4], "")]


def test_samples_of_a_lora_are_drawn_with_it_in_the_steps_that_its_file_asks_for(monkeypatch):
    from sfumato.generation import draw as drawing

    seen, told = [], {"off": False}

    class Unet(nn.Module):
        def forward(self, sample, timestep):
            seen.append((int(timestep), told["off"]))

    @contextmanager
    def disabled():
        told["off"] = True
        yield
        told["off"] = False

    def draw(base, prompts, seeds, **size):
        for timestep in (999, 200, 199):  # progress 0, 0.7998, 0.8008
            base.denoiser(torch.zeros(1), torch.tensor(timestep))
        base.denoiser(torch.zeros(1), timestep=torch.tensor([199]))
        return [None] * len(prompts)

    monkeypatch.setattr(drawing, "draw_each", draw)
    lazy_weights = SimpleNamespace(restored_after=nullcontext)
    base = SimpleNamespace(
        lazy_weights=lazy_weights, denoiser=Unet(), scheduler=DDIMScheduler(num_train_timesteps=1000)
    )
    make_sampler(base, SimpleNamespace(disabled=disabled), span=(0.0, 0.8))(["a"], [5])
    assert seen == [(999, False), (200, False), (199, True), (199, True)]
    assert told == {"off": False}
    base.denoiser(torch.zeros(1), torch.tensor(0))
    assert seen[-1] == (0, False)


def test_a_prompt_s_own_settings_go_before_the_training_s(monkeypatch):
    from sfumato.generation import draw as drawing

    given = []

    def draw(base, prompts, seeds, **settings):
        given.append((prompts, seeds, settings))
        return [f"{prompt} {seed}" for prompt, seed in zip(prompts, seeds, strict=True)]

    monkeypatch.setattr(drawing, "draw_each", draw)
    base = SimpleNamespace(
        lazy_weights=SimpleNamespace(restored_after=nullcontext),
        scheduler=DDIMScheduler(num_train_timesteps=1000),
        defaults=SimpleNamespace(sampler="dpm++"),
    )
    own = [{"seed": 7}, {"negative": "blurry", "steps": 3}, {}]
    drawn = make_sampler(base, negatives=["<a>"], own=own)(["<a> at sea", "<a> on land", "a dog"], [1, 1, 1])
    assert drawn == ["<a> at sea 7", "<a> on land 1", "a dog 1"]
    size = {"width": None, "height": None}
    assert given == [
        (["<a> at sea"], [7], {"negative": "<a>", **size}),
        (["a dog"], [1], {"negative": "", **size}),
        (["<a> on land"], [1], {"negative": "blurry", "steps": 3, **size}),
    ]
    with pytest.raises(ConfigError, match="1001 steps; wanted 1 to 1000"):
        make_sampler(base, own=[{"steps": 1001}])
