"""Work is done to its end when nobody reads what it says any more."""

import os
import select
import subprocess
import sys

import pytest

from sfumato.utils.processes import BROKEN_PIPE_VARIABLE

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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no such device")
@pytest.mark.parametrize(("stream", "code"), [("stderr", 3), ("stdout", 2)])
def test_a_full_disk_under_the_log_stops_nothing_and_one_under_results_does(stream, code, tmp_path):
    with open("/dev/full", "wb") as full:
        process = subprocess.run([sys.executable, "-c", PROGRAM, stream, str(tmp_path / "file")], **{stream: full})
    assert process.returncode == code
    assert (tmp_path / "file").exists() == (stream == "stderr")


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX's")
def test_a_log_goes_on_once_there_is_room_again(tmp_path):
    program = (
        "import resource, sys\nfrom sfumato.cli import run\n"
        "def work(argv):\n"
        "    before = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))\n"
        "    print('lost', file=sys.stderr)\n    print('lost', file=sys.stderr)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, before)\n"
        "    print('kept', file=sys.stderr)\n"
        "run(work)"
    )
    with (tmp_path / "log").open("wb") as log:
        assert subprocess.run([sys.executable, "-c", program], stderr=log).returncode == 0
    assert (tmp_path / "log").read_text().endswith("kept\n")


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
        env=os.environ | {BROKEN_PIPE_VARIABLE: "1"},
    )
    os.close(writing)
    assert process.wait(timeout=60) == 141
    assert not (tmp_path / "file").exists()


def test_what_is_said_arrives_whole_and_signs_that_are_lacking_as_numbers():
    program = "import sys\nfrom sfumato.cli import run\nrun(lambda argv: print('caf\\u00e9', argv[0]) or 0)"
    command = [sys.executable, "-c", program, "x"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.stdout.strip(), done.stderr) == (b"caf\\xe9 x", b"")
