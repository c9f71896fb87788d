"""Single calculations on a GPU, beside the same on the CPU."""

import pytest
import torch
from torch.testing import assert_close

from sfumato.files.fingerprint import fingerprint
from sfumato.training.pretrain.batches import restyle, restyle_randomly
from tests.files.test_change_definitions import DEFINITIONS, change_of
from tests.on_gpu.device import REAL, gpu


def test_other_hands_draw_on_a_gpu_what_they_draw_on_the_cpu():
    pixels = torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    some = restyle_randomly(pixels, 0.8, torch.Generator().manual_seed(1))
    with gpu():
        there = pixels.to("cuda")
        named = restyle(there, range(24))
        changed = restyle_randomly(there, 0.8, torch.Generator().manual_seed(1))
        assert named.device.type == changed.device.type == "cuda"
        named, changed = named.cpu(), changed.cpu()
    assert_close(named, restyle(pixels, range(24)), rtol=0, atol=1e-3)
    assert_close(changed, some, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_each_kind_of_adapter_changes_a_weight_as_on_the_cpu(name, kind, tmp_path):
    """On its own, and in the fingerprint of what a mix is made of."""
    shape = DEFINITIONS[name][0]
    change = change_of(DEFINITIONS[name][1], shape, tmp_path)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = change.delta(weight)
    with gpu(kind):
        found = change.delta(weight.to(kind))
        assert found.device.type == kind
        assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-6)
        assert fingerprint({("unet", "layer"): found}) == fingerprint({("unet", "layer"): found.cpu()})
