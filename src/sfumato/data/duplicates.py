"""Pictures that are there twice, exactly or nearly. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from sfumato.data.survey import PictureStats

NEAR_BITS = 20
"""Of the 128 gradient signs, how many may differ."""
NEAR_VALUES = 6.0
"""Mean difference, of 255, that two pictures of 16 x 16 may have."""
_BLOCK, _PAIRS = 512, 8192
_Places: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.intp]]"


def duplicates(looks: Sequence[PictureStats]) -> tuple[list[list[int]], list[list[int]]]:
    """(groups of equal crops, groups of nearly equal ones), as places in `looks`; those that failed are passed over.

    Near groups hold one of each group of equals. Gradients find them (dHash, rows and columns), small pictures confirm.
    """
    equal: dict[bytes, list[int]] = {}
    for place, look in enumerate(looks):
        if not look.error:
            equal.setdefault(look.content, []).append(place)
    exact = [places for places in equal.values() if len(places) > 1]
    # Black ones and empty ones are alike, which is said of them already.
    alone = [places[0] for places in equal.values() if not looks[places[0]].flaws]
    return exact, _near(looks, alone)


def _near(looks: Sequence[PictureStats], places: Sequence[int]) -> list[list[int]]:
    if len(places) < 2:
        return []
    signs = np.frombuffer(b"".join(looks[place].gradients for place in places), dtype=np.uint64).reshape(-1, 2)
    small = np.frombuffer(b"".join(looks[place].small for place in places), dtype=np.uint8).reshape(-1, 256)
    firsts: _Places = np.arange(len(places), dtype=np.intp)  # of each one's group the first

    for start in range(0, len(places), _BLOCK):
        rows = signs[start : start + _BLOCK]
        differing = sum(_bits(rows[:, None, word] ^ signs[None, start:, word]) for word in range(2))
        pairs = np.argwhere(np.triu(differing <= NEAR_BITS, 1)) + start  # columns begin where rows do
        for some in (pairs[place : place + _PAIRS] for place in range(0, len(pairs), _PAIRS)):
            apart = some[firsts[some[:, 0]] != firsts[some[:, 1]]]  # of many that are alike, few pairs
            alike = _differences(small[apart[:, 0]], small[apart[:, 1]]) <= NEAR_VALUES
            firsts = _joined(firsts, apart[alike])
    groups: dict[int, list[int]] = {}
    for place, first in zip(places, firsts.tolist(), strict=True):
        groups.setdefault(first, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _joined(firsts: _Places, pairs: _Places) -> _Places:
    """The first of each one's group once both of every pair are in one."""
    while True:
        ends = np.sort(firsts[pairs], axis=1)
        ends = ends[ends[:, 0] != ends[:, 1]]
        if not len(ends):
            return firsts
        firsts = firsts.copy()
        np.minimum.at(firsts, ends[:, 1], ends[:, 0])
        while (firsts[firsts] != firsts).any():
            firsts = firsts[firsts]


def _bits(words: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """How many bits of each word are set; numpy has a function for it from version 2 on."""
    if hasattr(np, "bitwise_count"):
        counts: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = np.bitwise_count(words)
        return counts
    table = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)
    summed: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = table[words[..., None].view(np.uint8)].sum(
        axis=-1, dtype=np.uint8
    )
    return summed


def _differences(
    first: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], second: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The mean difference of each pair of rows."""
    apart: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.abs(
        first.astype(np.int16) - second.astype(np.int16)
    ).mean(axis=1)
    return apart
