"""Shared by the tests of programs: a tiny pocket base, a folder of pictures, and no network."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Small models gain nothing from threads, and the tests run in as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def pocket_folder(tmp_path_factory) -> Path:
    """A pocket-like base with random weights, as a diffusers folder named pocket."""
    from tests.tiny import tiny_pocket_folder

    return tiny_pocket_folder(tmp_path_factory.mktemp("base") / "pocket")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Six pictures of coloured squares, named after what they show."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(["red", "green", "blue", "gold", "black", "pink"]):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste(colour, (8 + number, 8, 40, 48))
        picture.save(folder / f"{colour}-square.png")
    return folder
