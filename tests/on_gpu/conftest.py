"""What trainers learn from; and adapters with random factors, as the tests of mixing have them."""

import pytest

from bench.runs_resume import make_inputs
from tests.compose.conftest import write  # noqa: F401


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))
