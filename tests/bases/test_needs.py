"""What a base needs of images and captions, known without its weights."""

import json
import shutil
from pathlib import Path

import pytest

from sfumato.data.buckets import side_step
from sfumato.errors import BaseModelError
from sfumato.models.family import read_requirements


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pocket", (4, 64, 16)), ("sd1", (8, 512, 64)), ("sdxl", (8, 1024, 64)), ("sd2", (8, 768, 64))],
)
def test_what_a_base_wants_is_known_without_its_weights(name, expected):
    needs = read_requirements(name)
    step = side_step(needs.vae_factor, needs.levels, needs.resolution)
    assert (needs.vae_factor, needs.resolution, step) == expected
    assert needs.token_limit == 75


def test_a_folder_tells_the_same_as_the_loaded_base(pocket_folder):
    from sfumato.models import load_base
    from tests.tiny import CPU

    base, needs = load_base(str(pocket_folder), precision=CPU), read_requirements(str(pocket_folder))
    assert (needs.vae_factor, needs.resolution) == (base.vae_factor, base.resolution)
    assert needs.token_limit == base.token_limit
    caption = "a red cat " * 40
    assert needs.cut_off(caption) == base.cut_off(caption) != ""


def test_a_folder_comes_before_a_family_and_a_home_is_expanded(pocket_folder, tmp_path, monkeypatch):
    """As the trainers find a base."""
    shutil.copytree(pocket_folder, tmp_path / "sd1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert (
        read_requirements("sd1").resolution
        == read_requirements("~/sd1").resolution
        == read_requirements(str(pocket_folder)).resolution
    )
    assert (read_requirements("sd1").name, read_requirements("~/sd1").name) == ("sd1", "sd1")


def test_a_base_whose_size_is_two_numbers_has_its_family_s_resolution(pocket_folder, tmp_path):
    """As the loaded base has it."""
    folder = Path(shutil.copytree(pocket_folder, tmp_path / "base"))
    for part in ("unet", "vae"):
        config = json.loads((folder / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config | {"sample_size": [24, 16]}))
    assert read_requirements(str(folder)).resolution == read_requirements("pocket").resolution
    (folder / "vae" / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"base/vae/config\.json: no block_out_channels in it"):
        read_requirements(str(folder))


def test_a_base_that_is_not_here_names_the_families():
    with pytest.raises(BaseModelError, match=r"somebody/something: not on this machine.*sd1, sd2, sdxl"):
        read_requirements("somebody/something")
    with pytest.raises(BaseModelError, match=r"^--base is empty; name pocket, a folder, a file, a hub id or a family"):
        read_requirements("")
