"""A base and a folder for the tests of the data layer."""

from pathlib import Path

import pytest
from made_up import FakeBase, noise_picture


@pytest.fixture
def base():
    return FakeBase()


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Six square pictures, named so that their names are captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(["red-apple", "crab", "house", "tulip", "rocket", "pizza"]):
        noise_picture(seed=number).save(folder / f"{name}.png")
    return folder
