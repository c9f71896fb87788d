"""What is left of a run that an error stops before its first step: nothing of a new one, all of an earlier one."""

import errno
import os

import pytest

from sfumato import cli
from sfumato.errors import DataError
from sfumato.runs import progress
from tests.runs.faults import failing
from tests.runs.said import problem, start


@pytest.fixture
def folder(tmp_path):
    """Where `start(tmp_path)` has its run."""
    return tmp_path / "run"


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_is_gone(folder, tmp_path):
    run = start(tmp_path)
    assert "config.toml" in left(folder)
    progress.abandon_unbegun()
    assert left(tmp_path) == []
    run.close()  # as whatever holds it may do later


def test_what_was_in_the_folder_stays(folder, tmp_path):
    folder.mkdir()
    (folder / "note.txt").write_text("mine")
    run = start(tmp_path)
    progress.abandon_unbegun()
    assert left(folder) == ["note.txt"]
    assert start(tmp_path) is not run  # nobody holds it


@pytest.mark.parametrize(("code", "mend"), [(errno.ENOSPC, "make room"), (errno.EACCES, "see to its permissions")])
def test_a_disk_that_takes_no_run_is_told_with_what_helps_and_keeps_nothing(code, mend, tmp_path, monkeypatch):
    with failing(monkeypatch, tmp_path, "write", 0, code):
        assert problem(lambda: start(tmp_path)).endswith(f"({os.strerror(code)}); {mend}, or give another --output.")
    assert left(tmp_path) == []
    run = start(tmp_path)
    run.close()
    with failing(monkeypatch, tmp_path, "write", 0, code):
        assert problem(lambda: start(tmp_path, resume=True)).endswith(f"({os.strerror(code)}); {mend}.")


def test_what_took_time_to_make_stays_with_the_run_that_made_it(folder, tmp_path):
    run = start(tmp_path)
    (folder / "class").mkdir()
    progress.abandon_unbegun()
    assert left(folder) == [".lock", "class", "config.toml", "log.jsonl", "run.json"]
    assert start(tmp_path) is not run


def test_a_run_that_has_begun_stays(folder, tmp_path):
    run = start(tmp_path)
    next(run.steps(2))
    before = left(folder)
    progress.abandon_unbegun()
    assert left(folder) == before
    run.close()


def test_a_run_that_was_to_be_replaced_stays_and_is_nobodys(folder, tmp_path):
    first = start(tmp_path)
    next(first.steps(2)).done(loss=1.0)
    first.close()
    before = left(folder)
    second = start(tmp_path, overwrite=True)
    progress.abandon_unbegun()
    assert left(folder) == before
    assert start(tmp_path, overwrite=True) is not second


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("no.png: broken."), "no.png: broken."),
        (DataError("a\nb.png: broken."), "a\\nb.png: broken."),
        (OSError(errno.ENAMETOOLONG, "File name too long", "cache"), "cache: File name too long. Give a shorter one."),
    ],
    ids=["of ours", "a name of two lines", "of the system"],
)
def test_an_error_of_a_program_withdraws_and_is_one_line(error, said, tmp_path, capsys):
    kept = []

    def program(argv):
        kept.append(start(tmp_path))
        raise error

    assert cli.guarded(program, []) == 2
    assert left(tmp_path) == []
    assert capsys.readouterr().err == f"sfumato: {said}\n"


def test_an_interruption_leaves_what_can_be_resumed(tmp_path, capsys):
    kept = []

    def program(argv):
        kept.append(start(tmp_path))
        raise KeyboardInterrupt

    assert cli.guarded(program, []) == 130
    assert not kept[0]._claim.is_held
    assert start(tmp_path, resume=True).step == 0
    assert "ended without finishing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("every", "uploading", "kept"),
    [(every, False, " All its steps are kept; the rest is written by: sfumato resume {}") for every in (0, 1)]
    + [(1, True, "")],
)
def test_an_interruption_after_the_last_step_says_what_is_kept(every, uploading, kept, folder, tmp_path, capsys):
    held = []

    def program(argv):
        run = start(tmp_path, checkpoint_every=every)
        held.append(run)
        run.every(1, lambda step: run.log(step=step, fit=0.5))
        for step in run.steps(1):
            step.done(loss=1.0)
        if uploading:
            run.mark_finished()
        raise KeyboardInterrupt

    assert cli.guarded(program, []) == 130
    assert capsys.readouterr().err.endswith(f"sfumato: interrupted.{kept.format(folder)}\n")
    assert held[0]._claim.is_held == bool(uploading)
    held[0].close()


def test_what_was_looked_at_is_on_the_disk_before_it_is_noted_so(folder, tmp_path):
    run = start(tmp_path, checkpoint_every=1)
    run.every(1, lambda step: run.log(step=step, fit=0.5))
    for step in run.steps(1):
        step.done(loss=1.0)
    assert '{"step": 1, "fit": 0.5}' in (folder / "log.jsonl").read_text()
    run.close()
