"""The plot of a log."""

import json

import pytest
from PIL import Image

from sfumato.errors import RunError
from sfumato.runs.reporting.plot import plot_log, read_log, running_mean


def write(path, rows, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def test_each_number_is_a_curve(tmp_path):
    rows = [{"step": 1, "loss": 0.5, "rate": 0.1}, {"step": 1, "fit": 0.4}, {"step": 2, "loss": 0.25}]
    log = write(tmp_path / "log.jsonl", rows)
    assert read_log(log) == {"loss": ([1, 2], [0.5, 0.25]), "rate": ([1], [0.1]), "fit": ([1], [0.4])}


def test_a_last_line_cut_short_and_numbers_that_are_none_are_left_out(tmp_path):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan")}, {"step": 2, "loss": 10**400}]
    log = write(tmp_path / "log.jsonl", rows, end='{"step": 3, "lo')
    assert read_log(log) == {"loss": ([1], [0.5])}


def test_a_broken_line_within_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"loss": 1}\n{"step": 1, "loss": 1}\n')
    with pytest.raises(RunError, match="line 1"):
        read_log(tmp_path / "log.jsonl")


def test_equal_logs_give_equal_pictures(tmp_path):
    log = write(tmp_path / "log.jsonl", [{"step": i, "loss": 1 / i, "fit": 0.1, "other": i} for i in range(1, 50)])
    one = plot_log(log, tmp_path / "one.png").read_bytes()
    assert plot_log(log, tmp_path / "two.png").read_bytes() == one
    assert Image.open(tmp_path / "one.png").size == (1000, 580)


def test_an_empty_log_leaves_no_file(tmp_path):
    with pytest.raises(RunError, match="nothing in it"):
        plot_log(write(tmp_path / "log.jsonl", []), tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_the_running_mean_of_a_line_is_the_line_within():
    means = running_mean([float(i) for i in range(100)])
    assert means[5:95] == pytest.approx(list(range(5, 95)))
    assert means[0] == pytest.approx(2.5)
