"""Work is done to its end when nobody reads what it says any more."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path
from sfumato.cli import run

def work(argv):
    for number in range(2000):
        print("word " * 20, file=getattr(sys, argv[0]), flush=True)
    Path(argv[1]).write_text("done")
    return 3

run(work)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_stops_nothing(stream, tmp_path):
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, stream, str(tmp_path / "file")], **{stream: writing})
    os.close(writing)
    assert os.read(reading, 5) == b"word "
    os.close(reading)
    assert process.wait(timeout=60) == 3
    assert (tmp_path / "file").read_text() == "done"


def test_help_for_a_reader_of_one_line_is_no_failure():
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-m", "sfumato", "train", "lora", "--help"], stdout=writing)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    assert process.wait(timeout=60) == 0


def test_what_is_said_arrives_whole_and_signs_that_are_lacking_as_numbers():
    program = "import sys\nfrom sfumato.cli import run\nrun(lambda argv: print('caf\\u00e9', argv[0]) or 0)"
    command = [sys.executable, "-c", program, "x"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.stdout.strip(), done.stderr) == (b"caf\\xe9 x", b"")
