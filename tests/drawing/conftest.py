"""What the tests of drawing share."""

from typing import Any

import pytest

from sfumato.models import load_base
from tests.tiny import CPU, tiny_pocket_folder


@pytest.fixture(scope="module")
def pocket(tmp_path_factory) -> Any:
    return load_base(tiny_pocket_folder(tmp_path_factory.mktemp("pocket")), precision=CPU)
