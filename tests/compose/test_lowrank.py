"""The product behind every mix, on matrices small enough to check by hand."""

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from sfumato.compose.layers import lowrank
from sfumato.compose.layers.lowrank import Scratch, write_sum
from sfumato.files.kinds import LoraModule
from sfumato.precision.cpu_matmul import exact_matmul, processor

LEFT = LoraModule(down=tensor([[1.0, 0.0]]), up=tensor([[2.0], [0.0]]), alpha=1.0)  # adds 2 at (0, 0)
RIGHT = LoraModule(down=tensor([[0.0, 1.0]]), up=tensor([[0.0], [4.0]]), alpha=1.0)  # adds 4 at (1, 1)


def weighted_sum(original, terms, dense=None):
    """original + the sum of the terms + dense, unrounded: fp32, in the original's shape."""
    total = torch.empty_like(original, dtype=torch.float32, memory_format=torch.contiguous_format)
    with exact_matmul():
        write_sum(total, original, terms, dense, Scratch())
    return total


def test_the_weighted_sum_written_out():
    merged = weighted_sum(torch.ones(2, 2), [(0.5, LEFT), (0.25, RIGHT)])
    assert_close(merged, tensor([[2.0, 1.0], [1.0, 2.0]]))


def test_alpha_over_rank_scales_the_change():
    change = LoraModule(down=tensor([[1.0, 0.0], [0.0, 1.0]]), up=tensor([[2.0, 0.0], [0.0, 4.0]]), alpha=1.0)
    assert_close(weighted_sum(torch.zeros(2, 2), [(1.0, change)]), tensor([[1.0, 0.0], [0.0, 2.0]]))


def test_a_convolution_changes_as_its_own_delta():
    change = LoraModule(down=torch.randn(2, 3, 3, 3), up=torch.randn(4, 2, 1, 1), alpha=2.0)
    weight = torch.randn(4, 3, 3, 3)
    assert_close(weighted_sum(weight, [(0.5, change)]), weight + 0.5 * change.delta())


def test_a_linear_change_fits_a_1x1_convolution():
    weight = torch.zeros(2, 2, 1, 1)
    assert LEFT.fits(weight.shape)
    assert_close(weighted_sum(weight, [(1.0, LEFT)]), tensor([[2.0, 0.0], [0.0, 0.0]]).view(2, 2, 1, 1))


def test_a_change_of_another_shape_does_not_fit():
    assert not LEFT.fits((2, 3))
    assert not LEFT.fits((3, 2))
    assert not LEFT.fits((2, 2, 3, 3))


def test_half_precision_is_rounded_once():
    """A bf16 weight is the float64 sum to within half a unit in the last place, also for eight adapters."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator).bfloat16()
    changes = [
        LoraModule(torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator) / 64, 4.0)
        for _ in range(8)
    ]
    exact = weight.double() + sum(0.6 * change.up.double() @ change.down.double() for change in changes)
    merged = weighted_sum(weight, [(0.6, change) for change in changes]).bfloat16()
    assert (merged.double() - exact).norm() <= 1.001 * (exact.bfloat16().double() - exact).norm()


def test_autocast_and_tf32_do_not_reach_the_product():
    weight = torch.randn(32, 32)
    change = LoraModule(torch.randn(4, 32), torch.randn(32, 4), 4.0)
    plain = weighted_sum(weight, [(1.0, change)])
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(weighted_sum(weight, [(1.0, change)]), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_precision_set_by_torchs_new_settings_neither_reaches_the_product_nor_is_lost():
    """With one backend's set, torch.get_float32_matmul_precision() itself raises."""
    weight = torch.randn(32, 32)
    change = LoraModule(torch.randn(4, 32), torch.randn(32, 4), 4.0)
    plain = weighted_sum(weight, [(1.0, change)])
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert torch.equal(weighted_sum(weight, [(1.0, change)]), plain)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_without_onednns_product_the_sum_is_the_same(monkeypatch):
    weight, change = torch.randn(32, 48), LoraModule(torch.randn(4, 48), torch.randn(32, 4), 4.0)
    plain = weighted_sum(weight, [(0.5, change)])
    monkeypatch.setattr(lowrank, "onednn", lambda: None)
    assert_close(weighted_sum(weight, [(0.5, change)]), plain)


