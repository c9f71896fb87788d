"""Trainings beside one another, as their folders tell of them."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.runs.lock import Lock, is_in_use
from sfumato.runs.reporting import overview
from sfumato.runs.reporting.overview import differing_settings, find_runs, read_overview, sample_sheet
from sfumato.runs.reporting.plot import PROMPT, last_samples
from tests.runs.small import Config, train

RED, BLUE = (255, 0, 0), (0, 0, 255)


def trained(folder, **options):
    train(Config(output=folder, name="m", measure_every=0, checkpoint_every=2, **{"steps": 4} | options))
    return folder


def drawn(folder, step, *pictures):
    """Samples of a step, each (prompt, colour)."""
    place = folder / "samples" / f"{step:06d}"
    place.mkdir(parents=True)
    for number, (prompt, colour) in enumerate(pictures):
        told = PngImagePlugin.PngInfo()
        told.add_itxt(PROMPT, prompt)
        Image.new("RGB", (64, 64), colour).save(place / f"{number}.png", pnginfo=told)


def problem(work):
    with pytest.raises(ConfigError) as ended:
        work()
    return str(ended.value)


# Which there are


def test_runs_are_found_below_and_each_once(tmp_path):
    for name in ("b", "a", "deep/er/c", ".hidden", "a/checkpoints/inner"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    found = find_runs([tmp_path, tmp_path / "b", tmp_path / "deep"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a", "b", "deep/er/c"]
    assert find_runs([tmp_path / "a"]) == [tmp_path / "a"]


def test_a_place_without_a_run_is_named(tmp_path):
    wanted = "name the folder of one, or one that holds some."
    assert problem(lambda: find_runs([tmp_path])) == f"{tmp_path} holds no run; {wanted}"
    said = f"{tmp_path / 'b'}: there is no such folder; name that of a run, or one that holds some."
    assert problem(lambda: find_runs([tmp_path / "b"])) == said


# What each tells


def test_a_run_at_its_end_and_one_that_went_on_after_it(tmp_path):
    folder = trained(tmp_path / "run")
    seen = read_overview(folder)
    assert (seen.program, seen.made, seen.steps, seen.state) == ("small", 4, 4, "done")
    assert seen.learned == folder / "m.safetensors"
    assert seen.settings["width"] == 8
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert seen.figures == {"loss": pytest.approx(np.mean([row["loss"] for row in rows[-2:]]))}
    newest = folder / "checkpoints/000004/manifest.json"
    os.utime(newest, times=(later := (folder / "m.safetensors").stat().st_mtime + 1, later))
    assert (read_overview(folder).state, read_overview(folder).learned) == ("stopped", None)


def test_a_run_that_was_stopped_or_is_under_way(tmp_path):
    config = Config(output=tmp_path / "run", name="m", steps=4, measure_every=2, checkpoint_every=2)
    states = []

    def look(step, _):
        states.append((is_in_use(config.output), read_overview(config.output).state))
        if step.number == 2:
            raise KeyError

    with pytest.raises(KeyError):
        train(config, after=look)
    assert states == [(True, "running")] * 3
    seen = read_overview(config.output)
    assert (seen.made, seen.state, seen.learned) == (2, "stopped", None)
    assert not is_in_use(config.output)


def test_a_killed_process_does_not_use_its_folder(tmp_path):
    assert not is_in_use(tmp_path / "none")
    assert not is_in_use(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".holder.json").write_text('{"pid": 1}')
    assert not is_in_use(tmp_path)
    lock = Lock(tmp_path)
    assert lock.take()  # which nothing holds on to
    assert is_in_use(tmp_path)
    lock.release()
    assert not is_in_use(tmp_path)


def test_what_is_broken_in_a_folder_is_left_out(tmp_path):
    folder = trained(tmp_path / "run")
    (folder / "config.toml").write_text("steps = [")
    (folder / "log.jsonl").write_text("no\nlog\n")
    seen = read_overview(folder)
    assert (seen.program, seen.made, seen.steps, dict(seen.figures), seen.settings) == ("small", 0, None, {}, {})
    for name in ("config.toml", "log.jsonl", "m.safetensors"):
        (folder / name).unlink()
    assert read_overview(folder).state == "stopped"


def test_the_settings_told_are_those_in_which_runs_of_a_program_differ(tmp_path):
    seen = [read_overview(trained(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 1))]
    assert differing_settings(seen) == [{"seed": 0}, {"seed": 1}]
    other = replace(seen[1], program="other")
    assert differing_settings([seen[0], other]) == [{}, {}]
    lacking = replace(seen[1], settings={"keep": 7})
    assert (
        differing_settings([seen[0], lacking])[1].keys()
        == set(seen[0].settings) - overview.IGNORED_OPTIONS - overview._NAMES
    )
    assert set(differing_settings([seen[0], lacking])[1].values()) == {None}


# What they draw


def test_of_each_run_the_last_samples_stand_under_their_prompts(tmp_path, monkeypatch):
    first, second, third = (trained(tmp_path / name, seed=seed) for seed, name in enumerate("abc"))
    drawn(first, 0, ("fox", BLUE))
    drawn(first, 4, ("fox", RED), ("owl", BLUE))
    drawn(second, 2, ("owl", RED), ("owl", BLUE))
    sheets = []
    monkeypatch.setattr(overview, "contact_sheet", lambda cells, **labels: sheets.append((cells, labels)))
    sample_sheet([read_overview(folder) for folder in (first, second, third)])
    ((cells, labels),) = sheets
    assert labels == {"row_labels": ["a, step 4\nseed 0", "b, step 2\nseed 1"], "column_labels": ["fox", "owl", "owl"]}
    colours = [[None if each is None else each.getpixel((0, 0)) for each in row] for row in cells]
    assert colours == [[RED, BLUE, None], [None, RED, BLUE]]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, monkeypatch):
    folders = [trained(tmp_path / name / "run", seed=5) for name in "ab"]
    for folder in folders:
        drawn(folder, 4, ("fox", RED))
    sheets = []
    monkeypatch.setattr(overview, "contact_sheet", lambda _, **labels: sheets.append(labels["row_labels"]))
    sample_sheet([read_overview(folder) for folder in folders])
    assert sheets == [[f"{folder}, step 4" for folder in folders]]


def test_samples_that_a_disk_broke_are_passed_over(tmp_path):
    drawn(tmp_path, 2, *[(f"prompt {number}", RED) for number in range(11)])
    drawn(tmp_path, 4, ("fox", RED))
    (tmp_path / "samples/000004/0.png").write_bytes(b"none")
    step, found = last_samples(tmp_path / "samples")
    assert (step, list(found)) == (2, [(f"prompt {number}", 0) for number in range(11)])
    assert last_samples(tmp_path / "nowhere") == (0, {})


def test_without_samples_there_is_no_sheet(tmp_path):
    seen = [read_overview(trained(tmp_path / "a"))]
    said = "no run has sample images; they come with --sample-every, which is on by default."
    assert problem(lambda: sample_sheet(seen)) == said


# The command


def test_the_command_lists_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "runs/a", seed=1)
    trained(tmp_path / "runs/longer", seed=2, steps=12)
    drawn(tmp_path / "runs/a", 4, ("fox", RED))
    (tmp_path / "runs/longer/m.safetensors").unlink()
    capsys.readouterr()
    losses = [f"loss {read_overview(tmp_path / 'runs' / name).figures['loss']:.4g}" for name in ("a", "longer")]
    assert cli.main(["runs", "-o", "sheet.png"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"{'runs/a'.replace('/', os.sep)}       small    4 of 4  done     {losses[0]}",
        "             seed 1, steps 4",
        f"{'runs/longer'.replace('/', os.sep)}  small  12 of 12  stopped  {losses[1]}",
        "             seed 2, steps 12",
    ]
    assert printed.err == "sheet.png\n"
    assert Image.open("sheet.png").size[0] > 128
    assert cli.main(["runs", "-o", "sheet.png"]) == 2
    assert cli.main(["runs", "-o", "sheet.jpg"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "sfumato: --output sheet.png: exists already; name another place, or say --overwrite.",
        "sfumato: --output sheet.jpg: wanted a .png.",
    ]
    assert cli.main(["runs", "runs/a", "runs", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(each["folder"], each["state"], each["differs"]) for each in told] == [
        (os.path.join("runs", "a"), "done", {"seed": 1, "steps": 4}),
        (os.path.join("runs", "longer"), "stopped", {"seed": 2, "steps": 12}),
    ]
