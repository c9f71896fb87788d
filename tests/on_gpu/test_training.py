"""Each trainer on a GPU, beside the same on the CPU; and runs that go on where there is another device."""

import os
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch.testing import assert_close

from bench.runs_resume import CASES, results
from sfumato import cli
from sfumato.precision import decide
from sfumato.runs.processes import Processes
from sfumato.training.optim import muon
from tests.on_gpu.device import REAL, gpu, learn
from tests.tiny import tiny_pipeline

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def on_cpu(inputs, tmp_path_factory):
    """What `learn` gives on the CPU, each case once."""
    return cache(lambda case: learn(case, inputs, tmp_path_factory.mktemp("cpu") / "here"))


ON_MPS = (
    "lora",
    "lora int8",
    "lora nf4",
    "lora with text encoder",
    "dreambooth fused, prior",
    "dreambooth lora",
    "finetune",
    "textual_inversion",
    "pretrain vae",
)


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *(pytest.param("cuda", case, marks=pytest.mark.slow) for case in CASES),
        *(pytest.param("mps", case, marks=pytest.mark.slow) for case in ON_MPS),
    ],
)
def test_each_trainer_learns_in_fp32_what_it_learns_on_the_cpu(kind, case, inputs, on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: False)  # which not every CPU does
    if REAL[kind] and "dropped out" in case:
        pytest.skip("dropout draws its numbers on the device")
    with gpu(kind):
        found, _ = learn(case, inputs, tmp_path / "there", "--device", kind)
    wanted, _ = on_cpu(case)
    assert found.keys() == wanted.keys()
    # A slider's images are drawn on the device, and rounded; lion steps by a sign, which rounding turns near zero.
    share = 0.05 if case in ("slider", "lora lion") else 0.01
    # Attention does not depend on the keys' bias: its gradient is rounding, of which AdamW makes steps like any other.
    for name, tensor in ((name, tensor) for name, tensor in wanted.items() if not name.endswith("k_proj.bias")):
        assert (found[name] - tensor).norm() <= share * tensor.norm() + 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize(("major", "dtype"), [(8, "bf16"), (7, "fp16")])
@pytest.mark.parametrize(
    "case",
    [
        "lora accumulated, averaged, dropped out",
        "lora with text encoder",
        "lora int8",
        "lora nf4",
        "dreambooth",
        "dreambooth fused, prior",
        "dreambooth lora",
        "finetune fused with text encoder",
        "textual_inversion",
        "slider",
        "dpo averaged, dropped out",
    ],
)
def test_in_half_precision_each_trainer_learns_nearly_the_same(case, major, dtype, inputs, on_cpu, tmp_path):
    """By the losses of all steps; `auto` takes bf16 where the GPU has it, and scales the loss of fp16 elsewhere."""
    with gpu(major=major):
        assert dtype in decide("auto").table()
        _, found = learn(case, inputs, tmp_path / "there", "--device", "auto", "--precision", "auto")
    _, wanted = on_cpu(case)
    losses = [torch.tensor([row["loss"] for row in rows if "loss" in row]) for rows in (found, wanted)]
    assert_close(*losses, rtol=0.03, atol=0)


@pytest.mark.slow
def test_a_checkpoint_goes_on_where_there_is_another_device(inputs, tmp_path, capsys):
    wanted, _ = learn("dreambooth lora", inputs, tmp_path / "run", "--checkpoint-every", "2")
    shutil.rmtree(tmp_path / "run/checkpoints/000003")  # as if it had been killed before its end
    (tmp_path / "run/out.safetensors").unlink()
    with gpu():
        assert cli.main(["resume", str(tmp_path / "run"), "--device", "cuda"]) == 0
    assert re.search(r"memory   \d\.\d GiB of the GPU at the peak", capsys.readouterr().err)
    found = results(tmp_path / "run")
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 0.01 * tensor.norm() + 1e-6, name


@pytest.mark.slow
def test_a_checkpoint_of_bf16_goes_on_in_fp16(inputs, tmp_path):
    """As on a rented machine, which is another each day: there the loss is scaled, here it was not."""
    with gpu(major=8):
        learn("lora", inputs, tmp_path / "run", "--device", "auto", "--precision", "auto", "--checkpoint-every", "2")
    shutil.rmtree(tmp_path / "run/checkpoints/000003")
    (tmp_path / "run/out.safetensors").unlink()
    with gpu(major=7):
        assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert results(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["textual_inversion", "--placeholder", "<x>"],
        ["lora", "--train-words", "<x>", "--words-first", "1", "--rank", "1"],
    ],
)
def test_in_fp16_a_first_step_without_any_caption_learns_nothing_and_goes_on(words, inputs, tmp_path):
    """SDXL has zeros for dropped captions, so that no gradient reaches the words and nothing is scaled."""
    tiny_pipeline("sdxl", shallow=True).save_pretrained(tmp_path / "sdxl")
    options = ["--base", str(tmp_path / "sdxl"), "--images", inputs["lora"][inputs["lora"].index("--images") + 1]]
    options += ["--output", str(tmp_path / "run"), "--caption", "a <x>", "--caption-dropout", ".999", "--batch", "1"]
    options += ["--steps", "2", "--sample-every", "0", "--measure-every", "0", "--device", "auto"]
    with gpu(major=7):
        assert cli.main(["train", *words, *options]) == 0


@pytest.mark.slow
def test_a_folder_has_the_bases_very_vae_whatever_it_was_computed_in(inputs, tmp_path):
    base = Path(inputs["dreambooth"][inputs["dreambooth"].index("--base") + 1])
    with gpu():
        found, _ = learn("dreambooth", inputs, tmp_path / "run", "--device", "cuda", "--precision", "bf16")
    vae = {name.partition(":")[2]: tensor for name, tensor in found.items() if name.startswith("out/vae/")}
    kept = load_file(base / "vae/diffusion_pytorch_model.safetensors")
    assert vae.keys() == kept.keys()
    assert all(torch.equal(vae[name], tensor.float()) for name, tensor in kept.items())


def test_one_process_needs_no_gpus_that_reach_each_other(monkeypatch):
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: False)  # of several RTX 40
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    shared = dict(PartialState._shared_state)
    PartialState._reset_state()
    try:
        with gpu():
            assert Processes.join("auto").device.type == "cuda"
    finally:
        PartialState._shared_state.update(shared)
    assert "NCCL_P2P_DISABLE" not in os.environ
