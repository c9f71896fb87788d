"""Tiny bases that new words come to."""

from functools import cache

import pytest

from sfumato.models import load_base
from tests.tiny import CPU


@pytest.fixture(scope="session")
def bases(family_folder):
    """By name of a family, a tiny base of it."""
    return cache(lambda family: load_base(str(family_folder(family)), precision=CPU))


@pytest.fixture
def base(bases):
    return bases("sd1")
