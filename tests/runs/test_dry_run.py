"""A dry run: four steps, of which nothing is kept but a sheet, and what the whole run takes."""

import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from sfumato.trainers import lora

from bench.runs_resume import CASES, command, make_inputs
from sfumato import cli
from sfumato.errors import RunError
from sfumato.models import Base
from sfumato.precision.memory import peak_process_memory
from sfumato.runs import dry_run
from sfumato.runs.dry_run import DryRun, DryRunOver
from sfumato.runs.run import Run
from sfumato.training.entry_point import training_entry_point
from sfumato.training.loss import objective
from tests.runs.said import Processes, lines, problem
from tests.runs.small import Config, train

called = training_entry_point(train)


def config(tmp_path, **options):
    return Config(
        output=tmp_path / "run", name="m", **{"steps": 10, "measure_every": 5, "checkpoint_every": 5} | options
    )


def dry(tmp_path, **options):
    return config(tmp_path, dry_run=True, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("steps", "made"), [(10, 4), (2, 2), (1, 1)])
def test_the_first_steps_are_made_and_nothing_is_kept(steps, made, tmp_path, capsys):
    numbers = []
    with pytest.raises(DryRunOver):
        train(dry(tmp_path, steps=steps), after=lambda step, _: numbers.append(step.number))
    assert numbers == list(range(made))
    assert list(tmp_path.iterdir()) == []
    assert f"dry run  {made} of {steps} step{'s' * (steps > 1)}, of which nothing is kept" in lines(capsys)


def test_its_steps_are_those_of_the_run(tmp_path):
    def weights_of(given):
        found = []
        with suppress(DryRunOver):
            train(given, after=lambda _, model: found.append(model[0].weight.detach().clone()))
        return found

    tried, meant = weights_of(dry(tmp_path)), weights_of(config(tmp_path))
    assert (len(tried), len(meant)) == (4, 10)
    assert all(map(torch.equal, tried, meant))


def test_the_folder_that_was_asked_for_is_returned_where_there_is_no_sheet(tmp_path):
    assert called(dry(tmp_path)) == tmp_path / "run"


