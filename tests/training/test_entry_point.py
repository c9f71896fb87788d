"""A trainer called from Python: by a notebook, a service, a thread."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from sfumato.trainers import dreambooth, finetune, lora, textual_inversion

from sfumato.errors import AdapterError, RunError
from sfumato.files import read_tensors
from sfumato.runs.options import FolderOptions
from sfumato.training.entry_point import training_entry_point
from sfumato.training.finish import upload
from sfumato.training.options import TrainerOptions
from tests.logged import log_in
from tests.runs.said import start

FEW = {"steps": 1, "batch": 1, "sample_every": 0, "measure_every": 0, "device": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("trainer", [lora, textual_inversion, dreambooth, finetune])
def test_it_learns_where_the_caller_computes_no_gradients(trainer, off, pocket_folder, pictures, tmp_path):
    own = {"placeholder": ("<x>",), "caption": "<x>"} if trainer is textual_inversion else {"caption": "a square"}
    if trainer is dreambooth:
        own = {"method": "lora", "class_name": "square", "prior": "none", "caption": "sks square"}
    config = trainer.Config(images=pictures, output=tmp_path / "run", base=str(pocket_folder), **FEW, **own)
    with off():
        trainer.train(config)
    row = log_in(tmp_path / "run")[0]
    assert row["gradient_norm"] > 0


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_base_on_a_gpu_is_gone_when_the_training_is_over(monkeypatch, on_gpu):
    """Its parts refer to each other, and Python itself seldom looks for such."""
    gone = []

    @training_entry_point
    def train(config):
        base = torch.nn.Module()
        base.part = base
        weakref.finalize(base, gone.append, True)
        return config.images

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    gc.disable()
    try:
        train(lora.Config(images=Path(), output=Path()))
        assert gone == [True] * on_gpu
    finally:
        gc.enable()


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_what_the_caller_had(before):
    """A precision sets it for the whole process."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    @training_entry_point
    def train(config):
        matmul.allow_tf32 = cudnn.allow_tf32 = not before
        return config.images

    own = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = before
        train(lora.Config(images=Path(), output=Path()))
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (before, before)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = own


@pytest.mark.parametrize(
    ("error", "goes"),
    [
        (RunError("stopped"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (KeyboardInterrupt(), True),
        (SystemExit(130), True),
        (ZeroDivisionError(), False),  # of which a debugger shows the frames
    ],
)
def test_what_an_expected_error_s_frames_held_is_gone_while_the_error_is_kept(error, goes):
    gone = []

    @training_entry_point
    def train(_):
        base = torch.nn.Module()
        weakref.finalize(base, gone.append, True)
        raise error

    with pytest.raises(type(error)) as kept:
        train(lora.Config(images=Path(), output=Path()))
    assert gone == [True] * goes
    assert kept.value.__traceback__ is not None


def test_after_an_error_the_folder_is_free_while_the_error_is_kept(pocket_folder, pictures, tmp_path, monkeypatch):
    """A notebook keeps the latest, and with it all that stood in the frames."""
    config = lora.Config(
        images=pictures, output=tmp_path / "run", base=str(pocket_folder), caption="a square", rank=2, **FEW
    )
    with monkeypatch.context() as broken:
        broken.setattr("sfumato.training.adapter.new_adapter", lambda *given, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError) as kept:
            lora.train(config)
    assert not (tmp_path / "run").exists()
    assert read_tensors(lora.train(config))
    assert kept.value.__traceback__ is not None


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, AdapterError])
def test_a_folder_whose_results_are_not_written_can_be_gone_on_with(
    error, pocket_folder, pictures, tmp_path, monkeypatch
):
    config = lora.Config(images=pictures, output=tmp_path / "run", base=str(pocket_folder), caption="a square", **FEW)

    def stop(*given, **named):
        raise error("stopped")

    with monkeypatch.context() as broken:
        broken.setattr("sfumato.training.finish.finish", stop)
        with pytest.raises(error) as kept:
            lora.train(config)
    assert not (tmp_path / "run/.holder.json").exists()
    lora.train(lora.Config(**{**vars(config), "resume": True}))
    assert kept.value.args == ("stopped",)


def test_texts_stand_for_paths_and_for_one_of_several():
    config = TrainerOptions(images="a", output="b", sample_prompts="a crab", cache="c")
    assert (config.images, config.output, config.cache) == (Path("a"), Path("b"), Path("c"))
    assert config.sample_prompts == ("a crab",)
    assert TrainerOptions(images="a", output="b", sample_prompts=["a", "b"]).sample_prompts == ("a", "b")
    assert FolderOptions(output="b").output == Path("b")


def test_after_a_failed_upload_the_folder_is_free_while_the_error_is_kept(tmp_path, monkeypatch):
    def unreachable(*_):
        raise RunError("the hub is not there")

    monkeypatch.setattr("sfumato.training.finish.push", unreachable)
    run = start(tmp_path)
    for step in run.steps(1):
        step.done(loss=1.0)
    with pytest.raises(RunError) as kept:
        upload(run, [tmp_path / "a.safetensors"], "me/a")
    assert not run._claim.is_held
    assert kept.value.args
