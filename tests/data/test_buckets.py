"""Shapes and crops."""

import pytest

from sfumato.data.buckets import bucket_sizes, fit_crop, nearest_bucket


@pytest.mark.parametrize(("resolution", "step"), [(64, 16), (512, 64), (768, 64), (1024, 64), (100, 16)])
def test_buckets_keep_to_the_step_the_area_and_the_ratio(resolution, step):
    sizes = bucket_sizes(resolution, step)
    assert (resolution // step * step,) * 2 in sizes
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= 2 * min(width, height)
    assert {(height, width) for width, height in sizes} == set(sizes)


def test_buckets_of_stable_diffusion():
    assert bucket_sizes(512, 64) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]


def test_a_ratio_of_one_leaves_the_square():
    assert bucket_sizes(512, 64, largest_ratio=1.0) == [(512, 512)]


def test_the_nearest_bucket_is_by_ratio():
    sizes = [(64, 64), (48, 80), (80, 48)]
    assert nearest_bucket((640, 640), sizes) == (64, 64)
    assert nearest_bucket((300, 200), sizes) == (80, 48)
    assert nearest_bucket((200, 300), sizes) == (48, 80)


def test_a_crop_is_centred_and_as_large_as_fits():
    crop = fit_crop((200, 100), (64, 64))
    assert crop.box == (50, 0, 150, 100)
    assert crop.offset == (32, 0)
    assert crop.kept == 0.5
    assert crop.scale == pytest.approx(0.64)


def test_a_picture_of_the_bucket_s_size_is_not_cropped():
    crop = fit_crop((64, 64), (64, 64))
    assert (crop.box, crop.offset, crop.scale) == ((0, 0, 64, 64), (0, 0), 1)


def test_a_crop_never_leaves_the_picture():
    for width, height in [(1023, 769), (333, 1001), (3, 7), (4000, 3000)]:
        for size in bucket_sizes(512, 64):
            left, top, right, bottom = fit_crop((width, height), size).box
            assert left >= 0
            assert top >= 0
            assert right <= width + 1e-9
            assert bottom <= height + 1e-9
