"""What several tests of `sfumato generate` look at."""

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(name: str | Path) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB"), dtype=int)


TWO = ["--lora", "line.safetensors:0.8", "--lora", "otter.safetensors:0.6"]
