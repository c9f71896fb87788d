"""A folder with images, as trainings of other tools name it."""

import shutil

import pytest
from converting import TEDDY


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TEDDY, tmp_path / "img/10_sks bear")
    (tmp_path / "prompts.txt").write_text("# of a dog\nsks dog --w 512 --d 7\n\nsks dog's house\n")
    return tmp_path
