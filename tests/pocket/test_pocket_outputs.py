"""Sheets of what the base draws while it learns."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from sfumato.errors import BaseModelError
from sfumato.training.pretrain import outputs
from sfumato.training.pretrain.outputs import PretrainState, save_sheet, sheet
from tests.tiny import CPU


def test_the_sheet_shows_what_the_base_learns(monkeypatch, tmp_path):
    asked, seeds = [], []

    def pipeline(prompts, generator, guidance_scale, num_inference_steps, **_):
        asked.append(prompts)
        seeds.append([each.initial_seed() for each in generator])
        assert (guidance_scale, num_inference_steps) == (2.5, 12)
        return SimpleNamespace(images=torch.full((len(prompts), 3, 8, 8), 0.5))

    sheet(pipeline, ["oil"], ["crab", "sled", "house"], tmp_path / "known.png")
    sheet(pipeline, ["oil", "ink"], ["sled", "lamp"], tmp_path / "own.png")
    assert asked == [
        ["crab, oil style", "house, oil style"],
        ["sled, oil style", "lamp, oil style", "sled, ink style", "lamp, ink style"],
    ]
    assert seeds[1] == seeds[0] * 2  # by the column
    assert len(set(seeds[0])) == 2
    assert set(Image.open(tmp_path / "known.png").getdata()) == {(128, 128, 128)}


def test_a_sheet_with_a_black_or_broken_picture_is_not_written(tmp_path):
    grey = torch.zeros(2, 3, 8, 8)
    for value in (-1.0, float("nan"), float("inf")):
        broken = grey.clone()
        broken[1] = value
        with pytest.raises(BaseModelError, match="black or not finite"):
            save_sheet(broken, 2, tmp_path / "sheet.png")
        assert list(tmp_path.iterdir()) == []
    save_sheet(grey, 2, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (16, 8)


def test_a_sample_is_drawn_with_the_averaged_weights(monkeypatch, tmp_path):
    layer = nn.Linear(1, 1)
    nn.init.zeros_(layer.weight)
    how = {"optimizer": "adamw", "learning_rate": 0.1, "weight_decay": 0.0, "ema": 0.5, "largest_norm": 1.0}
    trained = PretrainState({"a": layer}, torch.device("cpu"), **how)
    nn.init.ones_(layer.weight)
    drawn = []
    monkeypatch.setattr(outputs, "sheet", lambda *_: drawn.append((layer.training, layer.weight.item())))
    run = SimpleNamespace(folder=tmp_path, every=lambda every, sample: sample(every))
    outputs.draw_samples(run, 5, trained, CPU, None, ["noto"], ["crab"])
    assert drawn == [(False, 0.0)]
    assert (layer.training, layer.weight.item()) == (True, 1.0)
