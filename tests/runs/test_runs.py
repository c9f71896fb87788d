"""The run folder: one line a step, nothing overwritten unasked, one run at a time, changes shown before they count."""

import errno
import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.errors import RunError
from sfumato.files import read_tensors
from sfumato.runs.processes import SingleProcess
from sfumato.runs.run import Run
from sfumato.training.options import RunOptions
from sfumato.utils import randomness
from tests.logged import log_in
from tests.runs.said import lines, problem, start
from tests.runs.small import Config, train


class Second(SingleProcess):
    """A process that is not the main one."""

    is_main = False


def equal(one: Path, other: Path) -> bool:
    first, second = read_tensors(one), read_tensors(other)
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_each_step_is_a_line_and_tensors_become_numbers(tmp_path):
    run = Run.start(RunOptions(output=tmp_path / "run"), program="test")
    for step in run.steps(12):
        step.done(loss=torch.tensor(1.0 / (step.number + 1)), rate=0.5)
    run.log(step=12, fit=0.25)
    run.close()
    lines = log_in(tmp_path / "run")
    assert lines == run.rows()
    assert lines[3] == {"step": 4, "loss": 0.25, "rate": 0.5}
    assert lines[12] == {"step": 12, "fit": 0.25}


def test_looks_happen_at_both_ends_and_between(tmp_path):
    seen = []
    run = Run.start(RunOptions(output=tmp_path / "run"), program="test")
    run.every(4, seen.append)
    run.every(0, lambda step: pytest.fail("0 is never"))
    for step in run.steps(10):
        step.done(loss=1.0)
    assert seen == [0, 4, 8, 10]


def test_every_look_has_its_own_time_and_its_own_trouble(tmp_path, capsys):
    seen = []

    def odd(step):
        if step:
            raise OSError("odd")

    run = start(tmp_path)
    run.every(3, odd)
    run.every(2, seen.append)
    run.every(0, seen.append)
    for step in run.steps(5):
        step.done(loss=1.0)
    run.close()
    assert seen == [0, 2, 4, 5]
    said = "no sample, measurement or kept adapter: odd. The training goes on."
    assert [line for line in lines(capsys) if "sample" in line] == [f"step 3: {said}", f"step 5: {said}"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried 8 TB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),  # on Windows
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
        MemoryError(),
    ],
)
def test_a_memory_that_is_too_small_for_samples_beside_the_training_does_not_end_it(error, tmp_path, capsys):
    def hungry(step):
        raise error

    run = start(tmp_path)
    run.every(2, hungry)
    for step in run.steps(3):
        step.done(loss=1.0)
    run.close()
    said = (
        "no sample, measurement or kept adapter: the memory does not hold them beside the training; "
        "--sample-every 0 and --measure-every 0 leave them out. The training goes on."
    )
    assert [line for line in lines(capsys) if "sample" in line] == [f"step {step}: {said}" for step in (0, 2, 3)]


def test_another_error_of_torchs_in_a_look_is_not_hidden(tmp_path):
    def broken(step):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    run = start(tmp_path)
    run.every(2, broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(run.steps(3))
    run.close()


def test_a_first_look_that_fails_says_why(tmp_path):
    def full(step):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = start(tmp_path)
    run.every(3, full)
    assert problem(lambda: list(run.steps(3))) == ("the first samples or measurements failed: No space left on device")


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path):
    first = train(Config(output=tmp_path / "run", width=4)).read_bytes()
    with pytest.raises(RunError, match=r"--resume goes on with it, --overwrite replaces it"):
        train(Config(output=tmp_path / "run"))
    assert (tmp_path / "run/run.safetensors").read_bytes() == first
    train(Config(output=tmp_path / "run", overwrite=True))
    assert "width = 8" in (tmp_path / "run/config.toml").read_text()
    assert "overwrite = false" in (tmp_path / "run/config.toml").read_text()


