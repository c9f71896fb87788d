"""What differs from sample to sample: crops, mirror images, tags; and batches put together."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up import FakeBase, noise_picture
from PIL import Image
from torch.testing import assert_close

from sfumato.data import Example, Options, concat_batches, open_image, prepare
from sfumato.data.buckets import fit_crop
from sfumato.data.preparation import planning, texts
from sfumato.data.tags import caption_forms, count_forms, vary_caption
from sfumato.errors import DataError

TAGS = "zwx, red, large, old, wet"


@pytest.fixture
def wide(tmp_path):
    """Pictures of 128 x 64, which a square crop leaves half of."""
    for number in range(3):
        noise_picture(128, 64, seed=number).save(tmp_path / f"{number}.png")
    return [Example(tmp_path / f"{number}.png", TAGS) for number in range(3)]


def latents_of(image):
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)).transpose(2, 0, 1).copy())


# Tags


def test_tags_that_are_kept_stay_in_front_and_the_others_change_places():
    options = Options(shuffle_tags=True, keep_tags=1)
    drawn = [vary_caption(TAGS, options, 0, step, 0) for step in range(40)]
    assert all(caption.startswith("zwx, ") for caption in drawn)
    assert all(sorted(caption.split(", ")) == sorted(TAGS.split(", ")) for caption in drawn)
    assert len(set(drawn)) > 10


def test_tags_are_joined_by_what_parts_them():
    drawn = {vary_caption("a; b;c", Options(shuffle_tags=True, separator=";"), 0, step, 0) for step in range(50)}
    assert len(drawn) == 6
    assert "b; c; a" in drawn


def test_tags_are_dropped_as_often_as_asked():
    options = Options(tag_dropout=0.25, keep_tags=1)
    counts = Counter(tag for step in range(2000) for tag in vary_caption(TAGS, options, 0, step, 0).split(", "))
    assert counts["zwx"] == 2000
    assert all(counts[tag] / 2000 == pytest.approx(0.75, abs=0.04) for tag in TAGS.split(", ")[1:])


def test_a_varied_caption_depends_on_seed_step_and_place_alone():
    options = Options(shuffle_tags=True, tag_dropout=0.3)
    assert vary_caption(TAGS, options, 1, 2, 3) == vary_caption(TAGS, options, 1, 2, 3)
    assert len({vary_caption(TAGS, options, *place) for place in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))}) > 2


@pytest.mark.parametrize(
    "options",
    [Options(shuffle_tags=True), Options(tag_dropout=0.5), Options(shuffle_tags=True, tag_dropout=0.5, keep_tags=2)],
)
def test_the_forms_of_a_caption_are_all_that_is_drawn(options):
    possible = list(caption_forms("a, b, c, d", options))
    assert len(possible) == count_forms("a, b, c, d", options)
    assert {vary_caption("a, b, c, d", options, 0, step, 0) for step in range(3000)} == set(possible)


def test_exactly_the_captions_that_will_be_drawn_are_embedded(wide):
    base = FakeBase()
    data = prepare(wide, base, resolution=64, shuffle_tags=True, tag_dropout=0.2, will_draw=(5, 30, 4))
    before = len(base.prompts)
    drawn = {caption for step in range(30) for caption in data.batch(5, step, 4).captions}
    assert len(base.prompts) == before
    assert set(base.prompts) == drawn
    assert data.notes[1:] == []


def test_of_many_captions_only_those_that_a_short_run_draws_are_embedded(wide):
    """Also where captions do not vary; another seed's are encoded when they come."""
    examples = [Example(wide[0].path, f"picture {number}") for number in range(40)]
    base = FakeBase()
    data = prepare(examples, base, resolution=64, caption_dropout=0.4, will_draw=(5, 3, 4))
    drawn = {caption for step in range(3) for caption in data.batch(5, step, 4).captions}
    assert "" in drawn
    assert sorted(base.prompts) == sorted(drawn - {""})
    other = data.batch(6, 0, 4)
    assert set(other.captions) <= set(base.prompts) | {""}
    assert data.batch(7, 0, 4, embed_text=False).text is None
    assert set(base.prompts) == (drawn | set(other.captions)) - {""}


def test_captions_that_cannot_be_foreseen_are_encoded_in_the_loop_with_a_word(wide):
    long = ", ".join(f"tag {number}" for number in range(9))
    base = FakeBase()
    base.token_limit = 99
    data = prepare([Example(wide[0].path, long)], base, resolution=64, shuffle_tags=True)
    assert any("362,880 ways" in note and "in the loop" in note for note in data.notes)
    batch = data.batch(0, 0, 2)
    assert batch.text.hidden.flatten().tolist() == [len(caption) for caption in batch.captions]


# Crops


