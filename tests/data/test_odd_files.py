"""Forty kinds of files, and twenty-five mutations of each: no crash, no wrong pixels, each refusal by name."""

import numpy as np
import pytest
from odd_files import CHECKED, Kind, kinds, mutations
from PIL import Image

from sfumato.data.images import open_picture, read_size, upright_size
from sfumato.errors import DataError

KINDS = kinds()


def written(folder, kind: Kind, data: bytes):
    path = folder / f"odd.{kind.suffix}"
    path.write_bytes(data)
    return path


def looked_at(path):
    """The pixels, or the one line that says why not."""
    try:
        return np.asarray(open_picture(path).image), ""
    except DataError as error:
        return None, str(error)


def test_there_are_forty_kinds_with_twenty_five_mutations():
    assert len(KINDS) >= 40
    assert all(len(mutations(kind.data, np.random.default_rng(0))) == 25 for kind in KINDS.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_whole_file_shows_its_pixels_or_is_refused_by_name(name, tmp_path):
    kind = KINDS[name]
    path = written(tmp_path, kind, kind.data)
    pixels, error = looked_at(path)
    if kind.pixels is None:
        assert error.startswith(f"{path.name}: ")
        return
    assert error == ""
    assert pixels.shape == kind.pixels.shape
    assert np.abs(pixels.astype(int) - kind.pixels.astype(int)).max() <= kind.error
    assert upright_size(path) == (pixels.shape[1], pixels.shape[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_never_crashes_and_is_refused_by_name(name, tmp_path):
    """What has checksums shows its own pixels or none; what is cut short does so in every format."""
    kind = KINDS[name]
    own = looked_at(written(tmp_path, kind, kind.data))[0]
    for what, data in mutations(kind.data, np.random.default_rng(len(name))):
        path = written(tmp_path, kind, data)
        pixels, error = looked_at(path)
        if pixels is None:
            assert error.startswith(f"{path.name}: "), what
            assert "\n" not in error, what
            continue
        assert pixels.ndim == 3, what
        assert own is not None, what
        if what.startswith("cut") or (kind.data[1:4].lower() == b"png" and "png" in CHECKED):
            assert np.array_equal(pixels, own), what
        try:
            read_size(path)
        except DataError as error:
            pytest.fail(f"{what}: opened, but its header was refused: {error}")


def test_no_format_is_opened_that_is_not_on_the_list(tmp_path):
    """Pillow itself would open these."""
    for suffix, kind in (("png", "PPM"), ("jpg", "TGA"), ("webp", "ICO"), ("gif", "PCX")):
        path = tmp_path / f"a.{suffix}"
        Image.new("RGB", (32, 32), "red").save(path, kind)
        with pytest.raises(DataError, match=f"^a.{suffix}: not an image that is opened here"):
            open_picture(path)