@pytest.mark.parametrize("name", ["README.md", "samples", "own.safetensors", "config.toml"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_things_of_these_names_is_never_written_into(name, overwrite, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=f"{name} and no run"):
        Run.start(RunOptions(output=tmp_path, name="own", overwrite=overwrite), program="test")
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_in_the_way_is_said(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="is a file"):
        Run.start(RunOptions(output=tmp_path / "run"), program="test")


def test_other_processes_write_nothing(tmp_path):
    run = Run.start(RunOptions(output=tmp_path / "run"), program="test", processes=Second())
    for step in run.steps(2):
        step.done(loss=torch.tensor(1.0))
    run.close()
    assert list(tmp_path.iterdir()) == []


# Resuming


def test_resuming_a_finished_run_gives_its_result_again(tmp_path):
    path = train(Config(output=tmp_path / "run", checkpoint_every=4))
    before = path.read_bytes()
    path.unlink()
    train(Config(output=tmp_path / "run", checkpoint_every=4, resume=True))
    assert path.read_bytes() == before


@pytest.mark.parametrize("fused", [False, True])
def test_moments_lie_in_memory_as_their_weights_do(fused, tmp_path):
    """A fused optimizer pairs numbers as they lie, and a GPU's whole U-Net is channels_last in half precision."""

    def weights(folder, *, resume=False):
        layer = torch.nn.Conv2d(3, 4, 3)
        for number, value in enumerate(layer.parameters()):
            value.data = randomness.normal(tuple(value.shape), 0, "weights", number)
        layer.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, fused=fused)
        run = Run.start(RunOptions(output=folder, resume=resume, checkpoint_every=3, keep=9), program="test")
        run.keep(layer=layer, optimizer=optimizer)
        for step in run.steps(6):
            pixels = randomness.normal((2, 3, 5, 5), 0, "pixels", step.number)
            layer(pixels).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step.done(loss=0.0)
        run.close()
        return layer.weight.detach().clone()

    wanted = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/000006")
    assert torch.equal(weights(tmp_path / "run", resume=True), wanted)


@pytest.mark.parametrize("last", [1, 4, 7])
def test_from_any_checkpoint_to_the_end_is_the_whole_way(last, tmp_path):
    whole = train(Config(output=tmp_path / "whole", checkpoint_every=1, keep=100, name="m", measure_every=3))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in (tmp_path / "cut/checkpoints").iterdir():
        if int(folder.name) > last:
            shutil.rmtree(folder)
    again = train(Config(output=tmp_path / "cut", checkpoint_every=1, keep=100, name="m", measure_every=3, resume=True))
    assert again.read_bytes() == whole.read_bytes()
    assert (tmp_path / "cut/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()


def test_nothing_to_resume_is_an_error_and_no_fresh_start(tmp_path):
    with pytest.raises(RunError, match="there is no run to resume"):
        train(Config(output=tmp_path / "run", resume=True))
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError, match="there is no run to resume"):
        train(Config(output=tmp_path / "run", resume=True))
    assert not (tmp_path / "run/config.toml").exists()


def test_a_run_of_which_no_checkpoint_is_whole_does_not_begin_anew_in_silence(tmp_path):
    train(Config(output=tmp_path / "run", checkpoint_every=4))
    for file in (tmp_path / "run/checkpoints").glob("*/state.json"):
        file.write_text("{}")
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole: .*state\.json has 2 bytes, .* were written"):
        train(Config(output=tmp_path / "run", checkpoint_every=4, resume=True))


def test_what_was_passed_over_is_said(tmp_path, capsys):
    path = train(Config(output=tmp_path / "run", checkpoint_every=4))
    before = path.read_bytes()
    with (tmp_path / "run/checkpoints/000010/state.safetensors").open("rb+") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    capsys.readouterr()
    train(Config(output=tmp_path / "run", checkpoint_every=4, resume=True))
    said = capsys.readouterr().err
    assert "000010 was passed over: state.safetensors has another sha256" in said
    assert "resuming from step 8" in said
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"width": 4}, "width 8 -> 4"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"steps": 20}, "steps 10 -> 20"),
        ({"data": "others"}, "data numbers -> others"),
    ],
)
def test_what_has_changed_is_shown_and_refused_until_forced(changed, shown, tmp_path, capsys):
    config = Config(output=tmp_path / "run", checkpoint_every=5)
    train(config)
    before = (tmp_path / "run/config.toml").read_text()
    other = replace(config, resume=True, **changed)
    if "data" in changed:  # a fact beside the config, such as the bytes of the pictures
        text = before.replace('"numbers"', '"others"')
        (tmp_path / "run/config.toml").write_text(text)
        before = text
    with pytest.raises(RunError, match=f"{shown}.*--force"):
        train(other)
    assert (tmp_path / "run/config.toml").read_text() == before
    if "width" not in changed:
        train(replace(other, force=True))
        assert f"changed by --force: {shown}" in capsys.readouterr().err


