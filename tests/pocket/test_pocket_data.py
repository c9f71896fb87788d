"""What the pocket base is shown, and who judges what it draws: cells withheld, subjects kept apart, distances."""

import pytest
import torch
from torch.testing import assert_close

from bench.distances import paired_kernel_distance
from bench.judge import train_judge
from bench.judge_pictures import read_pictures, withheld_cells
from bench.pocket_data import is_kept_for_subjects, resolve
from bench.pocket_data import withheld_cells as choose_cells


def test_withheld_cells_depend_on_names_not_on_their_order():
    names, styles = [f"thing {i}" for i in range(40)], ["a", "b", "c", "d"]
    assert choose_cells(names, styles, 3) == choose_cells(names[::-1], styles, 3)
    assert len(choose_cells(names, styles, 3)) == 16
    assert choose_cells(names, styles, 3) != choose_cells(names, styles, 4)


@pytest.mark.parametrize("name", ["kite", "teddy-bear", "bubble-tea", "llama-face"])
def test_subjects_and_their_variants_are_kept_apart(name):
    assert is_kept_for_subjects(name)


@pytest.mark.parametrize("name", ["bear", "speech-bubble", "kiwi-fruit", "teacup-without-handle"])
def test_what_only_sounds_like_a_subject_is_not_kept_apart(name):
    assert not is_kept_for_subjects(name)


def test_a_mirrored_alias_is_no_drawing_of_its_own():
    icons = {"icons": {"fish": {}}, "aliases": {"a": {"parent": "fish"}, "b": {"parent": "fish", "hFlip": True}}}
    assert [resolve(icons, name) for name in ("a", "b", "c")] == ["fish", None, None]


@pytest.mark.slow
def test_the_judge_tells_real_pictures_apart_and_never_sees_withheld_ones(data):
    pictures = read_pictures(data)
    seen, _ = pictures.apart(withheld_cells(data))
    assert (len(pictures.pixels), len(seen.pixels)) == (6, 5)
    first, second = (train_judge(seen, steps=2, seed=0) for _ in range(2))
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_distances_of_a_set_from_another_of_its_kind_and_from_a_shifted_one():
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    assert abs(paired_kernel_distance(features[:100], features[100:])) < 0.2
    assert paired_kernel_distance(features[:100], features[100:] + 2) > 10
