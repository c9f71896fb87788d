"""What the tests of the pocket base's training learn from."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def data(tmp_path):
    """Two styles of three plain squares, one cell withheld."""
    folder = tmp_path / "data"
    for s, style in enumerate(("noto", "flat")):
        for c, concept in enumerate(("red-apple", "crab", "key")):
            (folder / style).mkdir(parents=True, exist_ok=True)
            pixels = np.full((64, 64, 3), 255, np.uint8)
            pixels[10 + 10 * s : 40, 10 : 20 + 15 * c, c] = 0
            Image.fromarray(pixels).save(folder / style / f"{concept}.png")
    concepts = {"red apple": "a fruit", "crab": "a sea animal", "key": "a tool"}
    manifest = {"styles": ["noto", "flat"], "concepts": concepts, "withheld": [["key", "flat"]]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "words.txt").write_text("picture\nof\n")
    return folder


@pytest.fixture
def resized(data):
    """The same pictures with another side, which it is called with."""

    def to(side):
        for path in data.rglob("*.png"):
            Image.open(path).resize((side, side)).save(path)
        return data

    return to
