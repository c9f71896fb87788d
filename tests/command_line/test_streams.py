"""Work is done to its end when nobody reads what it says any more."""

import os
import select
import subprocess
import sys

import pytest

from sfumato.command_line.streams import STOPS_UNREAD

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


def test_help_that_nobody_reads_is_no_failure():
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen([sys.executable, "-m", "sfumato", "train", "lora", "--help"], stdout=writing)
    os.close(writing)
    assert process.wait(timeout=60) == 0


def test_a_stream_that_a_program_has_put_in_its_place_stays(tmp_path):
    program = (
        "import sys\nfrom sfumato.cli import run\n"
        f"sys.stdout = open({str(tmp_path / 'said')!r}, 'w')\n"
        "run(lambda argv: print('hello', flush=True) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "said").read_text() == "hello\n"


TERMINALS = pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no such terminals")


@TERMINALS
def test_a_terminal_that_is_closed_stops_nothing(tmp_path):
    ours, terminal = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, "stdout", str(tmp_path / "file")], stdout=terminal)
    os.close(terminal)
    assert os.read(ours, 5) == b"word "
    os.close(ours)
    assert process.wait(timeout=60) == 3
    assert (tmp_path / "file").read_text() == "done"


@TERMINALS
def test_a_terminal_has_each_line_at_once():
    ours, terminal = os.openpty()
    program = "import sys\nfrom sfumato.cli import run\nrun(lambda argv: print('hello') or len(sys.stdin.read()))"
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=terminal, env=usual) as process:
        told, _, _ = select.select([ours], [], [], 30)
        process.communicate()
    os.close(terminal)
    assert told
    assert os.read(ours, 5) == b"hello"
    os.close(ours)


def test_a_command_that_another_program_reads_ends_with_it(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "stdout", str(tmp_path / "file")],
        stdout=writing,
        env=os.environ | {STOPS_UNREAD: "1"},
    )
    os.close(writing)
    assert process.wait(timeout=60) == 141
    assert not (tmp_path / "file").exists()


def test_what_is_said_arrives_whole_and_signs_that_are_lacking_as_numbers():
    program = "import sys\nfrom sfumato.cli import run\nrun(lambda argv: print('caf\\u00e9', argv[0]) or 0)"
    command = [sys.executable, "-c", program, "x"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.stdout.strip(), done.stderr) == (b"caf\\xe9 x", b"")