@pytest.mark.parametrize(("changed", "shown"), [({"rank": 4}, "rank 2 -> 4"), ({"optimizer": "lion"}, "optimizer ")])
def test_what_no_checkpoint_fits_is_not_forced(changed, shown, tmp_path):
    """The checks of a run's folder, by the config alone."""
    from sfumato.trainers.lora import Config as LoraConfig

    config = LoraConfig(images=tmp_path, output=tmp_path / "run", rank=2, optimizer="adamw")
    run = Run.start(config, program="lora")
    run.begin()
    run.close()
    other = replace(config, resume=True, force=True, **changed)
    with pytest.raises(RunError, match=f"{shown}.*No checkpoint fits that: .*--overwrite"):
        Run.start(other, program="lora")
    Run.start(
        replace(config, resume=True, save_precision="bf16"), program="lora"
    ).close()  # of which nothing is learned


def test_what_is_only_seen_of_a_training_may_change(tmp_path):
    """And what is new holds from where the run goes on."""
    config = Config(output=tmp_path / "run", checkpoint_every=5)
    train(config)
    checkpoints = tmp_path / "run/checkpoints"
    shutil.rmtree(checkpoints / "000010")
    train(replace(config, resume=True, checkpoint_every=3, measure_every=2, keep=5))
    assert sorted(each.name for each in checkpoints.iterdir()) == ["000005", "000006", "000009", "000010"]
    rows = log_in(tmp_path / "run")
    assert [row["step"] for row in rows if "weight" in row] == [6, 8, 10]
    written = (tmp_path / "run/config.toml").read_text().splitlines()
    assert {"checkpoint_every = 3", "measure_every = 2", "keep = 5"} <= set(written)


def test_an_option_that_the_folder_does_not_know_yet_counts_as_its_default(tmp_path):
    config = Config(output=tmp_path / "run", checkpoint_every=5)
    train(config)
    file = tmp_path / "run/config.toml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("width")))
    train(replace(config, resume=True))
    with pytest.raises(RunError, match="width 8 -> 4"):
        train(replace(config, resume=True, width=4))


@pytest.mark.parametrize("name", ["sfumato", "torch", "diffusers", "transformers", "processes"])
def test_another_version_is_a_change(name, tmp_path):
    config = Config(output=tmp_path / "run", checkpoint_every=5)
    train(config)
    facts = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(facts | {name: "0.0.9"}))
    with pytest.raises(RunError, match=rf"{name} 0\.0\.9 -> "):
        train(replace(config, resume=True))


def test_another_program_is_a_change(tmp_path):
    config = Config(output=tmp_path / "run", checkpoint_every=5)
    train(config)
    with pytest.raises(RunError, match="program small -> other"):
        Run.start(replace(config, resume=True), program="other")


# One at a time


def _run_in(folder: str, start: "multiprocessing.synchronize.Barrier", results: "multiprocessing.Queue") -> None:
    start.wait()
    try:
        train(Config(output=Path(folder), steps=20, pause_s=0.02))
        results.put("done")
    except RunError as error:
        results.put(str(error))


def test_of_two_at_once_one_goes_on_and_the_other_says_who_it_is(tmp_path):
    context = multiprocessing.get_context("fork")
    for turn in range(3):
        barrier, results = context.Barrier(2), context.Queue()
        arguments = (str(tmp_path / str(turn)), barrier, results)
        children = [context.Process(target=_run_in, args=arguments) for _ in range(2)]
        for child in children:
            child.start()
        found = sorted(results.get(timeout=60) for _ in children)
        for child in children:
            child.join()
        assert found.count("done") == 1, found
        pids = [child.pid for child in children]
        assert any(f"is in use by process {pid} on " in text for text in found for pid in pids), found


def test_a_killed_holder_is_explained_and_does_not_stand_in_the_way(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    holder = {"pid": 12345, "host": "elsewhere", "since": "2026-01-01 00:00:00"}
    (tmp_path / "run/.holder.json").write_text(json.dumps(holder))
    (tmp_path / "run/.lock").touch()
    train(Config(output=tmp_path / "run"))
    assert (
        "process 12345 on elsewhere (since 2026-01-01 00:00:00) used this folder and ended without finishing; "
        "its lock is void."
    ) in capsys.readouterr().err
    assert not (tmp_path / "run/.holder.json").exists()


def test_a_trainer_that_fails_lets_the_folder_go(tmp_path):
    def fail(step, model):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(Config(output=tmp_path / "run"), before=fail)
    train(Config(output=tmp_path / "run", overwrite=True))
