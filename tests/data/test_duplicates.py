"""Groups of pictures that are nearly the same, beside a search of all pairs."""

from pathlib import Path

import numpy as np
import pytest

from sfumato.data.buckets import fit_crop
from sfumato.data.checks import survey
from sfumato.data.checks.survey import PictureStats

CROP = fit_crop((64, 64), (64, 64))


def looks_like(kinds, count, seed, noise=8):
    """So many looks of so many kinds, each with a little noise; some are alike only over others."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (kinds, 256))
    signs = random.integers(0, 2, (kinds, 128), dtype=np.uint8)
    looks = []
    for number in range(count):
        kind = random.integers(kinds)
        values = np.clip(small[kind] + random.integers(-noise, noise + 1, 256), 0, 255).astype(np.uint8)
        flipped = (random.random(128) < random.random() / 12).astype(np.uint8)
        gradients = np.packbits(signs[kind] ^ flipped).tobytes()
        name = str(number)
        looks.append(
            PictureStats(Path(name), "", CROP, (), name.encode(), gradients, values.tobytes(), 100.0, 50.0, 1.0)
        )
    return looks


def of_all_pairs(looks):
    bits = [np.unpackbits(np.frombuffer(look.gradients, np.uint8)) for look in looks]
    small = [np.frombuffer(look.small, np.uint8).astype(int) for look in looks]
    group = list(range(len(looks)))
    for second in range(len(looks)):
        for first in range(second):
            near = (bits[first] != bits[second]).sum() <= survey.NEAR_BITS
            if near and np.abs(small[first] - small[second]).mean() <= survey.NEAR_VALUES:
                group = [group[first] if each == group[second] else each for each in group]
    found = {}
    for place, each in enumerate(group):
        found.setdefault(each, []).append(place)
    return [places for places in found.values() if len(places) > 1]


@pytest.mark.parametrize("seed", range(4))
def test_near_ones_are_joined_over_others(seed, monkeypatch):
    monkeypatch.setattr(survey, "_BLOCK", 16)
    monkeypatch.setattr(survey, "_PAIRS", 8)
    looks = looks_like(6, 60, seed)
    near = of_all_pairs(looks)
    assert len(near) > 1
    assert survey.find_duplicates(looks) == ([], near)


def test_of_many_that_are_alike_few_pairs_are_compared(monkeypatch):
    compared = []
    differences = survey._differences
    monkeypatch.setattr(survey, "_differences", lambda *rows: compared.append(len(rows[0])) or differences(*rows))
    looks = looks_like(1, 600, 0, noise=0)
    assert survey.find_duplicates(looks)[1] == [list(range(600))]
    assert sum(compared) < 600 * 599 / 2 / 4
