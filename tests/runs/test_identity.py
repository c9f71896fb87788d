"""What makes a training another one, whose a folder is, and how both are said."""

from dataclasses import replace
from pathlib import Path

import pytest

from sfumato.config import to_toml
from sfumato.errors import RunError
from sfumato.options import RunOptions, TrainerOptions
from sfumato.runs.folder import going_on
from sfumato.runs.identity import differences, other_facts, read_facts, write_facts
from sfumato.runs.lock import Lock
from tests.runs.small import Config

# Facts


def test_a_fact_that_was_not_known_is_no_change():
    assert other_facts({}, {"data": "a"}) == []
    assert other_facts({"data": "a", "more": "b"}, {"data": "a"}) == []


def test_a_changed_digest_is_shown_by_its_beginning():
    assert other_facts({"data": "a" * 64}, {"data": "b" * 64}) == [f"data {'a' * 24} -> {'b' * 24}"]


@pytest.mark.parametrize("text", ["[1]", "7", "{", "[" * 100_000, "null"])
def test_facts_that_are_none_are_nothing_known(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    assert read_facts(tmp_path) == {}


def test_facts_come_back(tmp_path):
    assert read_facts(tmp_path) == {}
    write_facts(tmp_path, {"data": "ä", "base": "b"})
    assert read_facts(tmp_path) == {"data": "ä", "base": "b"}


# Config


def folder_of(config, tmp_path):
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return tmp_path


def test_a_folder_that_does_not_tell_its_program_is_not_another_s(tmp_path):
    config = Config(output=Path("run"))
    folder_of(config, tmp_path)
    assert differences(tmp_path, config, "small") == []
    write_facts(tmp_path, {"program": "other"})
    assert differences(tmp_path, config, "small") == ["program other -> small"]


@pytest.mark.parametrize("content", [None, b"width = ", b"\xff\xfe"])
def test_a_config_that_cannot_be_read_is_a_difference(content, tmp_path):
    if content is not None:
        (tmp_path / "config.toml").write_bytes(content)
    assert differences(tmp_path, Config(output=Path("run")), "small") == ["config.toml is missing or broken"]


def test_a_long_value_is_cut_and_comes_on_one_line(tmp_path):
    config = Config(output=Path("run"), data="a\n" * 100)
    folder_of(replace(config, data="b"), tmp_path)
    assert differences(tmp_path, config, "small") == [f"data b -> {('a ' * 100)[:80]}"]


@pytest.mark.parametrize(
    "changed",
    [{"cache": Path("c")}, {"device": "cuda:1"}, {"push_to_hub": "me/it"}, {"tensorboard": True}, {"keep": 9}],
    ids=lambda changed: next(iter(changed)),
)
def test_where_it_runs_and_what_is_kept_of_it_is_no_difference(changed, tmp_path):
    config = TrainerOptions(images=Path("pictures"), output=Path("run"))
    folder_of(config, tmp_path)
    assert differences(tmp_path, replace(config, **changed), "small") == []
    assert differences(tmp_path, replace(config, **changed, seed=1), "small") == ["seed 0 -> 1"]


# Whose a folder is


def test_a_log_alone_is_a_run_that_may_not_be_lost(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RunError, match="holds a run already"):
        going_on(RunOptions(output=tmp_path))
    assert going_on(RunOptions(output=tmp_path, resume=True))
    assert not going_on(RunOptions(output=tmp_path, overwrite=True))


def test_what_an_error_stopped_before_its_first_step_may_be_started_again(tmp_path):
    write_facts(tmp_path, {"program": "small"})
    (tmp_path / "log.jsonl").write_text("")
    assert not going_on(RunOptions(output=tmp_path))
    (tmp_path / "checkpoints/000000").mkdir(parents=True)
    with pytest.raises(RunError, match="holds a run already"):
        going_on(RunOptions(output=tmp_path))


def test_further_names_that_a_program_writes_are_looked_at(tmp_path):
    (tmp_path / "model").mkdir()
    assert not going_on(RunOptions(output=tmp_path))
    with pytest.raises(RunError, match="holds model and no run"):
        going_on(RunOptions(output=tmp_path), ["model"])


def test_who_does_not_hold_a_folder_cannot_let_it_go(tmp_path):
    first, second = Lock(tmp_path), Lock(tmp_path)
    assert first.take() is None
    with pytest.raises(RunError, match="is in use by process"):
        second.take()
    second.release()
    assert (tmp_path / ".holder.json").exists()
    assert first.is_held
    first.release()
    assert second.take() is None
    second.release()