BF16_PRODUCTS = not {"avx512_bf16", "amx_bf16"}.isdisjoint(processor().split())


@pytest.mark.parametrize(
    "bf16_ranks", [0, pytest.param(999, marks=pytest.mark.skipif(not BF16_PRODUCTS, reason="the CPU has none"))]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.08, 3.0])
def test_one_rounding_is_the_whole_error(dtype, size, bf16_ranks):
    """Split bf16 factors and fp32 ones, fp16 files, changes smaller and larger than the weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 192, generator=generator).to(dtype)
    changes = [
        LoraModule(
            torch.randn(16, 192, generator=generator).half(),
            (torch.randn(256, 16, generator=generator) * size / 8).half(),
            4.0,
        )
        for _ in range(8)
    ]
    exact = weight.double() + sum(0.6 * c.scale * c.up.double() @ c.down.double() for c in changes)
    merged = torch.empty_like(weight)
    assert write_sum(merged, weight, [(0.6, change) for change in changes], None, Scratch(bf16_ranks=bf16_ranks))
    assert (merged.double() - exact).norm() <= 1.001 * (exact.to(dtype).double() - exact).norm()


@pytest.mark.skipif(not BF16_PRODUCTS, reason="the CPU has none")
@pytest.mark.parametrize(("share", "least", "most"), [(0.02, 1.0, 1.002), (0.14, 1.005, 1.022), (0.2, 0.999, 1.001)])
def test_the_factors_of_a_slight_change_are_rounded_and_of_a_larger_one_split(share, least, most):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=generator).bfloat16()
    down, up = torch.randn(16, 512, generator=generator), torch.randn(512, 16, generator=generator)
    change = LoraModule(down, up * (share * weight.float().norm() / (up @ down).norm()), 16.0)
    exact = weight.double() + change.up.double() @ change.down.double()
    merged = weight.clone()
    assert write_sum(merged, lambda: weight, [(1.0, change)], None, Scratch(), pristine=True)
    error = (merged.double() - exact).norm() / (exact.bfloat16().double() - exact).norm()
    assert least <= error <= most
    again = torch.zeros_like(weight)  # from anything else the same bytes, as the original decides
    write_sum(again, weight, [(1.0, change)], None, Scratch())
    assert torch.equal(again, merged)


def test_scratch_that_was_used_before_changes_nothing():
    scratch, merged = Scratch(), torch.empty(2, 2)
    big = LoraModule(torch.randn(3, 8), torch.randn(8, 3), 3.0)
    write_sum(torch.empty(8, 8), torch.randn(8, 8), [(1.0, big)], None, scratch)
    write_sum(merged, torch.ones(2, 2), [(0.5, LEFT)], None, scratch)
    assert_close(merged, tensor([[2.0, 1.0], [1.0, 1.0]]))


def test_what_has_no_low_rank_form_is_added_before_the_rounding():
    merged = weighted_sum(torch.ones(2, 2), [(0.5, LEFT)], tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert_close(merged, tensor([[2.0, 2.0], [3.0, 4.0]]))


def test_a_sum_beyond_the_dtype_is_told():
    merged = torch.empty(2, 2, dtype=torch.float16)
    assert not write_sum(merged, torch.ones(2, 2).half(), [(1e6, LEFT)], None, Scratch())
    assert write_sum(merged, torch.ones(2, 2).half(), [(1e4, LEFT)], None, Scratch())


def test_a_weight_of_many_blocks_is_summed_in_each(monkeypatch):
    monkeypatch.setattr(lowrank, "_BLOCK", 5 * 48)  # five rows
    weight, dense = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(0))
    change = LoraModule(torch.randn(4, 48), torch.randn(32, 4), 4.0)
    for product in (lowrank.onednn, lambda: None):
        monkeypatch.setattr(lowrank, "onednn", product)
        total = torch.empty_like(weight)
        with exact_matmul():
            write_sum(total, weight, [(0.5, change)], dense, Scratch())
        assert_close(total, weight + 0.5 * change.delta() + dense)


def test_a_sum_just_beyond_fp16_is_seen():
    weight, eights = torch.full((2, 2), 65504.0).half(), torch.full((2, 1), 8.0)
    assert not write_sum(torch.empty_like(weight), weight, [(1.0, LoraModule(eights.T, eights, 1.0))], None, Scratch())