def test_what_the_run_takes_is_told_from_what_its_parts_took(tmp_path, monkeypatch, capsys):
    """Steps of 9, 2, 3 and 4 seconds after 20 of preparation; looks of 5; a checkpoint of 7."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(dry_run, "peak_process_memory", lambda: 3 * 2**29)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: SimpleNamespace(free=7 * 2**30))
    data = SimpleNamespace(samples=16, names=["a"], listen=lambda heard: heard(4, SimpleNamespace(indices=[])))
    tried = DryRun(dry(tmp_path, checkpoint_every=40))
    tried.listen({"data": data, "base": "0123"})

    def taking(seconds):
        clock.now += seconds

    looks = [tried.timed(25, lambda _: taking(5)), tried.timed(100, lambda _: taking(1))]

    def steps():
        for look in looks:
            look(0)
        taking(7)
        for seconds in (9, 2, 3, 4, 100):
            yield seconds
            taking(50)  # as a look or a checkpoint after it would, which is no part of the step

    taking(20)
    said = []
    made = tried.first_of(steps(), 100, lambda *each: said.extend(each), lambda: (3, 2**21))
    with pytest.raises(DryRunOver):
        list(map(taking, made))
    assert said == [
        "\ndry run  4 of 100 steps, of which nothing is kept",
        "a step   3 s",
        "all      about 6 min: 5 min of steps, 27 s of samples and measurements, 21 s of checkpoints, 20 s before the "
        "first step",
        "images   100 steps of 4 are 25 passes over 16 images",
        "memory   1.5 GiB of main memory at the peak",
        "disk     3 checkpoints of 2.0 MiB at once; 7.0 GiB are free",
    ]


def test_a_run_that_is_there_refuses_it_and_stays_where_it_may_be_replaced(tmp_path):
    train(config(tmp_path))
    before = files(tmp_path)
    assert "holds a run already" in problem(lambda: train(dry(tmp_path)))
    with pytest.raises(DryRunOver):
        train(dry(tmp_path, overwrite=True))
    assert files(tmp_path) == before


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_leaves_nothing_either(number, tmp_path):
    def broken(step, _):
        if step.number == number:
            raise RunError("broken")

    assert problem(lambda: train(dry(tmp_path), before=broken)) == "broken"
    assert list(tmp_path.iterdir()) == []


def test_an_error_before_the_first_step_leaves_nothing_either(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tests.runs.small.build_optimizer", lambda *given, **named: (_ for _ in ()).throw(RunError("no optimizer"))
    )
    assert problem(lambda: called(dry(tmp_path))) == "no optimizer"
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_it_and_nothing_is_kept(tmp_path, capsys):
    def interrupt(step, _):
        if step.number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as ended:
        train(dry(tmp_path), after=interrupt)
    assert ended.value.code == 130
    said = lines(capsys)
    assert said[-1] == "the dry run was stopped after step 2; nothing of it is kept."
    assert not any("resume" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def test_it_logs_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr("sfumato.runs.reporting.trackers.WandbRun.__init__", lambda *given: None)
    monkeypatch.setattr("sfumato.runs.reporting.trackers.WandbRun.start", None)
    monkeypatch.setattr("sfumato.runs.reporting.log._board", lambda folder: lambda: (folder / "events").touch())
    with pytest.raises(DryRunOver):
        train(dry(tmp_path, wandb="project", wandb_name="name", tensorboard=True))
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_the_main_one_tells(tmp_path, capsys):
    for is_main in (True, False):
        run = Run.start(dry(tmp_path), program="small", processes=Processes(main=is_main))
        with pytest.raises(DryRunOver):
            [step.done(loss=1.0) for step in run.steps(10)]
        assert ("dry run  4 of 10" in capsys.readouterr().err) is is_main
        assert not run.folder.exists()


@pytest.mark.parametrize("is_main", [True, False])
def test_what_ends_it_before_its_first_step_leaves_nothing_of_any_process(is_main, tmp_path):
    run = Run.start(dry(tmp_path), program="small", processes=Processes(main=is_main))
    assert run.folder.exists()
    run.withdraw()
    assert list(tmp_path.iterdir()) == []


def test_the_peak_of_memory_grows_with_what_is_held():
    before = peak_process_memory()
    if before is None:
        pytest.skip("this system does not tell")
    assert before > 2**20
    held = np.ones(before // 8 + 2**20)
    assert peak_process_memory() > before + held.nbytes // 2


# Of a trainer


@pytest.fixture
def asked(pocket_folder, pictures, tmp_path):
    options = {"caption": "{caption}, drawn", "caption_dropout": 0.4, "flip": True, "seed": 3, "rank": 2}
    quiet = {"sample_every": 0, "measure_every": 0, "device": "cpu", "precision": "fp32"}
    where = {"images": pictures, "base": str(pocket_folder), "output": tmp_path / "run"}
    return lora.Config(**where, steps=20, batch=4, **options, **quiet)


@pytest.mark.parametrize("prior", [(), ("a key",)])
def test_the_sheet_shows_what_the_steps_learn_from(prior, asked, tmp_path, monkeypatch):
    """The images that are noised for prompts of prior preservation are not learned, and so not shown."""
    learned, shown = [], []
    losses, sheet = objective.per_sample_losses, dry_run.labelled_sheet

    def noted(base, parts, **named):
        learned.append((parts[0].batch.captions, parts[0].batch.latents))
        return losses(base, parts, **named)

    monkeypatch.setattr(objective, "per_sample_losses", noted)
    monkeypatch.setattr(dry_run, "labelled_sheet", lambda cells: shown.extend(cells) or sheet(cells))
    path = lora.train(replace(asked, dry_run=True, prior_prompts=prior))
    assert path == tmp_path / "run.dry-run.png"
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(("run", "."))] == [path.name]
    with Image.open(path) as picture:
        assert picture.width > 4 * 192
    captions = [caption for told, _ in learned for caption in told]
    assert len(captions) == 16
    assert "" in captions
    assert [cell.labels[1].text for cell in shown] == [caption or "(no caption)" for caption in captions]
    base = asked.load_base(asked.decide_precision(SimpleNamespace(count=1)))
    decoded = base.decode(torch.cat([latents for _, latents in learned]))
    for cell, pixels in zip(shown, decoded, strict=True):
        wanted = (pixels.permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(np.asarray(cell.picture, dtype=float) - wanted).max() <= 1


def test_what_a_mask_leaves_out_is_white_and_what_is_hidden_grey():
    data = SimpleNamespace(decode=lambda latents: -torch.ones(1, 3, 4, 4))
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    hidden = np.asarray(dry_run._decoded(dry_run._SeenSample(data, "a", "a", torch.zeros(1, 4, 2, 2), None, mask)))[
        ..., 0
    ]
    assert (hidden[:2, :2] > 80).all()
    assert (hidden[:2, :2] < 128).all()
    assert (hidden[2:] == 0).all()
    seen = dry_run._SeenSample(data, "a", "a", torch.zeros(1, 4, 2, 2), mask, None)
    shown = np.asarray(dry_run._decoded(seen))[..., 0]
    assert (shown[:2, :2] == 0).all()
    assert (shown[2:] > 200).all()
    assert (shown[:, 2:] > 200).all()


def test_a_step_that_does_not_fit_is_tried_in_less(asked, tmp_path, monkeypatch, capsys):
    forward = UNet2DConditionModel.forward

    def small(unet, sample, *given, **named):
        if torch.is_grad_enabled() and not unet.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(unet, sample, *given, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", small)
    assert lora.train(replace(asked, dry_run=True)) == tmp_path / "run.dry-run.png"
    said = lines(capsys)
    assert any(line.endswith("going on with --gradient-checkpointing, which takes less") for line in said)
    assert "dry run  4 of 20 steps, of which nothing is kept" in said
    assert not (tmp_path / "run").exists()


def test_where_no_picture_fits_beside_the_training_there_is_no_sheet(asked, tmp_path, monkeypatch, capsys):
    def full(self, latents):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Base, "decode", full)
    assert lora.train(replace(asked, dry_run=True)) == tmp_path / "run"
    assert lines(capsys)[-1] == "seen     no sheet of the images: memory does not hold one beside the training"
    assert not (tmp_path / "run.dry-run.png").exists()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
@pytest.mark.parametrize("case", {case.split()[0]: case for case in reversed(CASES)}.values())
def test_every_trainer_leaves_its_sheet_and_nothing_else(case, inputs, tmp_path, capsys):
    """And the images that the base draws beforehand."""
    words = command(case, inputs, tmp_path / "run", "--dry-run")
    assert cli.main(words) == 0
    said = lines(capsys)
    assert any(line.startswith("dry run  4 of ") for line in said)
    made = {path.name for path in tmp_path.iterdir()}
    program = case.split()[0]
    learns_latents = program == "pretrain"
    assert made - {"run"} == (set() if learns_latents else {"run.dry-run.png"})
    drawn = {each.name for each in (tmp_path / "run").iterdir()} if "run" in made else set()
    assert drawn <= {"class", "drawn"}


@pytest.mark.slow
def test_images_of_a_class_stay_for_the_run(inputs, tmp_path, capsys):
    words = command("dreambooth lora", inputs, tmp_path / "run", "--class-count", "2")
    words[words.index("none")] = "pictures"
    for more, drawn in (["--dry-run"], 2), ([], 0):
        assert cli.main([*words, *more]) == 0
        assert any(line.endswith(f"({drawn} drawn now)") for line in lines(capsys))
