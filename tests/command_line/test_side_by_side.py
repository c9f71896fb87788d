"""Commands at the same time: what they say, what each may use, and what becomes of all when one fails."""

import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import sfumato
from sfumato.utils import processes

DEAF = 'trap "echo heard; trap - TERM" TERM; echo begun; while true; do sleep 0.05; done'  # to the first alone
ENDLESS = 'trap "echo saved; exit 143" TERM; echo begun; while true; do sleep 0.05; done'


@pytest.fixture
def shell(tmp_path) -> Path:
    """In place of Python: runs its last word as a shell does."""
    program = tmp_path / "shell"
    program.write_text('#!/bin/sh\nfor last; do :; done\neval "$last"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_each_line_is_after_the_name_of_whose_it_is(capsys):
    assert processes.run_commands({"one": ["--version"], "another": ["ls"]}, threads=2) is None
    lines = capsys.readouterr().err.splitlines()
    assert f"one      {sfumato.__version__}" in lines
    assert any(line.startswith("another  quickstart") for line in lines)


def test_a_moving_bar_becomes_lines_and_threads_are_shared_out(shell, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", str(shell))
    bar = ["printf '\\r10%%\\r20%%'"]
    assert processes.run_commands({"a": bar, "b": ["echo $OMP_NUM_THREADS"]}, threads=7) is None
    assert sorted(capsys.readouterr().err.splitlines()) == ["a  10%", "a  20%", "b  3"]


def test_where_one_fails_the_others_save_what_they_have(shell, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", str(shell))
    failing = "sleep 1; echo 'no such folder'; exit 2"
    assert processes.run_commands({"long": [ENDLESS], "wrong": [failing]}, threads=2) == ("wrong", 2, "")
    assert capsys.readouterr().err.splitlines() == ["long   begun", "wrong  no such folder", "long   saved"]


def test_why_one_failed_is_left_to_the_caller_and_a_warning_is_not(shell, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", str(shell))
    failing = "echo 'sfumato: slow.'; echo on; echo 'sfumato: no room.'; exit 2"
    assert processes.run_commands({"wrong": [failing]}, threads=2) == ("wrong", 2, "no room.")
    assert capsys.readouterr().err.splitlines() == ["wrong  sfumato: slow.", "wrong  on"]
    assert processes.run_commands({"right": ["echo 'sfumato: slow.'"]}, threads=2) is None
    assert capsys.readouterr().err.splitlines() == ["right  sfumato: slow."]


def test_what_comes_after_one_is_done_while_the_others_go_on(shell, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", str(shell))
    note, began = tmp_path / "note", []
    after = (began.append(step) or note.write_text(step) for step in ("one", "two"))
    waits = f"while ! grep -qs two {note}; do sleep 0.05; done; echo found"
    assert processes.run_commands({"short": ["echo done"], "long": [waits]}, threads=2, after={"short": after}) is None
    assert capsys.readouterr().err.splitlines() == ["short  done", "long   found"]
    assert began == ["one", "two"]


def test_what_comes_after_is_not_begun_once_one_failed(shell, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(shell))
    began: list[int] = []
    after = {"long": (began.append(step) for step in (1, 2)), "wrong": (began.append(step) for step in (3,))}
    assert processes.run_commands({"long": [ENDLESS], "wrong": ["sleep 1; exit 2"]}, threads=2, after=after)
    assert began == []


def test_where_what_comes_after_one_breaks_the_others_are_stopped(shell, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", str(shell))
    broken = (1 // zero for zero in (0,))
    with pytest.raises(ZeroDivisionError):
        processes.run_commands({"long": [ENDLESS], "short": ["sleep 1"]}, threads=2, after={"short": broken})
    assert capsys.readouterr().err.splitlines() == ["long   begun", "long   saved"]


INTERRUPTIONS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)]
)


def two_of(command, shell):
    """A process that runs the command twice, as a and b, and which has heard that both have begun."""
    program = f"""
import signal, sys
from sfumato.utils import processes as side_by_side
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background leaves it ignored
sys.executable = {str(shell)!r}
side_by_side.run_commands({{"a": [{command!r}], "b": [{command!r}]}}, threads=2)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert both_say(process) == {"a  begun\n", "b  begun\n"}
    return process


def both_say(process):
    return {process.stderr.readline() for _ in "ab"}


@INTERRUPTIONS
def test_an_interruption_reaches_each_once(number, code, shell):
    process = two_of(ENDLESS, shell)
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == code
    assert [rest.count(f"{name}  saved\n") for name in "ab"] == [1, 1]


@INTERRUPTIONS
def test_a_second_interruption_is_passed_on_too(number, code, shell):
    process = two_of(DEAF, shell)
    process.send_signal(number)
    assert both_say(process) == {"a  heard\n", "b  heard\n"}
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
