"""What is decoded ahead: in order, on several cores, and no more at once than memory holds."""

import os
import time
from threading import Lock

import pytest
from made_up import FakeBase, noise_picture

from sfumato.data import Example, Options, prepare
from sfumato.data.checks import survey
from sfumato.data.preparation import prefetch
from sfumato.data.preparation import prepare as gathering
from sfumato.data.preparation.prefetch import prefetch as read_ahead


class Counted:
    """Takes the place of a function, and knows how much of what it is given was at work at one time."""

    def __init__(self, function, size=lambda *_: 1):
        self._function, self._size = function, size
        self._lock, self._now, self.most = Lock(), 0, 0

    def __call__(self, *given):
        with self._lock:
            self._now += self._size(*given)
            self.most = max(self.most, self._now)
        time.sleep(0.002)
        try:
            return self._function(*given)
        finally:
            with self._lock:
                self._now -= self._size(*given)


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


def test_what_is_read_at_one_time_has_so_many_pixels_at_most(cores, monkeypatch):
    monkeypatch.setattr(prefetch, "MOST_PIXELS", 100)
    sizes = [50, 50, 40, 100, 10, 10, 99, 1, 50, 30] * 3
    read = Counted(str, int)
    assert list(read_ahead(sizes, read, window=8, pixels=int)) == [str(size) for size in sizes]
    assert 50 < read.most <= 100


def test_what_has_more_pixels_is_read_alone(cores, monkeypatch):
    monkeypatch.setattr(prefetch, "MOST_PIXELS", 100)
    read = Counted(str)
    assert list(read_ahead([500] * 8, read, window=8, pixels=int)) == ["500"] * 8
    assert read.most == 1


def test_an_error_lets_go_of_its_room(cores, monkeypatch):
    monkeypatch.setattr(prefetch, "MOST_PIXELS", 100)

    def read(size):
        if size == 100:
            raise ZeroDivisionError
        return size

    with pytest.raises(ZeroDivisionError):
        list(read_ahead([100, 60, 60, 60], read, window=8, pixels=int))


def test_pictures_count_by_their_headers(cores, monkeypatch, tmp_path):
    """In training and in `check`."""
    for number in range(8):
        noise_picture(seed=number).save(tmp_path / f"{number}.png")
    of_size = Options(resolution=64)
    examples = [Example(path, "x", options=of_size) for path in sorted(tmp_path.glob("*.png"))]
    for module, look in (
        (gathering, lambda: prepare(examples, FakeBase(), resolution=64)),
        (survey, lambda: list(survey.survey(examples, {64: [(64, 64)]}, 8))),
    ):
        for pixels, most in ((64 * 64, 1), (2 * 64 * 64, 2)):
            monkeypatch.setattr(prefetch, "MOST_PIXELS", pixels)
            counted = Counted(module.crop_example)
            with monkeypatch.context() as patch:
                patch.setattr(module, "crop_example", counted)
                look()
            assert 1 <= counted.most <= most