def test_in_the_loop_no_more_are_encoded_at_once_than_beforehand(wide, monkeypatch):
    """A micro-batch of large pictures beside a U-Net that learns would not fit."""
    monkeypatch.setattr(planning, "MOST_VARIANTS", 1)
    whole = prepare(wide[:2], FakeBase(), resolution=64, crop="random").batch(0, 0, 4)
    monkeypatch.setattr("sfumato.data.preparation.latents._ENCODED_AT_A_TIME_PX", 64 * 64)
    base, sizes = FakeBase(), []
    encode = base.encode_pixels
    base.encode_pixels = lambda pixels: sizes.append(len(pixels)) or encode(pixels)
    parted = prepare(wide[:2], base, resolution=64, crop="random").batch(0, 0, 4)
    assert set(sizes) == {1}
    assert torch.equal(parted.latents, whole.latents)


def test_a_random_crop_is_one_of_eight_places_each_a_part_of_the_picture(wide):
    data = prepare(wide[:1], FakeBase(), resolution=64, crop="random", buckets=False)
    whole = open_image(wide[0].path)
    parts = {left: latents_of(whole.crop((left, 0, left + 64, 64))) for left in range(65)}
    places = Counter()
    for step in range(200):
        batch = data.batch(0, step, 1)
        left = int(batch.crops[0, 1])
        places[left] += 1
        assert_close(batch.latents[0], parts[left], atol=1e-5, rtol=0)
    assert len(places) == fit_crop((128, 64), (64, 64), "random", 4).positions <= 8
    assert min(places.values()) > 5


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (135, 66)])
def test_a_mirrored_crop_lies_where_it_lies_in_the_mirrored_picture(size, tmp_path):
    picture = noise_picture(*size)
    crops = {}  # by what is seen
    for name, image in (("a", picture), ("b", picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
        image.save(tmp_path / f"{name}.png")
        example = Example(tmp_path / f"{name}.png", "x")
        data = prepare([example], FakeBase(), resolution=64, crop="random", buckets=False, flip=name == "a")
        batches = [data.batch(0, step, 8) for step in range(20)]
        crops[name] = [pair for batch in batches for pair in zip(batch.latents, batch.crops.tolist(), strict=True)]
    same = [
        (one, other) for seen, one in crops["a"] for also, other in crops["b"] if torch.allclose(seen, also, atol=0.05)
    ]
    assert {tuple(one) for one, _ in same} == {tuple(one) for _, one in crops["b"]}
    assert all(one == other for one, other in same)


def test_what_is_measured_on_is_cut_in_the_middle(wide):
    data = prepare(wide[:1], FakeBase(), resolution=64, crop="random", buckets=False, flip=True)
    (batch,) = data.middles(1, 10**6)
    left = int(batch.crops[0, 1])
    assert abs(left - 32) <= 8
    expected = latents_of(open_image(wide[0].path).crop((left, 0, left + 64, 64)))
    assert_close(batch.latents[0], expected, atol=1e-5, rtol=0)


def test_encoding_in_the_loop_draws_what_encoding_beforehand_draws(wide, monkeypatch):
    options = {"resolution": 64, "crop": "random", "buckets": False, "flip": True}
    before = prepare(wide, FakeBase(deviation=0.5), **options)
    monkeypatch.setattr(planning, "MOST_VARIANTS", 5)
    base = FakeBase(deviation=0.5)
    late = prepare(wide, base, **options)
    assert base.encoded == 0
    assert any("encoded in the loop" in note for note in late.notes)
    for step in range(10):
        one, other = before.batch(1, step, 4), late.batch(1, step, 4)
        assert_close(one.latents, other.latents, atol=1e-6, rtol=0)
        assert torch.equal(one.crops, other.crops)
    broken = prepare(wide, FakeBase(deviation=float("inf")), **options)
    with pytest.raises(DataError, match=r"[012]\.png: the VAE's latents are not finite"):
        broken.batch(1, 0, 1)


def test_slices_of_a_batch_with_everything_random_are_the_batch(wide):
    """Two processes, and two micro-batches each, see what one process sees."""
    options = {"resolution": 64, "crop": "random", "flip": True, "shuffle_tags": True, "caption_dropout": 0.3}
    one = prepare(wide, FakeBase(deviation=1.0), **options, will_draw=(4, 3, 8))
    other = prepare(wide, FakeBase(deviation=1.0), **options)
    for step in range(3):
        whole = one.batch(4, step, 8)
        parts = [other.batch(4, step, 8, first, 2) for first in (0, 2, 4, 6)]
        assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
        assert torch.equal(torch.cat([part.text.hidden for part in parts]), whole.text.hidden)
        assert [caption for part in parts for caption in part.captions] == whole.captions
        assert torch.equal(torch.cat([part.crops for part in parts]), whole.crops)


@pytest.mark.parametrize("crop", ["center", "pad"])
def test_a_mask_that_is_black_all_over_is_refused(wide, tmp_path, crop):
    Image.new("L", (128, 64), 0).save(tmp_path / "0.mask.png")
    black = Example(wide[0].path, "a crab", mask=tmp_path / "0.mask.png")
    with pytest.raises(DataError, match=r"0\.png: its mask is black all over"):
        prepare([black], FakeBase(), resolution=64, crop=crop, buckets=False)


def test_a_padded_picture_is_seen_whole_and_the_white_is_not_learned(wide):
    batch = prepare(wide[:1], FakeBase(), resolution=64, crop="pad", buckets=False).batch(0, 0, 1)
    assert batch.mask[0, 0].mean(dim=1).tolist() == [0] * 4 + [1] * 8 + [0] * 4
    assert torch.equal(batch.latents[0, :, :4], torch.ones(3, 4, 16))
    small = open_image(wide[0].path).resize((64, 32), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (64, 64), "white")
    sheet.paste(small, (0, 16))
    assert_close(batch.latents[0], latents_of(sheet), atol=1e-5, rtol=0)


def test_a_latent_that_sees_any_of_the_white_is_not_learned(tmp_path):
    """36 rows of 64 begin at row 14, within the latents' fourth row, which is half white."""
    noise_picture(128, 72).save(tmp_path / "a.png")
    batch = prepare([Example(tmp_path / "a.png", "x")], FakeBase(), resolution=64, crop="pad", buckets=False).batch(
        0, 0, 1
    )
    assert batch.mask[0, 0].mean(dim=1).tolist() == [0] * 4 + [1] * 8 + [0] * 4


def test_a_mask_moves_with_a_random_crop(wide):
    mask = Image.new("L", (128, 64), 0)
    mask.paste(255, (0, 0, 64, 64))
    mask.save(wide[0].path.with_name("0.mask.png"))
    example = Example(wide[0].path, "x", mask=wide[0].path.with_name("0.mask.png"))
    data = prepare([example], FakeBase(), resolution=64, crop="random", buckets=False)
    for step in range(20):
        batch = data.batch(0, step, 1)
        seen = max(0, 64 - int(batch.crops[0, 1])) // 4
        row = batch.mask[0, 0, 0]
        assert row[: max(0, seen - 1)].tolist() == [1] * max(0, seen - 1)
        assert row[seen + 1 :].tolist() == [0] * (16 - seen - 1)


# Two data sets


def test_two_batches_are_joined_in_order(wide):
    one = prepare(wide, FakeBase(), resolution=64, buckets=False)
    other = prepare(
        [Example(wide[0].path, "class", alpha_mask=True)], FakeBase(), resolution=64, crop="pad", buckets=False
    )
    first, second = one.batch(0, 0, 2), replace(other.batch(0, 0, 1), weights=torch.tensor([0.5]))
    both = concat_batches(first, second)
    assert len(both) == 3
    assert both.captions == [*first.captions, "class"]
    for name in ("latents", "original_sizes", "crops", "target_sizes", "weights"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(first, name), getattr(second, name)])), name
    assert torch.equal(both.mask[:2], torch.ones_like(both.mask[:2]))
    assert torch.equal(both.mask[2:], second.mask)
    assert torch.equal(concat_batches(second, first).mask, torch.cat([second.mask, both.mask[:2]]))
    assert torch.equal(both.text.hidden, torch.cat([first.text.hidden, second.text.hidden]))
    assert both.indices == [*first.indices, 0]


