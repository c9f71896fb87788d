"""Latents and embeddings on disk: found again, never stale, whole or not at all."""

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_up import FakeBase, noise_picture
from PIL import Image
from torch import nn

from sfumato.data import Example, Options
from sfumato.data.preparation import planning
from sfumato.data.preparation import prepare as gathering
from sfumato.data.preparation.cache import Cache, cache_key
from sfumato.data.preparation.prepare import prepare
from sfumato.errors import DataError
from sfumato.files import read_tensors
from sfumato.utils.atomic import SPARE_BYTES


class CountingBase(FakeBase):
    """With weights, so that the cache has something to hash."""

    def __init__(self, deviation=0.5):
        super().__init__(deviation)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.vae, self.text = nn.Linear(2, 2), nn.Linear(2, 2)
        self.vae.dtype = torch.float32
        self.text_encoders = (self.text,)


@pytest.fixture
def examples(tmp_path):
    for number in range(4):
        noise_picture(100 if number == 3 else 64, 64, seed=number).save(tmp_path / f"{number}.png")
    return [Example(tmp_path / f"{number}.png", f"picture {number}") for number in range(4)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def prepared(examples, folder, base=None, **options):
    base = base or CountingBase()
    data = prepare(examples, base, **{"resolution": 64, "cache": folder} | options)
    return data, base.encoded, len(base.prompts)


def same(one, other):
    return torch.equal(one.latents, other.latents) and torch.equal(one.text.hidden, other.text.hidden)


def test_a_second_run_encodes_nothing_and_sees_the_same(examples, folder):
    without, _, _ = prepared(examples, None, flip=True)
    first, encoded, prompts = prepared(examples, folder, flip=True)
    second, *again = prepared(examples, folder, flip=True)
    assert (encoded, prompts) == (8, 4)
    assert again == [0, 0]
    assert first.fingerprint == second.fingerprint == without.fingerprint
    for step in range(5):
        assert same(first.batch(0, step, 3), second.batch(0, step, 3))
        assert same(without.batch(0, step, 3), second.batch(0, step, 3))


def test_notes_come_from_the_cache_as_from_the_file(examples, folder, tmp_path):
    Image.new("CMYK", (64, 64)).save(tmp_path / "c.jpg")
    examples = [*examples, Example(tmp_path / "c.jpg", "x")]
    assert prepared(examples, folder)[0].notes == prepared(examples, folder)[0].notes
    assert any("c.jpg: CMYK" in note for note in prepared(examples, folder)[0].notes)


def test_one_pixel_is_enough_for_a_new_key(examples, folder):
    prepared(examples, folder)
    pixels = np.array(Image.open(examples[0].path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(examples[0].path)
    assert prepared(examples, folder)[1:] == (1, 0)


def test_a_renamed_picture_is_found_again(examples, folder):
    prepared(examples, folder)
    moved = examples[0].path.rename(examples[0].path.with_name("moved.png"))
    assert prepared([Example(moved, "picture 0"), *examples[1:]], folder)[1:] == (0, 0)


@pytest.mark.parametrize(
    ("change", "encoded"),
    [({"resolution": 48}, 4), ({"buckets": False}, 4), ({"crop": "pad"}, 4), ({"flip": True}, 8)],
)
def test_another_crop_is_another_key(examples, folder, change, encoded):
    prepared(examples, folder)
    assert prepared(examples, folder, **change)[1:] == (encoded, 0)


def test_one_option_of_one_source_changes_its_pictures_only(examples, folder):
    prepared(examples, folder)
    changed = [Example(examples[0].path, "picture 0", options=Options(crop="pad")), *examples[1:]]
    assert prepared(changed, folder)[1] == 1


def test_another_weight_of_the_vae_or_its_dtype_is_another_key(examples, folder):
    prepared(examples, folder)
    base = CountingBase()
    with torch.no_grad():
        base.vae.weight[0, 0] += 1e-3
    assert prepared(examples, folder, base)[1:] == (4, 0)
    base = CountingBase()
    base.vae = base.vae.half()
    base.vae.dtype = torch.float16
    assert prepared(examples, folder, base)[1:] == (4, 0)


def test_another_weight_of_the_text_encoder_or_another_word_is_another_key(examples, folder):
    prepared(examples, folder)
    base = CountingBase()
    with torch.no_grad():
        base.text.bias[0] += 1e-3
    assert prepared(examples, folder, base)[1:] == (0, 4)
    assert prepared([Example(examples[0].path, "other words"), *examples[1:]], folder)[1:] == (0, 1)


def test_a_changed_mask_is_another_key(examples, folder, tmp_path):
    mask = tmp_path / "0.mask.png"
    for colour in (255, 128):
        Image.new("L", (64, 64), colour).save(mask)
        data, encoded, _ = prepared([Example(examples[0].path, "x", mask=mask)], folder)
        assert encoded == 1
        assert data.batch(0, 0, 1).mask.mean().item() == pytest.approx(colour / 255)


def test_a_broken_file_counts_as_missing_and_is_made_anew(examples, folder):
    first, _, _ = prepared(examples, folder)
    files = sorted(folder.rglob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-8])
    files[1].write_bytes(b"")
    files[2].write_bytes(files[3].read_bytes())
    again, encoded, prompts = prepared(examples, folder)
    assert encoded + prompts == 3
    assert same(first.batch(0, 0, 3), again.batch(0, 0, 3))


@pytest.mark.parametrize("place", [-2, b"picture", b"sfumato.crc32"], ids=["data", "metadata", "without"])
def test_an_entry_with_one_other_bit_or_without_its_checksum_counts_as_missing(tmp_path, place):
    cache = Cache(tmp_path)
    path = cache.write("text", "a" * 64, {"hidden": torch.ones(3)}, {"notes": "picture"}).path
    assert cache.find("text", "a" * 64) is not None
    content = bytearray(path.read_bytes())
    content[place if isinstance(place, int) else content.index(place)] ^= 1
    path.write_bytes(content)
    assert torch.isfinite(read_tensors(path)["hidden"]).all()
    assert cache.find("text", "a" * 64) is None


def test_nothing_half_written_is_left(examples, folder):
    prepared(examples, folder)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors"}
    assert not [path for path in folder.rglob("*") if ".part" in path.name]


def test_many_latents_stay_on_disk(examples, folder, monkeypatch):
    kept, _, _ = prepared(examples, None)
    monkeypatch.setattr(planning, "KEPT_BYTES", 100)
    mapped, _, _ = prepared(examples, folder)
    assert all(item.tensors is None for item in mapped._items)
    assert any("memory-mapped" in note for note in mapped.notes)
    assert same(kept.batch(0, 0, 4), mapped.batch(0, 0, 4))
    for path in (folder / "latents").rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(DataError, match="the cache was changed while it was in use"):
        mapped.batch(0, 1, 4)


def test_orders_of_tags_stay_out_of_the_cache(tmp_path, examples):
    """Another run would draw others."""
    folder = tmp_path / "cache"
    tagged = [replace(example, caption="a, b, c, d, e, f") for example in examples]
    varied, _, texts = prepared(tagged, folder, shuffle_tags=True, will_draw=(0, 8, 2))
    assert texts > 4
    assert len(list((folder / "text").rglob("*.safetensors"))) <= 1
    assert varied.batch(0, 3, 2).text is not None
    assert prepared(examples, folder, will_draw=(0, 8, 2))[2] == 4
    assert prepared(examples, folder, will_draw=(1, 8, 2))[2] == 0


def test_captions_are_embedded_anew_where_the_cache_was_emptied_meanwhile(examples, folder):
    wanted = prepared(examples, None)[0].batch(0, 0, 4)
    dataset, _, _ = prepared(examples, folder)
    for path in (folder / "text").rglob("*.safetensors"):
        path.unlink()
    for _ in range(2):
        assert same(dataset.batch(0, 0, 4), wanted)


def test_pixels_for_the_loop_are_cached_too(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(planning, "MOST_VARIANTS", 2)
    noise_picture(128, 64).save(tmp_path / "a.png")
    options = {"crop": "random", "buckets": False}
    one, _, _ = prepared([Example(tmp_path / "a.png", "x")], folder, **options)
    monkeypatch.setattr(gathering, "crop_example", None)  # nothing may be decoded again
    other, encoded, _ = prepared([Example(tmp_path / "a.png", "x")], folder, **options)
    assert encoded == 0
    assert same(one.batch(0, 0, 2), other.batch(0, 0, 2))


def test_a_disk_that_is_too_full_is_told_before_anything_is_encoded(examples, folder, monkeypatch):
    free = SimpleNamespace(free=SPARE_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free if path == folder.parent else None)
    base = CountingBase()
    with pytest.raises(DataError, match=r"the cache cannot be written \(no space: .* are free .*\.\) Make room, or go"):
        prepared(examples, folder, base)
    assert base.encoded == 0
    assert not folder.exists()


def test_what_is_in_the_cache_needs_no_room(examples, folder, monkeypatch):
    prepared(examples[:3], folder)
    free = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert prepared(examples[:3], folder)[1] == 0
    with pytest.raises(DataError, match="the cache cannot be written"):
        prepared(examples, folder)
    free.free = SPARE_BYTES + 20 * 12 * 3 * 4 * 2  # of one picture's mean and deviation
    assert prepared(examples, folder)[1] == 1


def test_no_entry_waits_for_the_disk(examples, folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", None)
    prepared(examples, folder)
    assert len(list(folder.rglob("*.safetensors"))) == 8


def test_a_cache_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file; the cache wants a folder"):
        Cache(tmp_path / "file")


def test_a_key_is_a_function_of_all_its_parts():
    assert cache_key(a=1, b="x") == cache_key(b="x", a=1)
    assert len({cache_key(a=1), cache_key(a=2), cache_key(a="1"), cache_key(b=1)}) == 4
