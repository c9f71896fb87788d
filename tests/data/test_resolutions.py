"""Images that are learned at a resolution of their source's own, or at several."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from made_up import FakeBase, noise_picture

from sfumato.data import Options, prepare, read_folder
from sfumato.data.checks.report import check
from sfumato.data.dataset_config import hold_out
from sfumato.errors import ConfigError
from sfumato.models.family import read_requirements


@pytest.fixture
def home(tmp_path):
    for name, size in (("a", (96, 96)), ("b", (96, 96)), ("c", (160, 80)), ("d", (80, 160))):
        path = tmp_path / "pictures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        noise_picture(*size, seed=ord(name)).save(path)
        path.with_suffix(".txt").write_text(name)
    return tmp_path


def sources(home, text):
    (home / "d.toml").write_text(text)
    return read_folder(home / "d.toml")


def latents(dataset):
    """By caption and size: the means of the posteriors."""
    return {
        (caption, size): mean
        for batch in dataset.views(10**6)
        for caption, size, mean in zip(
            batch.captions, map(tuple, batch.target_sizes.tolist()), batch.latents, strict=True
        )
    }


def test_images_at_two_resolutions_are_those_of_two_data_sets(home):
    plain = read_folder(home / "pictures")
    both = sources(home, 'resolution = [48, 96]\n[[source]]\npath = "pictures"\nrepeats = 2')
    found = prepare(both, FakeBase(), resolution=64)
    wanted = latents(prepare(plain, FakeBase(), resolution=48)) | latents(prepare(plain, FakeBase(), resolution=96))
    assert found.samples == 16
    assert len(wanted) == len(found) == 8
    seen = latents(found)
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(seen[key], wanted[key]) for key in wanted)


def test_a_source_has_its_own_resolution_and_others_that_of_the_training(home):
    text = '[[source]]\npath = "pictures"\nresolution = 48\n[[source]]\npath = "pictures"'
    found = prepare(sources(home, text), FakeBase(), resolution=64)
    assert Counter(max(size) for size in found.sizes) == {48: 2, 64: 4, 80: 2}


def test_each_step_has_images_of_one_size_and_all_come_equally_often(home):
    both = sources(home, 'resolution = [48, 96]\n[[source]]\npath = "pictures"')
    found = prepare(both, FakeBase(), resolution=64)
    counts = Counter()
    for step in range(80):
        batch = found.batch(0, step, 2)
        assert len(set(map(tuple, batch.target_sizes.tolist()))) == 1
        counts.update(zip(batch.captions, map(tuple, batch.target_sizes.tolist()), strict=True))
    assert len(counts) == 8
    assert max(counts.values()) - min(counts.values()) <= 2  # those that wait for others of their size


def test_a_resolution_that_is_the_training_s_changes_nothing(home):
    """Neither the fingerprint, by which a run goes on, nor the cache."""
    plain = prepare(read_folder(home / "pictures"), FakeBase(), resolution=48, cache=home / "cache")
    base = FakeBase()
    said = sources(home, 'resolution = 48\n[[source]]\npath = "pictures"')
    found = prepare(said, base, resolution=64, cache=home / "cache")
    assert found.fingerprint == plain.fingerprint
    assert base.encoded == 0
    other = sources(home, 'resolution = 96\n[[source]]\npath = "pictures"')
    assert prepare(other, base, resolution=64, cache=home / "cache").fingerprint != plain.fingerprint
    assert base.encoded == 4


def test_what_is_held_out_is_held_out_at_each_resolution(home):
    both = sources(home, 'resolution = [48, 96]\n[[source]]\npath = "pictures"')
    held = hold_out(both, 0.25).in_group("validation")
    assert [each.options.resolution for each in held] == [48, 96]
    assert len({each.path for each in held}) == 1


def test_check_counts_each_resolution(home):
    (home / "d.toml").write_text('resolution = [48, 96]\n[[source]]\npath = "pictures"')
    found = check(home / "d.toml", read_requirements("pocket"))
    assert found.buckets == {(48, 48): 2, (32, 64): 1, (64, 32): 1, (96, 96): 2, (64, 128): 1, (128, 64): 1}
    assert (len(found.examples), found.samples) == (4, 8)
    assert "c.png (160 x 80 px, x 0.8)" not in str([line.text for line in found.lines])
    assert found.looks[0].crop.size == (96, 96)  # the largest, for which an image may be too small


def test_examples_by_hand_may_have_one_too(home):
    examples = read_folder(home / "pictures").examples
    sized = [replace(each, options=Options(resolution=48)) for each in examples]
    assert max(map(max, prepare(sized, FakeBase(), resolution=96).sizes)) == 64


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('"big"', "resolution is 'big'; wanted a whole number, or a list of some."),
        ("true", "resolution is True; wanted a whole number, or a list of some."),
        ("0", "resolution is 0; wanted pixels, such as 512 or [512, 768]."),
        ("[48, 1.5]", "resolution is [48, 1.5]; wanted pixels, such as 512 or [512, 768]."),
        ("[48, 48]", "resolution is [48, 48]; name each once."),
    ],
)
def test_what_is_no_resolution_is_refused(value, said, home):
    with pytest.raises(ConfigError) as refused:
        sources(home, f'[[source]]\npath = "pictures"\nresolution = {value}')
    assert str(refused.value) == f"d.toml, source 1: {said}"


def test_a_resolution_that_the_base_cannot_take_is_refused(home):
    with pytest.raises(ConfigError, match="--resolution 9: this base takes multiples of 16 px"):
        prepare(sources(home, '[[source]]\npath = "pictures"\nresolution = 9'), FakeBase(), resolution=64)
