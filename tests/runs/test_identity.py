"""What makes a training another one, whose a folder is, and how both are said."""

import errno
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sfumato
from sfumato.config import to_toml
from sfumato.errors import RunError
from sfumato.runs import folder as identity
from sfumato.runs.folder import changed_facts, check_folder, differences, read_facts, write_facts
from sfumato.runs.lock import Lock
from sfumato.runs.options import FolderOptions
from sfumato.runs.run import Run
from sfumato.training.options import RunOptions, TrainerOptions
from tests.logged import log_in
from tests.runs.said import lines, problem, start
from tests.runs.small import Config, train

# Facts


def test_a_fact_that_was_not_known_is_no_change():
    assert changed_facts({}, {"data": "a"}) == []
    assert changed_facts({"data": "a", "more": "b"}, {"data": "a"}) == []


def test_a_changed_digest_is_shown_by_its_beginning():
    assert changed_facts({"data": "a" * 64}, {"data": "b" * 64}) == [f"data {'a' * 24} -> {'b' * 24}"]


@pytest.mark.parametrize("text", ["[1]", "7", "{", "[" * 100_000, "null"])
def test_facts_that_are_none_are_nothing_known(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    assert read_facts(tmp_path) == {}


def test_facts_come_back(tmp_path):
    assert read_facts(tmp_path) == {}
    write_facts(tmp_path, {"data": "ä", "base": "b"})
    assert read_facts(tmp_path) == {"data": "ä", "base": "b"}


def test_the_facts_of_a_run(tmp_path):
    run = start(tmp_path)
    run.identify(data="d")
    run.close()
    text = (tmp_path / "run/run.json").read_text()
    found = json.loads(text)
    assert found["sfumato"] == sfumato.__version__
    assert found["torch"] == re.match(r"[\d.]+", torch.__version__)[0]
    assert list(found) == ["program", "data", "processes", "sfumato", "torch", "diffusers", "transformers"]
    assert text.startswith('{\n "program": "test",\n "data": "d",\n "processes": "1",\n ')
    assert text.endswith('"\n}\n')


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"a.png": "1 1", "b.png": "2 9"}, "b.png has another caption, crop or setting"),
        ({"a.png": "9 1", "b.png": "2 2", "c.png": "3 3"}, "c.png is new, a.png or its mask is another"),
        ({}, "a.png is gone, b.png is gone"),
        (
            {"a.png": "1 1", **{f"{name}.png": "3 3" for name in "cdef"}},
            "c.png is new, d.png is new, e.png is new and 2",
        ),
        ({"b.png": "2 2", "a.png": "1 1"}, "its images come in another order"),
    ],
)
def test_of_a_data_set_the_pictures_that_differ_are_named(now, said):
    before = {"a.png": "1 1", "b.png": "2 2"}
    (line,) = changed_facts({"data": "d", "base": "b"}, {"data": "e", "base": "b"}, {"data": (before, now)})
    assert line.startswith(f"data: {said}")


def test_a_run_that_goes_on_says_which_picture_is_another(tmp_path):
    for resume, digests in ((False, "1 1"), (True, "1 2")):
        run = start(tmp_path, checkpoint_every=1, resume=resume)
        data = SimpleNamespace(fingerprint=digests, contents={"a.png": digests})
        if resume:
            assert "data: a.png has another caption" in problem(lambda run=run, data=data: run.identify(data=data))
            return
        run.identify(data=data)
        for step in run.steps(1):
            step.done(loss=1.0)
        run.close()


