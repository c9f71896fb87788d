"""Kinds whose factors tell the shape of the weight need no base to be merged; a Tucker core is multiplied in fp32."""

import pytest
import torch
from torch.testing import assert_close

from sfumato.errors import AdapterError
from sfumato.files import read_adapter, write_tensors
from sfumato.files.kinds import LoraModule
from sfumato.merging.factors import Budget
from sfumato.merging.merge import MergeSource, dense_delta, merge

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "lora_unet_mid_block_resnets_0_conv1"


def loha(name, out, inner, core=None):
    draws = torch.Generator().manual_seed(0)
    found = {f"{name}.alpha": torch.tensor(1.0)}
    for half in ("1", "2"):
        shapes = {f"w{half}_a": (out, 2), f"w{half}_b": (2, inner)}
        if core:
            shapes = {f"w{half}_a": (2, out), f"w{half}_b": (2, inner), f"t{half}": (2, 2, *core)}
        found |= {f"{name}.hada_{key}": torch.randn(shape, generator=draws) for key, shape in shapes.items()}
    return found


def lokr(name, first, second):
    draws = torch.Generator().manual_seed(0)
    return {
        f"{name}.lokr_w1": torch.randn(first, generator=draws),
        f"{name}.lokr_w2": torch.randn(second, generator=draws),
        f"{name}.alpha": torch.tensor(1.0),
    }


KINDS = {
    "LoHa": (loha(LINEAR, 12, 8), (12, 8)),
    "LoHa, Tucker": (loha(CONVOLUTION, 12, 8, (3, 3)), (12, 8, 3, 3)),
    "LoKr": (lokr(LINEAR, (2, 4), (6, 2)), (12, 8)),
    "LoKr of a convolution": (lokr(CONVOLUTION, (2, 4), (6, 2, 3, 3)), (12, 8, 3, 3)),
}


@pytest.mark.parametrize(("tensors", "shape"), KINDS.values(), ids=KINDS)
def test_the_factors_tell_the_shape(tensors, shape, tmp_path):
    changes = read_adapter(write_tensors(tmp_path / "a.safetensors", tensors)).changes
    ((target, change),) = changes.items()
    assert change.shape == shape
    assert change.fits(shape)
    wanted = change.delta(torch.zeros(shape))
    assert_close(dense_delta(change, target, "a", None), wanted)
    merged = merge([MergeSource("a", changes, 0.5)], budget=Budget(keep_energy=1.0)).modules[target]
    assert merged.shape == shape
    assert_close(merged.delta(), 0.5 * wanted, atol=1e-5, rtol=1e-5)


def test_what_is_lost_before_a_method_on_factors_counts_as_lost(tmp_path):
    """A LoHa of rank 4 in one direction: it is cut before NP-LoRA, and nothing more is cut after it."""
    changes = read_adapter(write_tensors(tmp_path / "a.safetensors", loha(LINEAR, 12, 8))).changes
    ((target, change),) = changes.items()
    wanted = change.delta(torch.zeros(12, 8))
    merged = merge([MergeSource("a", changes, 1.0)], method="np-lora", budget=Budget(rank=1))
    lost = (merged.modules[target].delta() - wanted).square().sum() / wanted.square().sum()
    assert 0.05 < lost < 0.95
    assert merged.share == pytest.approx(1 - lost.item(), abs=1e-5)


def test_modules_of_one_shape_are_thinned_at_other_places():
    module = LoraModule(torch.ones(1, 8), torch.ones(12, 1), 1.0)
    changes = {("unet", f"mid_block.attentions.0.{name}"): module for name in ("to_q", "to_k")}
    one, other = merge([MergeSource("a", changes, 1.0)], method="dare", budget=Budget(keep_energy=1.0)).modules.values()
    assert not torch.allclose(one.delta(), other.delta(), atol=0.1)


def test_a_convolution_whose_kernel_is_in_the_columns_needs_its_base(tmp_path):
    ((target, change),) = read_adapter(
        write_tensors(tmp_path / "a.safetensors", loha(CONVOLUTION, 12, 72))
    ).changes.items()
    with pytest.raises(AdapterError, match=r"\[12, 72\], which does not tell the kernel of a convolution.*--base"):
        dense_delta(change, target, "a", None)
    base = dense_delta(change, target, "a", lambda target: torch.zeros(12, 8, 3, 3))
    assert base.shape == (12, 8, 3, 3)


def test_a_tucker_core_in_half_precision_is_multiplied_out_in_single():
    draws = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(s, generator=draws).half() for s in ((4, 8, 1, 1), (4, 4, 3, 3), (12, 4, 1, 1)))
    module = LoraModule(down, up, 2.0, mid)
    assert_close(module.plain().delta(), module.delta(), atol=1e-6, rtol=1e-6)
