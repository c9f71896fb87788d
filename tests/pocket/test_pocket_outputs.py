"""Sheets of what the base draws while it learns."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from sfumato.errors import BaseModelError
from sfumato.pocket.outputs import save_sheet, sheet


def test_the_sheet_shows_what_the_base_learns(monkeypatch, tmp_path):
    asked = []

    def pipeline(prompts, **_):
        asked.append(prompts)
        return SimpleNamespace(images=torch.full((len(prompts), 3, 8, 8), 0.5))

    sheet(pipeline, ["oil"], ["crab", "sled", "house"], tmp_path / "known.png")
    sheet(pipeline, ["oil", "ink"], ["sled", "lamp"], tmp_path / "own.png")
    assert asked == [
        ["crab, oil style", "house, oil style"],
        ["sled, oil style", "lamp, oil style", "sled, ink style", "lamp, ink style"],
    ]


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