def test_a_fact_that_cannot_be_written_stops_and_lets_the_folder_go(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def held_open(*_):
        raise PermissionError(errno.EACCES, "The file is in use", "samples.png")

    for resume, elsewhere in ((False, ", or give another --output"), (True, "")):
        if resume:
            start(tmp_path).close()
        run = start(tmp_path, resume=resume)
        with monkeypatch.context() as patched:
            patched.setattr(identity, "write_facts", full)
            said = problem(lambda run=run: run.identify(data="d"))
        assert said == f"{tmp_path / 'run'}: No space left on device. Make room{elsewhere}."
        run = start(tmp_path, resume=resume)
        with monkeypatch.context() as patched:
            patched.setattr(identity, "write_facts", held_open)
            said = problem(lambda run=run: run.identify(data="d"))
        assert said == f"samples.png: The file is in use. Close what has it open{elsewhere}."
        assert not run._claim.is_held
        assert (tmp_path / "run").exists() == resume


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


@pytest.mark.parametrize("content", [None, b"width = ", b"\xff\xfe\x00", b"\xff"])
def test_a_config_that_cannot_be_read_is_a_difference(content, tmp_path):
    if content is not None:
        (tmp_path / "config.toml").write_bytes(content)
    assert differences(tmp_path, Config(output=Path("run")), "small") == ["config.toml is missing or broken"]


def test_a_config_that_an_editor_marked_as_unicode_is_read(tmp_path):
    config = Config(output=Path("run"))
    folder_of(config, tmp_path)
    text = (tmp_path / "config.toml").read_text(encoding="utf-8")
    (tmp_path / "config.toml").write_text(text, encoding="utf-8-sig")
    assert differences(tmp_path, config, "small") == []


def test_a_long_value_is_cut_and_comes_on_one_line(tmp_path):
    config = Config(output=Path("run"), data="a\n" * 100)
    folder_of(replace(config, data="b"), tmp_path)
    assert differences(tmp_path, config, "small") == [f"data b -> {('a ' * 100)[:80]}"]


def test_every_change_is_shown_and_with_force_said(tmp_path, capsys):
    config = Config(output=tmp_path / "run", steps=2)
    train(config)
    other = replace(config, resume=True, width=4, seed=1)
    assert problem(lambda: train(other)) == (
        f"{tmp_path / 'run'} was trained with another config: seed 0 -> 1; width 8 -> 4. Resume with the same, or with "
        "--force."
    )
    (tmp_path / "run/config.toml").unlink()
    assert problem(lambda: train(replace(config, resume=True))) == (
        f"{tmp_path / 'run'} was trained with another config: config.toml is missing or broken. Resume with the same, "
        "or with --force."
    )
    capsys.readouterr()
    train(replace(config, resume=True, force=True))
    assert lines(capsys)[:2] == [
        "changed by --force: config.toml is missing or broken",
        "resuming from step 2",
    ]
    assert [row["step"] for row in log_in(tmp_path / "run")] == [1, 2]


def test_an_unset_value_is_shown_as_that(tmp_path):
    config = Config(output=tmp_path / "run", steps=2)
    train(config)
    other = replace(config, resume=True, sample_prompts=("a\n" * 99,), name="n")
    assert problem(lambda: train(other)).startswith(
        f"{tmp_path / 'run'} was trained with another config: name unset -> n; sample_prompts [] -> ['a\\na\\n"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"cache": Path("c")},
        {"device": "cuda:1"},
        {"push_to_hub": "me/it"},
        {"tensorboard": True},
        {"wandb": "a"},
        {"author": "A"},
        {"license": "mit"},
        {"keep": 9},
    ],
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
        check_folder(RunOptions(output=tmp_path))
    assert check_folder(RunOptions(output=tmp_path, resume=True))
    assert not check_folder(RunOptions(output=tmp_path, overwrite=True))


def test_what_an_error_stopped_before_its_first_step_may_be_started_again(tmp_path):
    write_facts(tmp_path, {"program": "small"})
    (tmp_path / "log.jsonl").write_text("")
    assert not check_folder(RunOptions(output=tmp_path))
    (tmp_path / "checkpoints/000000").mkdir(parents=True)
    with pytest.raises(RunError, match="holds a run already"):
        check_folder(RunOptions(output=tmp_path))


