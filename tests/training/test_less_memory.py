"""A step that does not fit into memory is computed in less, and learns the same."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageOps
from sfumato.trainers import dpo, dreambooth, finetune, lcm, lora, slider, textual_inversion

from sfumato.config import to_dict
from sfumato.files import read_tensors
from sfumato.runs import progress
from sfumato.runs.processes import MicroBatches
from sfumato.training.optim.fused_backward import reduce_memory
from sfumato.utils.text_files import read_toml
from tests.logged import log_in
from tests.runs.said import lines

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
IMAGES = {"images": Path("images"), "output": Path("run"), "batch": 5}
FEW = {"device": "cpu", "precision": "fp32", "sample_every": 0, "measure_every": 0, "optimizer_args": ("eps=1e-5",)}
CHECKPOINTED = "--gradient-checkpointing"


def tried(config, monkeypatch, count=1, error=FULL):
    """The options with which a training of this config goes on, one after another, when nothing helps."""
    said = []
    while config is not None:
        run = SimpleNamespace(config=config, count=count, step=0, say=said.append, dry=None)
        monkeypatch.setattr(progress, "take_interrupted", lambda run=run: run)
        config = reduce_memory(error)
        assert config is None or (config.resume, config.overwrite, config.force) == (True, False, False)
    return [line.partition("going on with ")[2].removesuffix(", which takes less") for line in said]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (lora.Config(**IMAGES), [CHECKPOINTED, "--micro-batch 2", "--micro-batch 1"]),
        (lora.Config(**IMAGES, overwrite=True), [CHECKPOINTED, "--micro-batch 2", "--micro-batch 1"]),
        (lora.Config(**IMAGES, gradient_checkpointing=False), ["--micro-batch 2", "--micro-batch 1"]),
        (lora.Config(**IMAGES, gradient_checkpointing=True, micro_batch=3), ["--micro-batch 1"]),
        (lora.Config(**IMAGES, micro_batch=9), [CHECKPOINTED, "--micro-batch 2", "--micro-batch 1"]),
        (lora.Config(**IMAGES | {"batch": 1}), [CHECKPOINTED]),
        (dreambooth.Config(**IMAGES, method="lora"), [CHECKPOINTED, "--micro-batch 2", "--micro-batch 1"]),
        (dreambooth.Config(**IMAGES, method="full"), [CHECKPOINTED, "--fused"]),
        (finetune.Config(**IMAGES), [CHECKPOINTED, "--fused"]),
        (finetune.Config(**IMAGES, fused=True), [CHECKPOINTED]),
        (finetune.Config(**IMAGES, accumulate=2), [CHECKPOINTED, "--micro-batch 2", "--micro-batch 1"]),
        (finetune.Config(**IMAGES, optimizer="prodigy"), [CHECKPOINTED, "--micro-batch 2", "--micro-batch 1"]),
        (finetune.Config(**IMAGES, clip=0), [CHECKPOINTED, "--micro-batch 2", "--micro-batch 1"]),
        (finetune.Config(**IMAGES, clip=0, precision="bf16"), [CHECKPOINTED, "--fused"]),
    ],
)
def test_what_is_tried_in_turn(config, options, monkeypatch):
    assert tried(config, monkeypatch) == options


def test_several_processes_and_other_errors_end(monkeypatch):
    config = lora.Config(**IMAGES)
    assert tried(config, monkeypatch, count=2) == []
    assert tried(config, monkeypatch, error=RuntimeError("shapes differ")) == []
    monkeypatch.setattr(progress, "take_interrupted", lambda: None)  # as while the images are encoded
    assert reduce_memory(FULL) is None


@pytest.mark.parametrize(
    ("at_once", "parts"),
    [
        (None, [(4, 4), (8, 4)]),
        (9, [(4, 4), (8, 4)]),
        (3, [(4, 3), (7, 1), (8, 3), (11, 1)]),
        (1, [(place, 1) for place in range(4, 12)]),
    ],
)
def test_each_batch_is_parted_by_itself(at_once, parts):
    """Of the second of two processes' two batches of four samples, which hold images of one size each."""
    batches = MicroBatches(16, (4, 8), 4, at_once)
    assert [(each.first, each.count) for each in batches.of(7)] == parts
    assert {(each.step, each.global_batch) for each in batches.of(7)} == {(7, 16)}


