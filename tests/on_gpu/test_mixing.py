"""Mixing into a pipeline of diffusers on a GPU, and where the original weights lie meanwhile."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sfumato import Adapter, compose
from sfumato.compose import adapter_guidance, current
from sfumato.compose.by_method import by_method
from sfumato.compose.layers import original_weights
from sfumato.compose.per_image import composite, per_picture
from sfumato.compose.regions import Region, regions
from sfumato.compose.schedules import Ramp, over_steps
from tests.on_gpu.device import PLACES, gpu, pipeline, skip_other_noise

LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
MIXES = {
    "baked": lambda pipe, a, b: compose(pipe, a, b, way="baked"),
    "live": lambda pipe, a, b: compose(pipe, a, b, way="live"),
    "other weights": lambda pipe, a, b: compose(pipe, a, b).set(a=-0.3),
    "guided": lambda pipe, a, b: adapter_guidance(compose(pipe, a, b), 2, guidance=7.5),
    "by step": lambda pipe, a, b: over_steps(compose(pipe, a, b), a=Ramp((0, 0), (1, 1))),
    "by step, live": lambda pipe, a, b: over_steps(compose(pipe, a, b, way="live"), a=Ramp((0, 0), (1, 1))),
    "by image": lambda pipe, a, b: per_picture(pipe, [[a], [b]]),
    "composite": composite,
    "by region": lambda pipe, a, b: regions(pipe, Region(LEFT, a), Region(RIGHT, b, prompt="a cat")),
    "ties": lambda pipe, a, b: by_method(pipe, a, b, method="ties"),
    "knots": lambda pipe, a, b: by_method(pipe, a, b, method="knots"),
}
PLACED = [("sd1", place) for place in PLACES] + [("sdxl", place) for place in ("moved", "model offload")]


def pictures_of(pipe):
    """(2, 64, 64, 3) of two prompts, in [0, 1]."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "np", "height": 64, "width": 64}
    return pipe(["a crab", "a dog"], generator=generators, **options).images


def test_where_there_is_no_room_for_copies_originals_are_on_the_cpu(monkeypatch):
    with gpu():
        weights = [torch.ones(2, 3, device="cuda"), torch.ones(3)]
        assert [each.device.type for each in original_weights._copies(weights)] == ["cuda", "cpu"]
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (4 * weights[0].nbytes - 1, 2**33))
        copies = original_weights._copies(weights)
    assert [each.device.type for each in copies] == ["cpu", "cpu"]
    assert_close(copies[0], torch.ones(2, 3))


def test_originals_in_main_memory_lie_in_one_piece_where_their_layout_allows_it(monkeypatch):
    monkeypatch.setattr(original_weights, "_LARGE", 1)
    with gpu():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 2**33))
        weights = [torch.randn(2, 3, 4, 4, device="cuda") for _ in range(3)]
        weights[1] = weights[1].to(memory_format=torch.channels_last)
        copies, wanted = original_weights._copies(weights), [weight.cpu() for weight in weights]
    assert [each.stride() for each in copies] == [each.stride() for each in weights]
    assert copies[0].untyped_storage().data_ptr() == copies[2].untyped_storage().data_ptr()
    assert copies[0].untyped_storage().data_ptr() != copies[1].untyped_storage().data_ptr()
    for copy, weight in zip(copies, wanted, strict=True):
        assert torch.equal(copy, weight)


def test_memory_that_torch_keeps_on_a_gpu_is_room_for_originals(monkeypatch):
    with gpu():
        weight = torch.ones(2, 3, device="cuda")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 2**33))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 100)
        for reserved, where in ((100 + 4 * weight.nbytes - 1, "cpu"), (100 + 4 * weight.nbytes, "cuda")):
            monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_, reserved=reserved: reserved)
            assert original_weights._copies([weight])[0].device.type == where


@pytest.fixture(scope="module")
def on_cpu():
    """What the CPU has drawn already with which adapters, by family and mix."""
    return {}


@pytest.fixture(scope="module")
def unmixed():
    """What was drawn without adapters already, by family and place."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "place"), PLACED)
@pytest.mark.parametrize("way", MIXES)
def test_each_mix_draws_what_it_draws_on_the_cpu_and_leaves_no_trace(
    way, family, place, write, on_cpu, unmixed, monkeypatch
):
    skip_other_noise("fp16" if place == "fp16" else "fp32")
    if (family, way) not in on_cpu:
        here = pipeline(family)
        a, b = (
            Adapter(write(name, here, "to_q", "to_v", "proj_in", "conv1", seed=seed, family=family), 0.8, name=name)
            for seed, name in enumerate("ab")
        )
        with MIXES[way](here, a, b):
            on_cpu[family, way] = a, b, pictures_of(here)
    a, b, wanted = on_cpu[family, way]
    with gpu("mps" if place == "mps" else "cuda"):
        if place == "no room for copies":
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 2**33))
        there = pipeline(family)
        PLACES[place](there)
        if (family, place) not in unmixed:
            unmixed[family, place] = pictures_of(there)
        plain = unmixed[family, place]
        with MIXES[way](there, a, b):
            found = pictures_of(there)
        if mix := current(there):  # what lasted for a block has ended with it, the mix below it has not
            mix.undo()
        again = pictures_of(there)
    assert np.abs(found - wanted).mean() <= (0.003 if place == "fp16" else 1e-4)
    assert np.abs(found - plain).mean() > 0.003
    assert np.array_equal(again, plain)
