"""A run once more: by its config, by a copy of the program, from an adapter, or where it stopped."""

import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close

from sfumato import cli
from sfumato.files import Description, describe, read_header, read_lora, read_tensors, write_lora, write_tensors
from tests.logged import log_beside

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.slow
def test_the_config_of_a_run_runs_again(train, tmp_path):
    first = train("run", "--seed", "5", "--steps", "2")
    assert cli.main(["train", "lora", str(tmp_path / "run/config.toml"), "--output", str(tmp_path / "again")]) == 0
    again = read_tensors(tmp_path / "again" / "run.safetensors")
    for key, tensor in read_tensors(first).items():
        assert torch.equal(tensor, again[key])


def run_here(file, words, monkeypatch):
    """As a script does, without the seconds that a process of its own takes to import torch."""
    monkeypatch.setattr(sys, "argv", [str(file), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 0


def run_elsewhere(file, words, monkeypatch):
    done = subprocess.run([sys.executable, str(file), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("run", [run_here, pytest.param(run_elsewhere, marks=pytest.mark.slow)])
def test_a_copy_of_the_program_runs(run, pocket_folder, pictures, tmp_path, monkeypatch):
    assert cli.main(["cp", "lora", str(tmp_path / "mine.py")]) == 0
    words = ["--images", str(pictures), "--base", str(pocket_folder), "--output", str(tmp_path / "run")]
    words += ["--caption", "{caption}", "--steps", "1", "--sample-every", "0", "--measure-every", "0"]
    run(tmp_path / "mine.py", words, monkeypatch)
    assert (tmp_path / "run/run.safetensors").is_file()


@pytest.mark.slow
def test_a_copys_training_is_not_gone_on_with_by_another_program(
    pocket_folder, pictures, tmp_path, monkeypatch, capsys
):
    assert cli.main(["cp", "lora", str(tmp_path / "mine.py")]) == 0
    words = ["--images", str(pictures), "--base", str(pocket_folder), "--output", str(tmp_path / "run")]
    words += ["--caption", "{caption}", "--rank", "1", "--steps", "2", "--checkpoint-every", "1"]
    run_here(tmp_path / "mine.py", [*words, "--sample-every", "0", "--measure-every", "0"], monkeypatch)
    capsys.readouterr()
    assert cli.main(["resume", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"its program is {tmp_path / 'mine.py'}" in said
    shown = shlex.split(said.partition("Go on with: python ")[2])
    assert cli.main(["train", "lora", *shown[1:]]) == 2
    assert f"program {tmp_path / 'mine.py'} -> its own" in capsys.readouterr().err
    run_here(shown[0], shown[1:], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("sdxl", "trained for SDXL, this base is pocket. Begin with an adapter of this family"),
        ("pocket", "other.safetensors: learned where the base predicts epsilon, and this one predicts v_prediction"),
    ],
)
def test_what_it_starts_from_was_learned_on_such_a_base(family, said, train, tmp_path, capsys):
    first, other = train("first"), tmp_path / "other.safetensors"
    modules = read_lora(first).modules
    write_lora(
        other,
        modules,
        family=family,
        metadata=describe(Description(title="other", family=family, prediction_type="epsilon")),
    )
    with pytest.raises(AssertionError) if family == "sdxl" else nullcontext():
        train("second", "--init-from", str(other), "--steps", "1")
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_starting_from_an_adapter_goes_on_where_it_stopped(train):
    first = train("first", "--measure-every", "4")
    second = train("second", "--init-from", str(first), "--measure-every", "4")
    fits = [[row["fit"] for row in log_beside(path) if "fit" in row] for path in (first, second)]
    assert_close(fits[1][0], fits[0][-1], rtol=1e-4, atol=0)
    assert fits[0][0] != fits[0][-1]


@pytest.mark.slow
def test_a_run_goes_on_without_the_adapter_that_it_started_from(train, capsys):
    """What it says about that one is in the run's folder, where another's would be found out."""
    first, other = train("first"), train("other", "--seed", "9")
    whole = train("second", "--init-from", str(first), "--checkpoint-every", "2")
    wanted = read_tensors(whole)
    shutil.rmtree(whole.parent / "checkpoints/000004")
    first.rename(first.with_name("moved.safetensors"))
    assert cli.main(["resume", str(whole.parent)]) == 0
    for name, tensor in read_tensors(whole).items():
        assert torch.equal(tensor, wanted[name]), name
    assert cli.main(["resume", str(whole.parent), "--init-from", str(first.with_name("moved.safetensors"))]) == 0
    capsys.readouterr()
    assert cli.main(["resume", str(whole.parent), "--init-from", str(other)]) == 2
    assert "was trained with other things than these: init " in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_with_a_tucker_core_is_started_from_without_it(train, tmp_path):
    options = ("--targets", r".*mid_block.*conv1")
    plain = train("plain", *options)
    core = {}
    for name, tensor in read_tensors(plain).items():
        if name.endswith("lora_down.weight"):
            rank, inner = tensor.shape[:2]
            core[name] = torch.ones(rank, inner, 1, 1)
            core[name.replace("lora_down", "lora_mid")] = torch.ones(rank, rank, 3, 3)
        else:
            core[name] = tensor
    tucker = write_tensors(tmp_path / "tucker.safetensors", core, dict(read_header(plain).metadata))
    started = train("started", *options, "--init-from", str(tucker), "--steps", "1", "--learning-rate", "1e-12")
    found = read_lora(started).modules
    for target, module in read_lora(tucker).modules.items():
        assert_close(found[target].delta(), module.delta(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_without_a_checkpoint_does_not_go_on_without_what_it_began_from(train, capsys):
    first = train("first")
    run = train("second", "--init-from", str(first)).parent
    shutil.rmtree(run / "checkpoints")  # killed before its first
    (run / "second.safetensors").unlink()
    kept = first.rename(first.with_name("kept"))
    assert cli.main(["resume", str(run)]) == 2
    assert f"--init-from {first}: there is no such file; name the adapter to begin with." in capsys.readouterr().err
    kept.rename(first)
    assert cli.main(["resume", str(run)]) == 0


def test_a_run_is_not_overwritten_unasked(train, pocket_folder, pictures, tmp_path, capsys):
    before = train("run").read_bytes()
    words = ["--images", str(pictures), "--output", str(tmp_path / "run"), "--base", str(pocket_folder)]
    assert cli.main(["train", "lora", *words, "--caption", "{caption}", "--steps", "1"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "run/run.safetensors").read_bytes() == before
