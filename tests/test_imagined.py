"""Tensors without numbers have the shapes, strides and aliases of real ones; a step of them takes what torch's take."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from sfumato.precision import forecast_precision
from sfumato.precision.fake_tensors import FakeMode, FakeTensor, storage_of
from sfumato.training import memory
from sfumato.training.memory import TRAININGS, MemorySetting, fake_base, step_memory


def results():
    """Of operations that a model is of: new tensors, views, changes in place, several results at once."""
    x = torch.zeros(2, 4, 6, 6)
    convolved = F.conv2d(x, torch.zeros(8, 4, 3, 3), stride=2, padding=1)
    tokens = convolved.flatten(2).transpose(1, 2)
    heads = tokens.reshape(2, 9, 2, 4).transpose(1, 2)
    attended = F.scaled_dot_product_attention(heads, heads, heads)
    half = attended.to(torch.bfloat16)
    yield from (x, convolved, tokens, heads, attended, half, half + attended, half * 2, half * 2.0, x.long() * 2.0)
    yield from torch.zeros(2, 6).chunk(2, dim=1)
    yield from torch.zeros(2, 6).max(dim=1)
    yield torch.arange(5)
    yield F.group_norm(x, 2).add_(torch.tensor(1.0))
    yield torch.zeros_like(tokens)
    yield torch.cat([x, x[:, :1]], dim=1)


def described(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def test_they_have_the_shapes_of_real_ones_asked_for_the_first_time_and_again():
    real = list(map(described, results()))
    for _ in range(2):
        with FakeMode():
            assert list(map(described, results())) == real


def test_views_share_their_memory_and_what_is_changed_in_place_is_the_same():
    with FakeMode():
        x = torch.zeros(3, 4)
        assert x.add_(1) is x
        assert storage_of(x.t()[1:])._cdata == storage_of(x)._cdata != storage_of(x + 0)._cdata
        assert storage_of(x).nbytes() == 48
    real = torch.zeros(3)
    assert storage_of(real)._cdata == real.untyped_storage()._cdata


def test_blocks_may_be_nested():
    with FakeMode(), FakeMode():
        x = torch.zeros(3, 4)
        y = x @ x.t() + torch.ones(3)
    assert type(y) is FakeTensor
    assert type(y.meta) is torch.Tensor  # and not what is imagined of an imagined one
    assert y.meta.is_meta


def test_autograd_and_autocast_see_a_cpu():
    with FakeMode(), torch.autocast("cpu", torch.bfloat16):
        weight = torch.zeros(3, 4, requires_grad=True)
        y = F.linear(torch.zeros(2, 4), weight)
        assert y.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(y.float().sum(), weight)
    assert described(gradient) == described(torch.zeros(3, 4))


def test_outside_of_the_block_there_is_nothing_to_compute_with():
    with FakeMode():
        x = torch.zeros(3)
    with pytest.raises(RuntimeError, match="without numbers outside"):
        x + 1


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "options"), [
    ("sd1", "lora --targets everything"),
    ("sd2", "dreambooth --method full"),
    ("sdxl", "lora --targets cross-attention"),
])  # fmt: skip
def test_a_step_takes_as_much_as_with_fake_tensors_of_torch(family, options, checkpointing, family_folder, monkeypatch):
    base = fake_base(family_folder(family), "gpu")
    way = next(way for way in TRAININGS if way.options == options)
    precision = forecast_precision("auto", "gpu", adapting=way.trained == "lora")
    setting = MemorySetting("gpu", precision, 64, 2, 4, checkpointing=checkpointing)
    told = step_memory(base, replace(way, pictures=2), setting)
    fake = FakeTensorMode()  # one for all blocks: tensors of two do not mix
    monkeypatch.setattr(memory, "FakeMode", lambda: fake)
    fakes = step_memory(base, replace(way, pictures=2), setting)
    assert (told.weights, told.trained) == (fakes.weights, fakes.trained)
    # Not equal: what a kernel keeps besides, some bytes for each group, is not the same in all releases of torch.
    assert (told.alive, told.fused) == pytest.approx((fakes.alive, fakes.fused), rel=1e-4)
