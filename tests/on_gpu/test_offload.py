"""Parts that are on the GPU only while they compute, by us or by diffusers."""

import gc

import numpy as np
import pytest
import torch
from torch import nn

from sfumato import Adapter, compose, draw, load_base
from sfumato.compose import adapter_guidance
from sfumato.generation.prompt_adapters import choose_apply_mode
from sfumato.precision import decide
from sfumato.precision.offload import Offload
from tests.on_gpu.device import PLACES, gpu, learn, pipeline
from tests.tiny import tiny_pipeline

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_offloaded_parts_are_on_the_gpu_one_at_a_time(family, tmp_path):
    tiny_pipeline(family, shallow=True).save_pretrained(tmp_path)
    settings = {"steps": 2, "width": 64, "height": 64, "guidance": 7.5}
    wanted = draw(load_base(tmp_path, precision=decide("fp32", device="cpu")), "a crab", [1, 2], **settings)
    with gpu():
        base = load_base(tmp_path, precision=decide("fp32", device="cuda", offload=True))
        parts = {**base.parts(text=True), "vae": base.vae}
        seen = {name: [] for name in parts}

        def looked_at(name):
            return lambda *_: seen[name].append({other for other in parts if parts[other].device.type == "cuda"})

        for name in parts:
            (base.vae.decoder if name == "vae" else parts[name]).register_forward_hook(looked_at(name))
        found = draw(base, "a crab", [1, 2], **settings)
    assert all(places and all(place == {name} for place in places) for name, places in seen.items())
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(np.asarray(one, float) - np.asarray(other, float)).max() <= 1


def test_an_offloaded_part_that_does_not_fit_leaves_the_others_usable(monkeypatch):
    with gpu():
        offload, parts = Offload(torch.device("cuda")), [nn.Linear(2, 2), nn.Linear(2, 2)]
        for part in parts:
            offload.add(part)
        x, move = torch.ones(1, 2, device="cuda"), nn.Module.to
        parts[0](x)

        def full(part, device):
            moved = move(part, device)
            if device != "cpu" and part is parts[1]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return moved

        monkeypatch.setattr(nn.Module, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            parts[1](x)
        monkeypatch.undo()
        assert [part.weight.device.type for part in parts] == ["cpu", "cpu"]
        assert parts[0](x).device.type == "cuda"
        assert [part.weight.device.type for part in parts] == ["cuda", "cpu"]
        parts[0].weight, parts[0].bias = (nn.Parameter(each.to("meta")) for each in (parts[0].weight, parts[0].bias))
        assert parts[1](x).device.type == "cuda"  # while the other rests


@pytest.mark.slow
def test_an_offloaded_mix_under_guidance_holds_no_second_weights_on_the_gpu(inputs, tmp_path):
    learn("lora", inputs, tmp_path, "--steps", "1", "--targets", "everything", "--rank", "1")
    folder = inputs["lora"][inputs["lora"].index("--base") + 1]
    before = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]  # of other tests
    known = set(map(id, before))
    with gpu():
        base = load_base(folder, precision=decide("fp32", device="cuda", offload=True))
        adapter, beside = Adapter(tmp_path / "out.safetensors"), []
        guidance = base.defaults.guidance
        with (
            compose(base, adapter, way=choose_apply_mode(base, [adapter])) as mix,
            adapter_guidance(mix, 2, guidance=guidance),
        ):

            def look(*_):
                every = (each for each in gc.get_objects() if isinstance(each, torch.Tensor) and id(each) not in known)
                beside.append(sum(each.numel() for each in every if each.device.type == "cuda"))

            base.vae.decoder.register_forward_pre_hook(look)
            draw(base, "a crab", 1, steps=2)
    vae = sum(weight.numel() for weight in base.vae.parameters())
    unet = sum(weight.numel() for weight in base.unet.parameters())
    assert 0 < beside[0] < vae + 0.3 * unet


@pytest.mark.slow
@pytest.mark.parametrize("place", ["model offload", "sequential offload"])
def test_pipelines_that_diffusers_offloads_draw_as_others(place):
    wanted = draw(pipeline("sd1"), "a crab", [1, 2], steps=1, width=64, height=64)
    with gpu():
        pipe = pipeline("sd1")
        PLACES[place](pipe)
        found = draw(pipe, "a crab", [1, 2], steps=1, width=64, height=64)
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(np.asarray(one, float) - np.asarray(other, float)).max() <= 1
