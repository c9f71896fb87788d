"""Layers that keep less: the values and gradients of torch's own to the bit, and fewer bytes between the passes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from sfumato.adapters import attach, select
from sfumato.precision.cpu_matmul import use_fast_matmul
from sfumato.precision.layers import save_activation_memory
from sfumato.training.options import BaseOptions
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def unet():
    unet = tiny_pipeline("sd1", shallow=True).unet.requires_grad_(False)
    use_fast_matmul(unet)  # as every base's is
    return unet


def learn(unet, trained, autocast=False):
    """The U-Net's output, the gradients of `trained`, and the bytes kept beside weights."""
    shape = torch.Generator().manual_seed(1)
    x, text = (
        torch.randn(2, 4, 8, 8, generator=shape),
        torch.randn(2, 7, unet.config.cross_attention_dim, generator=shape),
    )
    added = {"time_ids": torch.zeros(2, 6), "text_embeds": torch.zeros(2, 96)}
    own = {p.data_ptr() for p in [*unet.parameters(), *trained]}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", enabled=autocast):
        y = unet(x, torch.tensor([3, 500]), text, added_cond_kwargs=added, return_dict=False)[0]
    y.float().square().sum().backward()
    return y.detach(), [p.grad for p in trained], sum(kept.values())


def adapter(unet, targets="attention", conv=False):
    lora = attach({"unet": select(unet, targets, conv=conv)}, rank=2, alpha=2.0)
    for layer in lora.layers.values():
        layer.up.data.fill_(0.01)
    return list(lora.parameters())


@pytest.mark.parametrize("trained", ["attention", "everything", "whole", "checkpointed", "SDXL"])
def test_values_and_gradients_are_equal_to_the_bit(unet, trained):
    found = []
    if trained == "SDXL":
        unet = tiny_pipeline("sdxl", shallow=True).unet.requires_grad_(False)
        use_fast_matmul(unet)
    for lean in (False, True):
        one = copy.deepcopy(unet)
        if lean:
            save_activation_memory(one)
        if trained == "whole":
            parameters = list(one.requires_grad_(True).parameters())
        else:
            parameters = adapter(one, trained if trained == "everything" else "attention", conv=trained == "everything")
        if trained == "checkpointed":
            one.enable_gradient_checkpointing()
            one.train()
        found.append(learn(one, parameters))
    (y, grads, kept), (lean_y, lean_grads, lean_kept) = found
    assert torch.equal(y, lean_y)
    assert all(torch.equal(a, b) for a, b in zip(grads, lean_grads, strict=True) if a is not None)
    if trained in ("attention", "SDXL"):
        assert lean_kept < 0.8 * kept
    if trained == "whole":
        assert lean_kept < 0.9 * kept


def test_weights_that_come_later_are_kept_as_little_of(pocket_folder, tmp_path):
    """As trainers have it: layers keep less before the U-Net's weights are read, and a wake places them again."""
    options = BaseOptions(base=str(pocket_folder), device="cpu", precision="fp32")
    base = options.load_base(options.decide_precision(SimpleNamespace(count=1)))
    made = [base.unet.conv_in._conv_forward]
    base.lazy_weights.load_only("unet")
    made.append(base.unet.conv_in._conv_forward)
    assert made[0] is made[1]
    assert made[1].func.__module__ == "sfumato.precision.layers"


def test_in_half_precision_frozen_weights_are_not_kept_twice(unet):
    plain, lean = copy.deepcopy(unet), copy.deepcopy(unet)
    save_activation_memory(lean)
    (y, grads, kept), (lean_y, lean_grads, lean_kept) = (
        learn(one, adapter(one), autocast=True) for one in (plain, lean)
    )
    assert torch.equal(y, lean_y)
    for a, b in zip(grads, lean_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert kept - lean_kept > sum(2 * p.numel() for p in unet.parameters() if p.ndim == 4) / 2


def test_a_block_with_something_between_its_norm_and_its_activation_is_left_alone():
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=32, temb_channels=8, time_embedding_norm="scale_shift")
    given = torch.randn(1, 32, 4, 4, requires_grad=True), torch.randn(1, 8)
    wanted = block(*given)
    save_activation_memory(block)
    assert torch.equal(block(*given), wanted)


def test_drawing_takes_the_same_way_and_a_copy_is_of_its_own(unet):
    lean = copy.deepcopy(unet)
    save_activation_memory(lean)
    other = copy.deepcopy(lean)
    with torch.no_grad():
        other.conv_in.weight.zero_()
        added = {"time_ids": torch.zeros(1, 6), "text_embeds": torch.zeros(1, 96)}
        given = (torch.ones(1, 4, 8, 8), torch.tensor([9]), torch.ones(1, 7, unet.config.cross_attention_dim))
        y, lean_y, other_y = (one(*given, added_cond_kwargs=added).sample for one in (unet, lean, other))
    assert torch.equal(y, lean_y)
    assert not torch.equal(y, other_y)
    assert list(lean.state_dict()) == list(unet.state_dict())