def test_further_names_that_a_program_writes_are_looked_at(tmp_path):
    (tmp_path / "model").mkdir()
    assert not check_folder(RunOptions(output=tmp_path))
    with pytest.raises(RunError, match="holds model and no run"):
        check_folder(RunOptions(output=tmp_path), ["model"])


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


def test_a_folder_is_made_with_all_above_it(tmp_path):
    Run.start(RunOptions(output=tmp_path / "a/b/run"), program="test").close()
    assert (tmp_path / "a/b/run/config.toml").is_file()


def test_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file/run"
    assert problem(lambda: Run.start(RunOptions(output=place), program="test")) == (
        f"{place} cannot be written (Not a directory); see to its permissions, or give another --output."
    )
    assert problem(lambda: Run.start(RunOptions(output=tmp_path / "file"), program="test")) == (
        f"{tmp_path / 'file'} is a file; --output wants a folder of its own for the run."
    )


def test_what_the_folder_holds_decides(tmp_path):
    assert check_folder(FolderOptions(output=tmp_path)) is False
    assert problem(lambda: check_folder(FolderOptions(output=tmp_path, resume=True))) == (
        f"there is no run to resume in {tmp_path}; without --resume one begins there."
    )
    (tmp_path / "samples").mkdir()
    (tmp_path / f"{tmp_path.name}.safetensors").write_text("")
    assert problem(lambda: check_folder(FolderOptions(output=tmp_path))) == (
        f"{tmp_path} holds samples, {tmp_path.name}.safetensors and no run; a run would write over that. Give an "
        "--output of its own."
    )
    (tmp_path / "run.json").write_text("{}")
    assert check_folder(FolderOptions(output=tmp_path)) is False  # nothing to lose yet
    (tmp_path / "log.jsonl").write_text("1")
    assert problem(lambda: check_folder(FolderOptions(output=tmp_path))) == (
        f"{tmp_path} holds a run already; --resume goes on with it, --overwrite replaces it, or give another --output."
    )
    assert check_folder(FolderOptions(output=tmp_path, overwrite=True)) is False
    assert check_folder(FolderOptions(output=tmp_path, resume=True)) is True


def test_pictures_where_the_card_has_its_own_are_looked_at(tmp_path):
    (tmp_path / "images").mkdir()
    assert "holds images and no run" in problem(lambda: check_folder(FolderOptions(output=tmp_path)))


@pytest.mark.parametrize("inner", ["samples", "checkpoints/000004", "model/unet", "kept/here"])
def test_a_folder_that_another_run_writes_into_is_refused(inner, tmp_path):
    (tmp_path / "run.json").write_text('{"writes": "model"}')
    said = f"{tmp_path / inner} is a folder of the run in {tmp_path}, which may remove what lies there; give an"
    if inner.startswith("kept"):  # by somebody
        assert check_folder(FolderOptions(output=tmp_path / inner)) is False
    else:
        assert problem(lambda: check_folder(FolderOptions(output=tmp_path / inner))).startswith(said)


def test_the_file_that_a_name_will_have_is_looked_at(tmp_path):
    (tmp_path / "n.safetensors").write_text("")
    assert check_folder(RunOptions(output=tmp_path)) is False
    assert "holds n.safetensors and no run" in problem(lambda: check_folder(RunOptions(output=tmp_path, name="n")))


def test_a_script_that_calls_a_trainer_is_no_copy_of_it(monkeypatch, tmp_path):
    """It reads no options, so that a run of it goes on with the trainer; a copy has a Config of its own."""
    import sfumato.trainers.lora as trainer

    script = SimpleNamespace(__file__=str(tmp_path / "mine.py"), Config=trainer.Config, train=trainer.train)
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert identity.copied_program("lora") is None
    script.Config = type("Config", (), {"__module__": "__main__"})
    assert identity.copied_program("lora") == (tmp_path / "mine.py").resolve()
