"""The folder of pictures that the pocket base learns from: what is read, and what is refused in one line."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from sfumato.errors import DataError
from sfumato.training.pretrain.dataset import VARIANTS, read_manifest, read_others, read_words
from sfumato.training.pretrain.dataset import read_pictures as read_drawings


def test_a_missing_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json is missing; build the images with"):
        read_manifest(tmp_path)


def described(data, **changes):
    """The folder with other entries in its manifest; None takes one out."""
    manifest = json.loads((data / "manifest.json").read_text()) | changes
    (data / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))
    return data


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"styles": []}, '"styles" must be a list of names'),
        ({"concepts": None}, '"concepts" must be an object'),
        ({"concepts": ["crab", "key"]}, '"concepts" must be an object'),
        ({"withheld": [["flat", "key"]]}, '"withheld" has ["flat", "key"], which is no [concept, style]'),
        ({"withheld": [[["key"], "flat"]]}, '"withheld" has [["key"], "flat"], which is no [concept, style]'),
        ({"withheld": 2}, '"withheld" must be a list'),
    ],
)
def test_a_manifest_that_lacks_something_says_what(changes, said, data):
    with pytest.raises(DataError, match=re.escape(said)):
        read_manifest(described(data, **changes))


def test_a_manifest_that_is_no_json_says_where(data):
    (data / "manifest.json").write_text('{"styles": [')
    with pytest.raises(DataError, match=r"manifest\.json: not readable as JSON \(.*line 1"):
        read_manifest(data)


def test_a_manifest_that_nests_without_end_is_no_json(data):
    (data / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"manifest\.json: not readable as JSON"):
        read_manifest(data)


def test_words_are_read_with_a_byte_order_mark_and_refused_in_another_encoding(data):
    (data / "words.txt").write_text("picture\nof", encoding="utf-8-sig")
    assert read_words(data) == ["picture", "of"]
    (data / "words.txt").write_text("picture", encoding="utf-16")
    with pytest.raises(DataError, match=r"words\.txt cannot be read \(not UTF-8\)"):
        read_words(data)


def test_a_manifest_need_not_withhold_anything(data):
    assert len(read_drawings(described(data, withheld=None)).names) == 6
    (data / "manifest.json").write_text('{"withheld": null, ' + (data / "manifest.json").read_text()[1:])
    assert len(read_drawings(data).names) == 6


def test_a_picture_that_is_missing_or_of_another_size_is_named_with_its_style(data):
    path = data / "flat" / "crab.png"
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"flat/crab\.png: not an image"):
        read_drawings(data)
    Image.new("RGB", (64, 48)).save(path)
    with pytest.raises(DataError, match=r"flat/crab\.png is 64 x 48 px, .*noto/red-apple\.png 64 x 64"):
        read_drawings(data)
    path.unlink()
    with pytest.raises(DataError, match=r'crab\.png is missing; add it, or add \["crab", "flat"\] to'):
        read_drawings(data)


def test_sizes_that_the_shapes_cannot_halve_are_refused(resized):
    with pytest.raises(DataError, match="60 x 60 px; wanted squares of a multiple of 16 px"):
        read_drawings(resized(60))


def test_transparent_pictures_lie_on_white(data):
    for path in data.rglob("*.png"):
        Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(path)
    assert read_drawings(data).pixels.eq(255).all()


def test_other_drawings_of_another_size_are_refused(data):
    (data / "other" / "noto").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(data / "other" / "noto" / "red-heart.png")
    with pytest.raises(DataError, match="other drawings are 32 x 32 px, those of the concepts 64 x 64"):
        read_drawings(data).and_others(read_others(data))


def test_other_drawings_show_nothing_that_is_withheld(data):
    (data / "other/flat").mkdir(parents=True)
    shutil.copy(data / "noto/key.png", data / "other/flat/key.png")
    with pytest.raises(DataError, match=r'key\.png shows what manifest\.json withholds, \["key", "flat"\]'):
        read_others(data)


def test_variants_are_the_picture_and_eleven_lossless_changes_of_it(data):
    drawn = read_drawings(data)
    twelve = [drawn.varied(variant).pixels for variant in VARIANTS]
    assert torch.equal(twelve[0], drawn.pixels)
    assert torch.equal(twelve[1], drawn.pixels.flip(3))
    assert len({pixels.numpy().tobytes() for pixels in twelve}) == 12
    assert [variant.words for variant in VARIANTS[:3]] == ["", "mirrored", "rbg colors"]


def test_a_manifest_is_read_with_a_byte_order_mark(data):
    file, wanted = data / "manifest.json", read_manifest(data)
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert read_manifest(data) == wanted
