"""A base and folders for the tests of the data layer."""

import shutil
from pathlib import Path

import pytest
from made_up import FakeBase, noise_picture, smooth_noise
from PIL import Image, ImageFilter


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


@pytest.fixture
def messy(messy_once, tmp_path) -> Path:
    """Pictures with one flaw each, and some without; a copy for each test."""
    return Path(shutil.copytree(messy_once, tmp_path / "messy"))


@pytest.fixture(scope="session")
def messy_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("messy")
    for number in range(3):
        smooth_noise(number).save(folder / f"good-{number}.png")
    smooth_noise(0).save(folder / "twin.png")
    smooth_noise(1).resize((240, 240)).save(folder / "near.jpg", quality=60)
    smooth_noise(5).filter(ImageFilter.GaussianBlur(24)).save(folder / "soft.png")
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    Image.new("RGB", (64, 64), "teal").save(folder / "teal.png")
    noise_picture(20, 20, seed=9).save(folder / "tiny.png")
    noise_picture(200, 64, seed=10).save(folder / "wide.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_picture(96, 64, seed=11).save(folder / "turned.jpg", exif=exif)
    (folder / "notes.doc").write_text("x")
    for path in folder.glob("*.*g"):
        path.with_suffix(".txt").write_text(f"a picture of {path.stem}")
    (folder / "tiny.txt").write_bytes("café élégant, déjà vu".encode("cp1252"))
    (folder / "good-2.txt").unlink()
    return folder