def holding(monkeypatch, *, samples, from_step=0, checkpointed=True):
    """Let memory hold a step of so many samples at once, and from this call on only with checkpointing."""
    forward, steps = UNet2DConditionModel.forward, []

    def counted(unet, sample, *given, **named):
        if torch.is_grad_enabled():
            steps.append(len(sample))
            lacks = checkpointed and not unet.is_gradient_checkpointing
            if len(steps) > from_step and (lacks or len(sample) > samples):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(unet, sample, *given, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    return steps


def config_of(trainer, pocket_folder, pictures, tmp_path, **options):
    own = {"placeholder": ("<x>",), "caption": "<x>"} if trainer is textual_inversion else {"rank": 2}
    own = {"save": "difference"} if trainer is finetune else own
    own |= {"caption": "a square"} if trainer in (lora, finetune) else {}
    if trainer is dreambooth:
        own |= {"method": "lora", "class_name": "square", "prior": "base", "caption": "sks square"}
    if trainer is dpo:
        rejected = tmp_path / "rejected"
        rejected.mkdir()
        for path in pictures.iterdir():
            ImageOps.invert(Image.open(path)).save(rejected / path.name)
        own |= {"preferred": pictures, "rejected": rejected, "caption": "a square"}
    elif trainer is slider:
        own |= {"concept": "a square", "more": "a red square", "less": "a blue square", "drawn": 4}
    elif trainer is lcm:
        own |= {"prompts": ("a square",), "drawn": 4}
    else:
        own |= {"images": pictures}
    shared = {"base": str(pocket_folder), "output": tmp_path / "run", "steps": 3, "batch": 4, **FEW}
    return trainer.Config(**shared | own | options)


def test_a_step_that_does_not_fit_is_computed_in_less(pocket_folder, pictures, tmp_path, monkeypatch, capsys):
    config = config_of(lora, pocket_folder, pictures, tmp_path)
    whole = read_tensors(lora.train(config))
    with monkeypatch.context() as small:
        sizes = holding(small, samples=2)
        in_less = read_tensors(lora.train(replace(config, output=tmp_path / "less")))
    assert sizes == [4, 4, *[2, 2] * 3]
    for name, tensor in whole.items():
        torch.testing.assert_close(in_less[name], tensor, rtol=1e-4, atol=1e-7)
    said = [line for line in lines(capsys) if "fit into memory" in line]
    reason = "step 1 does not fit into memory (CUDA out of memory. Tried to allocate 2.00 GiB.); going on with"
    assert said == [f"{reason} {CHECKPOINTED}, which takes less", f"{reason} --micro-batch 2, which takes less"]
    kept = read_toml(tmp_path / "less" / "config.toml")
    assert (kept["gradient_checkpointing"], kept["micro_batch"], kept["batch"]) == (True, 2, 4)
    assert [row["step"] for row in log_in(tmp_path / "less")] == [1, 2, 3]


def test_it_goes_on_from_its_last_checkpoint(pocket_folder, pictures, tmp_path, monkeypatch, capsys):
    """A later image may be larger than those before."""
    config = config_of(lora, pocket_folder, pictures, tmp_path, checkpoint_every=2)
    whole = read_tensors(lora.train(config))
    with monkeypatch.context() as small:
        sizes = holding(small, samples=4, from_step=2)
        in_less = read_tensors(lora.train(replace(config, output=tmp_path / "less")))
    assert sizes == [4] * 4
    assert "resuming from step 2" in lines(capsys)
    assert all(torch.equal(in_less[name], tensor) for name, tensor in whole.items())


def test_where_nothing_helps_the_error_remains_and_so_does_the_run(pocket_folder, pictures, tmp_path, monkeypatch):
    config = config_of(lora, pocket_folder, pictures, tmp_path)
    with monkeypatch.context() as small:
        holding(small, samples=0)
        with pytest.raises(torch.OutOfMemoryError):
            lora.train(config)
    assert read_tensors(lora.train(replace(config, resume=True)))  # the folder is not locked, and no config differs


def test_a_run_of_an_error_that_a_debugger_keeps_is_not_taken_for_another(
    pocket_folder, pictures, tmp_path, monkeypatch
):
    """The base of the second training does not fit, for which there is nothing to try."""
    config = config_of(lora, pocket_folder, pictures, tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr("sfumato.training.loss.objective.draw_noised", lambda *given, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError) as kept:
            lora.train(config)
    monkeypatch.setattr("sfumato.models.load_base", lambda *given, **named: (_ for _ in ()).throw(FULL))
    with pytest.raises(torch.OutOfMemoryError):
        lora.train(replace(config, output=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    assert kept.value.__traceback__ is not None


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [dreambooth, textual_inversion, slider, lcm, dpo, finetune])
def test_each_trainer_learns_the_same_in_less(trainer, pocket_folder, pictures, tmp_path, monkeypatch):
    config = config_of(trainer, pocket_folder, pictures, tmp_path)
    whole = read_tensors(trainer.train(config))
    with monkeypatch.context() as small:
        sizes = holding(small, samples=99 if trainer is finetune else 4)
        in_less = read_tensors(trainer.train(replace(config, output=tmp_path / "less")))
    kept = to_dict(config) | read_toml(tmp_path / "less" / "config.toml")
    assert kept["gradient_checkpointing"] is True
    assert trainer is finetune or max(sizes[-3:]) <= 4
    for name, tensor in whole.items():
        assert (in_less[name] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-7, name
