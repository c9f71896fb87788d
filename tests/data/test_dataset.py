"""Batches as pure functions, and what `prepare` keeps."""

from collections import Counter

import numpy as np
import pytest
import torch
from made_up import FakeBase, noise_picture
from PIL import Image
from torch.testing import assert_close

from sfumato.data import Example, open_image, prepare, read_folder
from sfumato.data.preparation import planning
from sfumato.errors import ConfigError, DataError


def read(folder, **options):
    return read_folder(folder, caption_template="{caption}", **options)


def equal(one, other):
    return (
        torch.equal(one.latents, other.latents)
        and torch.equal(one.text.hidden, other.text.hidden)
        and one.captions == other.captions
        and one.indices == other.indices
    )


@pytest.fixture
def shapes(tmp_path):
    """Five pictures in three buckets of 64 px."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (64, 64), (100, 60), (100, 60), (60, 100)]):
        noise_picture(*size, seed=number).save(folder / f"{number}.png")
    return folder


def test_latents_are_the_encoding_of_the_pixels(pictures, base):
    data = prepare(read(pictures), base, resolution=64)
    batch = data.batch(0, 0, 6)
    for row, index in enumerate(batch.indices):
        pixels = np.asarray(open_image(sorted(pictures.glob("*.png"))[index]), dtype=np.float32) / 127.5 - 1
        expected = pixels.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
        assert_close(batch.latents[row], torch.from_numpy(expected.copy()), atol=1e-5, rtol=0)


def test_pixels_and_captions_are_encoded_once(pictures, base):
    data = prepare(read(pictures), base, resolution=64)
    for step in range(10):
        data.batch(0, step, 4)
    assert base.encoded == 6
    assert sorted(base.prompts) == ["crab", "house", "pizza", "red apple", "rocket", "tulip"]


def test_what_is_done_is_told_from_none_to_all(shapes, base, monkeypatch, tmp_path):
    monkeypatch.setattr("sfumato.data.preparation.latents._ENCODED_AT_A_TIME_PX", 64 * 64)
    cache, told = tmp_path / "cache", []

    def prepared():
        told.clear()
        prepare(read(shapes), base, resolution=64, cache=cache, flip=True, progress=lambda *what: told.append(what))
        return [(what, done) for what, done, count in told if count == 5]

    pictures = [("images", done) for done in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)]  # each and its mirror image
    assert prepared() == [*pictures, ("captions", 5)]
    assert len(told) == len(pictures) + 1
    assert prepared() == [("images", 0), ("images", 5), ("captions", 5)]  # found in the cache


def test_a_batch_holds_its_captions_embeddings(pictures, base):
    batch = prepare(read(pictures), base, resolution=64).batch(3, 5, 4)
    assert batch.text.hidden.flatten().tolist() == [len(caption) for caption in batch.captions]


def test_the_same_seed_and_step_give_the_same_batch_whatever_was_drawn_before(pictures):
    options = {"resolution": 64, "flip": True, "caption_dropout": 0.3}
    one = prepare(read(pictures), FakeBase(deviation=1.0), **options)
    other = prepare(read(pictures), FakeBase(deviation=1.0), **options)
    expected = [one.batch(7, step, 4) for step in range(8)]
    assert all(equal(other.batch(7, step, 4), expected[step]) for step in reversed(range(8)))
    assert not torch.equal(one.batch(8, 0, 4).latents, expected[0].latents)


def test_slices_of_a_batch_are_the_batch(shapes):
    """Two processes with two micro-batches each see what one process sees."""
    data = prepare(read(shapes), FakeBase(deviation=1.0), resolution=64, flip=True, caption_dropout=0.5)
    whole = data.batch(1, 9, 8)
    parts = [data.batch(1, 9, 8, first, 2) for first in range(0, 8, 2)]
    assert_close(torch.cat([part.latents for part in parts]), whole.latents, atol=0, rtol=0)
    assert [caption for part in parts for caption in part.captions] == whole.captions
    assert torch.equal(torch.cat([part.original_sizes for part in parts]), whole.original_sizes)


def test_each_step_samples_the_posterior_anew(pictures):
    data = prepare(read(pictures), FakeBase(deviation=0.5), resolution=64)
    (mean,) = data.middles(6, 10**6)
    residuals = torch.stack([data.batch(0, step, 6).latents for step in range(60)])
    order = [data.order(0, step, 6) for step in range(60)]
    means = torch.stack([mean.latents[[mean.indices.index(i) for i in row]] for row in order])
    assert (residuals - means).std().item() == pytest.approx(0.5, rel=0.02)
    assert (residuals - means).mean().item() == pytest.approx(0, abs=0.01)


def test_every_epoch_holds_every_picture_once(pictures, base):
    data = prepare(read(pictures), base, resolution=64)
    drawn = [i for step in range(9) for i in data.order(0, step, 2)]
    assert sorted(drawn[:6]) == sorted(drawn[6:12]) == sorted(drawn[12:]) == list(range(6))
    assert drawn[:6] != drawn[6:12]


def test_a_batch_larger_than_the_folder_runs_into_the_next_epoch(pictures, base):
    data = prepare(read(pictures), base, resolution=64)
    assert set(Counter(data.order(0, 0, 12)).values()) == {2}


def test_repeats_are_drawn_as_often_as_they_say(pictures, base):
    paths = sorted(pictures.glob("*.png"))
    examples = [Example(path, "x", 3 if number == 1 else 1) for number, path in enumerate(paths)]
    data = prepare(examples, base, resolution=64)
    assert len(data) == 6
    assert Counter(data.order(0, 0, 8)) == {0: 1, 1: 3, 2: 1, 3: 1, 4: 1, 5: 1}


def test_batches_of_mixed_shapes_hold_one_shape_each_and_all_equally_often(shapes, base):
    data = prepare(read(shapes), base, resolution=64)
    assert data.sizes == [(64, 64), (64, 64), (80, 48), (80, 48), (48, 80)]
    rows = [data.order(0, step, 4) for step in range(50)]
    assert all(len({data.sizes[i] for i in row}) == 1 for row in rows)
    counts = Counter(i for row in rows for i in row)
    assert max(counts.values()) - min(counts.values()) <= 4


def test_the_micro_batches_of_a_step_are_of_one_shape_each_and_of_several_together(shapes, base):
    """Accumulated, or on several processes, a step is no picture many times over."""
    data = prepare(read(shapes), base, resolution=64, together=1)
    rows = [data.order(0, step, 5) for step in range(8)]
    assert all(sorted(row) == list(range(5)) for row in rows)
    data = prepare(read(shapes), base, resolution=64, together=2)
    rows = [data.order(0, step, 4) for step in range(50)]
    assert all(data.sizes[a] == data.sizes[b] for row in rows for a, b in (row[:2], row[2:]))
    assert sum(data.sizes[row[0]] != data.sizes[row[2]] for row in rows) > 20
    counts = Counter(i for row in rows for i in row)
    assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("together", [1, 2, 6])
def test_of_one_shape_a_step_is_the_same_however_it_is_divided(together, pictures, base):
    one, whole = (prepare(read(pictures), base, resolution=64, together=size) for size in (together, None))
    assert [one.order(7, step, 6) for step in range(9)] == [whole.order(7, step, 6) for step in range(9)]


def test_pictures_that_no_step_holds_are_told(pictures, base):
    few = prepare(read(pictures), base, resolution=64, will_draw=(0, 2, 2))
    assert "2 of 6 images come in none of the 2 steps; more steps learn from all." in few.notes
    assert not [
        note for note in prepare(read(pictures), base, resolution=64, will_draw=(0, 3, 2)).notes if "none" in note
    ]


def test_what_an_hour_would_be_wasted_on_is_said_before_it_is_spent(pictures, base, monkeypatch):
    monkeypatch.setattr(planning, "KEPT_BYTES", 0)
    said = []
    data = prepare(
        read(pictures),
        base,
        resolution=64,
        will_draw=(0, 2, 2),
        say=lambda note: said.append((note, base.encoded)),
        progress=lambda *what: said.append(what),
    )
    (unseen, _), (memory, _), first, *_ = said
    assert unseen == "2 of 6 images come in none of the 2 steps; more steps learn from all."
    assert memory == "latents take 0 MiB of memory; --cache DIR keeps them on disk"
    assert first == ("images", 0, 6)
    assert [encoded for _, encoded in said[:2]] == [0, 0]
    assert data.notes == []


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"crop": "pad"}, {"crop": "random"}])
@pytest.mark.parametrize(("most", "mask"), [(2048, "none"), (0, "files")])
def test_the_memory_that_latents_take_is_foreseen(options, most, mask, shapes, base, monkeypatch):
    monkeypatch.setattr(planning, "MOST_VARIANTS", most)
    for path in [*shapes.glob("*.png")] if mask == "files" else ():
        Image.open(path).save(path.with_suffix(".mask.png"))
    options = {"resolution": 64, "buckets": False, **options}
    taken = sum(item.nbytes for item in prepare(read(shapes, mask=mask), base, **options)._items)
    for kept, count in ((taken, 0), (taken - 1, 1)):
        monkeypatch.setattr(planning, "KEPT_BYTES", kept)
        notes = prepare(read(shapes, mask=mask), base, **options).notes
        assert len([note for note in notes if "MiB of memory" in note]) == count


def test_flips_are_mirror_images_and_come_half_the_time(pictures, base):
    data = prepare(read(pictures), base, resolution=64, flip=True)
    (plain,) = data.middles(6, 10**6)
    by_index = dict(zip(plain.indices, plain.latents, strict=True))
    mirrored = 0
    for step in range(40):
        batch = data.batch(0, step, 6)
        for index, latents in zip(batch.indices, batch.latents, strict=True):
            is_plain = torch.equal(latents, by_index[index])
            assert is_plain or torch.allclose(latents, by_index[index].flip(-1))
            mirrored += not is_plain
    assert 90 <= mirrored <= 150


def test_a_dropped_caption_is_what_guidance_calls_no_prompt(pictures, base):
    data = prepare(read(pictures), base, resolution=64, caption_dropout=0.5)
    batches = [data.batch(0, step, 6) for step in range(40)]
    dropped = sum(caption == "" for batch in batches for caption in batch.captions)
    assert 90 <= dropped <= 150
    for batch in batches:
        assert [h == -1 for h in batch.text.hidden.flatten().tolist()] == [c == "" for c in batch.captions]


def test_text_is_left_out_on_request(pictures, base):
    data = prepare(read(pictures), base, resolution=64, embed_text=False)
    assert data.batch(0, 0, 2).text is None
    assert base.prompts == []


def test_who_listens_is_told_of_each_batch_whose_captions_are_used(pictures, base):
    data, heard = prepare(read(pictures), base, resolution=64), []
    data.batch(0, 0, 6)
    data.listen(lambda *told: heard.append(told))
    batch = data.batch(0, 1, 6, 2, 3)
    data.batch(0, 1, 6, embed_text=False)
    assert [(count, told is batch) for count, told in heard] == [(6, True)]
    assert [data.names[index] for index in batch.indices] == [f"{caption}.png" for caption in batch.captions]
    assert_close(data.decode(batch.latents)[..., ::4, ::4], batch.latents)


def test_sizes_and_crops_are_carried_height_first(tmp_path, base):
    noise_picture(200, 100).save(tmp_path / "a.png")
    data = prepare([Example(tmp_path / "a.png", "x")], base, resolution=64, buckets=False)
    batch = data.batch(0, 0, 1)
    assert batch.original_sizes.tolist() == [[100, 200]]
    assert batch.crops.tolist() == [[0, 32]]
    assert batch.target_sizes.tolist() == [[64, 64]]
    assert batch.added(base, batch.text)["time_ids"].tolist() == [[100, 200, 0, 32, 64, 64]]
    assert any("lose more than a quarter" in note for note in data.notes)


def test_enlarging_is_said(tmp_path, base):
    noise_picture(32, 32).save(tmp_path / "small.png")
    data = prepare([Example(tmp_path / "small.png", "x")], base, resolution=64)
    assert data.notes == ["1 of 1 images are smaller than is learned, so they are enlarged: small.png"]


def test_the_end_of_a_long_caption_is_said(pictures, base):
    example = Example(pictures / "crab.png", "one two three four five six seven eight nine ten")
    data = prepare([example], base, resolution=64)
    (note,) = data.notes
    assert note.startswith("crab.png: the caption is longer than 8 tokens; its end is not seen: ... 'nine ten'; --max")
    (note,) = prepare([Example(pictures / "crab.png", "very " * 300)], base, resolution=64).notes
    assert len(note) < 200


def test_masks_come_at_latent_resolution_and_are_flipped_with_the_picture(pictures, base):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(pictures / "crab.mask.png")
    data = prepare(read(pictures, mask="files"), base, resolution=64, flip=True)
    seen = set()
    for step in range(20):
        batch = data.batch(0, step, 6)
        assert batch.mask.shape == (6, 1, 16, 16)
        for index, part in zip(batch.indices, batch.mask, strict=True):
            if index == 0:
                seen.add(tuple(part[0, 0].tolist()))
            else:
                assert part.min() == 1
    assert seen == {(1.0,) * 8 + (0.0,) * 8, (0.0,) * 8 + (1.0,) * 8}


def test_what_is_transparent_can_be_the_mask(tmp_path, base):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 64, 32))
    image.save(tmp_path / "a.png")
    batch = prepare([Example(tmp_path / "a.png", "x", alpha_mask=True)], base, resolution=64).batch(0, 0, 1)
    assert batch.mask[0, 0, :, 0].tolist() == [1.0] * 8 + [0.0] * 8


def test_what_was_to_be_masked_and_is_opaque_is_told(tmp_path, base):
    for name, mode in (("a", "RGB"), ("b", "RGB"), ("c", "RGBA")):
        Image.new(mode, (64, 64), (255, 0, 0) if mode == "RGB" else (255, 0, 0, 128)).save(tmp_path / f"{name}.png")
    examples = [Example(tmp_path / f"{name}.png", "x", alpha_mask=True) for name in "abc"]
    said = "2 images have no transparent part, learned whole: a.png, b.png"
    for _ in range(2):  # the second time of what is in the cache
        assert said in prepare(examples, base, resolution=64, cache=tmp_path / "cache").notes


def test_what_is_to_be_said_of_many_pictures_is_one_line(tmp_path, base):
    for number in range(5):
        Image.new("CMYK", (64, 64), (number, 0, 0, 0)).save(tmp_path / f"{number}.jpg")
    Image.new("CMYK", (64, 64)).save(tmp_path / "other.tif")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    examples = [Example(path, "x") for path in sorted(tmp_path.iterdir())]
    for _ in range(2):  # the second time of what is in the cache
        assert prepare(examples, base, resolution=64, cache=tmp_path / "cache").notes == [
            "0.jpg, 1.jpg, 2.jpg and 3 more: CMYK without a colour profile; its colours are a guess",
            "moves.gif: an animation; its first frame is taken",
        ]


def test_a_mask_of_a_file_counts_where_it_is_not_transparent(tmp_path, base):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 64, 32))
    mask.save(tmp_path / "m.png")
    batch = prepare([Example(tmp_path / "a.png", "x", mask=tmp_path / "m.png")], base, resolution=64).batch(0, 0, 1)
    assert batch.mask[0, 0, :, 0].tolist() == [1.0] * 8 + [0.0] * 8


def test_without_masks_there_is_none(pictures, base):
    assert prepare(read(pictures), base, resolution=64).batch(0, 0, 2).mask is None


def test_a_black_mask_is_refused(pictures, base):
    Image.new("L", (64, 64), 0).save(pictures / "crab.mask.png")
    with pytest.raises(DataError, match=r"crab\.png: its mask is black"):
        prepare(read(pictures, mask="files"), base, resolution=64)


def test_all_broken_files_are_named_at_once_or_left_out(pictures, base):
    whole = (pictures / "crab.png").read_bytes()
    (pictures / "crab.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "tulip.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"2 of 6 images cannot be learned from: crab\.png: .*; tulip\.png: "):
        prepare(read(pictures), base, resolution=64)
    data = prepare(read(pictures, skip_bad=True), base, resolution=64)
    assert data.captions == ["house", "pizza", "red apple", "rocket"]
    assert [note.split(":")[:2] for note in data.notes] == [["left out", " crab.png"], ["left out", " tulip.png"]]


def test_what_cannot_be_drawn_over_is_refused_before_it_is_encoded(shapes, base):
    with pytest.raises(DataError, match="cut at random places, too many to draw them all over"):
        prepare(read(shapes), base, resolution=64, crop="random", buckets=False, drawn_over=True)
    assert base.encoded == 0
    squares = [example for example in read(shapes) if example.path.stem in "01"]
    data = prepare(squares, base, resolution=64, crop="random", drawn_over=True)  # which have one place
    assert len(next(data.views(4 * 64**2))) == 2


def test_views_come_as_many_at_once_as_their_own_size_allows(pictures, base):
    for side, most in ((64, 2), (32, 6)):
        data = prepare(read(pictures), base, resolution=side)
        assert max(len(batch) for batch in data.views(2 * 64**2)) == most


def test_the_fingerprint_changes_with_a_byte_a_caption_and_a_crop(pictures, base):
    def fingerprint(**options):
        return prepare(read(pictures), base, **{"resolution": 64} | options).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(resolution=48) != first
    (pictures / "crab.txt").write_text("a crab")
    second = fingerprint()
    assert second != first
    noise_picture(seed=99).save(pictures / "house.png")
    assert fingerprint() not in (first, second)


def test_a_resolution_that_the_base_cannot_take_is_refused(pictures, base):
    with pytest.raises(ConfigError, match="multiples of 16 px"):
        prepare(read(pictures), base, resolution=15)


def test_latents_that_are_not_finite_are_refused(pictures):
    with pytest.raises(DataError, match=r"crab\.png.*: the VAE's latents are not finite"):
        prepare(read(pictures), FakeBase(deviation=float("inf")), resolution=64)


def test_a_picture_of_two_sources_is_told_apart_by_number(tmp_path):
    """So that a changed caption of the first is what a run that goes on reports."""
    noise_picture().save(tmp_path / "a.png")
    sources = (f'[[source]]\npath = "."\ncaption = "{caption}"\n' for caption in ("red", "blue"))
    (tmp_path / "d.toml").write_text("".join(sources))
    data = prepare(read_folder(tmp_path / "d.toml"), FakeBase(), resolution=64)
    assert [*data.contents] == ["a.png", "a.png #2"]
    assert len({*data.contents.values()}) == 2
