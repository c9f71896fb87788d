"""The GPU of these tests, the machine's own where torch finds one, else a pretended; and what runs there."""

from contextlib import nullcontext

import pytest
import torch

from bench.runs_resume import command, results
from sfumato import cli
from tests.logged import log_in
from tests.pretended_gpu import pretended_gpu
from tests.tiny import tiny_pipeline

REAL = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
NOISE = [torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=dtype) for dtype in (torch.half, None)]


def skip_other_noise(precision):
    """diffusers draws an image's noise in the precision of its latents, of which older torch makes other numbers."""
    if precision != "fp32" and not torch.equal(NOISE[0], NOISE[1].half()):
        pytest.skip("this torch draws other noise in half precision than in fp32")


def gpu(kind="cuda", major=8):
    """The machine's GPU, or a pretended one, of CUDA then with this compute capability."""
    return nullcontext() if REAL[kind] and major == 8 else pretended_gpu(kind, major)


def learn(case, inputs, output, *more):
    """The tensors that come out, by file and name, and the rows of the log."""
    few = {"--steps": "3", "--checkpoint-every": "0"} | dict(zip(more[::2], more[1::2], strict=True))
    assert cli.main(command(case, inputs, output, *(word for pair in few.items() for word in pair))) == 0
    return results(output), log_in(output)


PLACES = {  # of a pipeline of diffusers
    "moved": lambda pipe: pipe.to("cuda"),
    "no room for copies": lambda pipe: pipe.to("cuda"),
    "fp16": lambda pipe: pipe.to("cuda", torch.float16),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cuda"),
    "sequential offload": lambda pipe: pipe.enable_sequential_cpu_offload(device="cuda"),
    "mps": lambda pipe: pipe.to("mps"),
    "group offload": lambda pipe: (
        pipe.unet.enable_group_offload(torch.device("cuda"), offload_type="leaf_level"),
        pipe.text_encoder.to("cuda"),
        pipe.vae.to("cuda"),
    ),
}


def pipeline(family):
    pipe = tiny_pipeline(family, shallow=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