def test_batches_of_two_shapes_cannot_be_joined(wide):
    one = prepare(wide, FakeBase(), resolution=64, buckets=False).batch(0, 0, 2)
    other = prepare(wide, FakeBase(), resolution=64).batch(0, 0, 2)
    with pytest.raises(ValueError, match="two shapes"):
        concat_batches(one, other)


def test_a_mask_of_an_oblong_picture_is_cut_as_its_latents_are(tmp_path):
    noise_picture(160, 60).save(tmp_path / "0.png")
    Image.new("L", (160, 60), 255).save(tmp_path / "0.mask.png")
    example = Example(tmp_path / "0.png", "x", mask=tmp_path / "0.mask.png")
    batch = prepare([example], FakeBase(), resolution=64, crop="random").batch(0, 0, 1)
    assert batch.mask.shape[-2:] == batch.latents.shape[-2:]


def test_captions_are_counted_no_further_than_memory_goes(monkeypatch):
    monkeypatch.setattr(texts, "MAX_BYTES", 4 * 10)  # of ten chunks
    base = FakeBase()
    counted = []
    monkeypatch.setattr(base, "chunk_count", lambda prompt: counted.append(prompt) or len(prompt))
    embeddings = texts.CaptionEmbeddings(base, None)
    for prompts, fits, looked_at in (
        (["a"] * 10, True, 10),
        (["a"] * 11, False, 0),
        (["a", "aa", "aaaaaaaa", "a"], False, 3),
        (["aaaaa", "aaaaa"], True, 2),
    ):
        counted.clear()
        assert (embeddings.fits(prompts), len(counted)) == (fits, looked_at)
