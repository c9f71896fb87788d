"""Weight files that somebody made to break the reader: refused in a line, or whole.

A few hundred here; `python bench/files_malformed.py --generated 20000` for the figure, and for hangs and memory.
"""

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings

from bench import files_malformed
from bench.files_malformed import GOOD, ONES, crafted, doubt, malformed, outcome_of, pack, tensor
from sfumato.files import read_tensors

CRAFTED = crafted()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_refused(name, file):
    assert outcome_of(CRAFTED[name], file)[0] == "refused"


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blob=malformed)
@example(blob=GOOD)
def test_a_generated_file_is_refused_in_one_line_or_right(blob, file):
    outcome_of(blob, file)


def test_generated_files_are_of_both_kinds(file):
    """Else the law above would say little."""
    found = []

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(blob=malformed)
    def each(blob):
        found.append(outcome_of(blob, file)[0])

    each()
    assert found.count("refused") > 50
    assert found.count("accepted") > 2


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (pack({"w": tensor(), "v": tensor()}, ONES), "do not lie end to end"),
        (pack({"w": tensor()}, ONES + b"x"), "left over"),
        (pack({"w": tensor(shape=[3])}, ONES), "a size is wrong"),
        (pack('{"w": 1, "w": 2}'), "a key twice"),
        (pack({"w": tensor()}, struct.pack("<2f", 1, float("nan"))), "not finite"),
        (pack({"v": tensor()}, ONES), "other tensors"),
    ],
)
def test_the_judge_sees_what_is_wrong(blob, said, file):
    """A reader that took these would be found out."""
    import torch

    came = {"w": torch.frombuffer(bytearray(blob[-8:]), dtype=torch.float32)}
    assert said in doubt(blob, came)


def test_a_reader_that_crashes_is_found_and_the_file_is_shrunk(monkeypatch, file):
    def careless(path):
        if b"dtype" in Path(path).read_bytes():
            raise KeyError("dtype")
        return read_tensors(path)

    monkeypatch.setattr(files_malformed, "read_tensors", careless)
    monkeypatch.setattr(files_malformed, "read_header", lambda path: None)
    wrong = {}
    files_malformed._generated(300, 0, file.parent, wrong)
    assert "KeyError: 'dtype'" in wrong["generated"]
    assert len(wrong["generated"]) < 400
