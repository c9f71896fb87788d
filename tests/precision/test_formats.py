"""What weights are rounded to in int8 and nf4."""

import pytest
import torch
from torch import nn

from sfumato.precision.quantization import BLOCK, FORMATS, LEVELS, quantize


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(name, weight, dtype=torch.float32):
    """What a format makes of a weight."""
    return FORMATS[name].made(FORMATS[name].held(weight), weight.shape, dtype)


def by_rows(*shape):
    """Weights whose rows are of very different sizes."""
    return normal(*shape) * torch.logspace(-6, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("shape", [(64, 96), (32, 16, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_rounds_a_weight_by_half_a_level_of_its_own_row_at_most(shape, dtype):
    weight = by_rows(*shape).to(dtype)
    codes, scale_bits = FORMATS["int8"].held(weight)
    assert (codes.dtype, codes.shape, scale_bits.dtype) == (torch.int8, weight.shape, torch.int32)
    assert scale_bits.shape == (shape[0], *[1] * (len(shape) - 1))
    again = rounded("int8", weight)
    assert ((again - weight.float()).abs() <= scale_bits.view(torch.float32) * 0.501).all()
    assert (codes.abs().flatten(1).amax(1) == 127).all()


@pytest.mark.parametrize("shape", [(64, 96), (32, 16, 3, 3), (7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_takes_the_nearest_level_of_its_block(shape, dtype):
    weight = by_rows(*shape).to(dtype)
    codes, scale_bits, _ = FORMATS["nf4"].held(weight)
    blocks = -(-weight.numel() // BLOCK)
    assert (codes.dtype, codes.shape, scale_bits.shape) == (torch.uint8, (blocks * BLOCK // 2,), (blocks,))
    again = rounded("nf4", weight)
    assert again.shape == weight.shape
    flat, levels = weight.float().flatten(), torch.tensor(LEVELS)
    largest = torch.stack([block.abs().amax() for block in flat.split(BLOCK)])
    assert torch.equal(scale_bits.view(torch.bfloat16), largest.bfloat16())
    scales = largest.bfloat16().float().repeat_interleave(BLOCK)[: flat.numel()]
    nearest = (levels * scales[:, None] - flat[:, None]).abs().amin(1)
    assert ((again.flatten() - flat).abs() <= nearest + 1e-6 * scales).all()


def test_nf4_is_that_of_bitsandbytes():
    """Whose scales are fp32; with powers of two, which bf16 has as they are, nothing differs. Rows are of whole blocks,
    without which its CPU kernel takes other scales."""
    library = pytest.importorskip("bitsandbytes.functional")
    blocks = normal(96, BLOCK).clamp(-3, 3) / 4
    blocks[:, 5] = 1.0
    weight = (blocks * 2.0 ** (torch.arange(96) % 12 - 8)[:, None]).view(48, 128)
    packed, state = library.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    codes, _, _ = FORMATS["nf4"].held(weight)
    assert torch.equal(state.code, torch.tensor(LEVELS))
    assert torch.equal(packed.flatten(), codes)
    assert torch.equal(library.dequantize_4bit(packed, state), rounded("nf4", weight))


def test_of_normal_weights_int8_loses_less_than_a_hundredth_and_nf4_less_than_a_tenth():
    weight = normal(512, 2048)
    eight, four = ((rounded(name, weight) - weight).norm() / weight.norm() for name in FORMATS)
    fp8 = (weight.to(torch.float8_e4m3fn).float() - weight).norm() / weight.norm()
    assert 0.007 < eight < 0.01
    assert fp8 > 2.5 * eight
    assert 0.08 < four < 0.1


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_rounded_once_more_and_not_twice(name, dtype):
    weight = normal(64, 96).to(dtype)
    assert torch.equal(rounded(name, weight, dtype), rounded(name, weight).to(dtype))
    model = nn.ModuleDict({"layer": nn.Linear(96, 64, bias=False).to("meta")})
    quantize(model, name)
    model["layer"].take(weight)
    assert not any(tensor.is_floating_point() for tensor in model["layer"].held)
    model.to(dtype)  # as a base is placed
    assert torch.equal(model["layer"].weight, rounded(name, weight, dtype))


@pytest.mark.parametrize(("name", "code"), [("int8", 0), ("nf4", 16 * LEVELS.index(0) + LEVELS.index(0))])
def test_zeros_stay_zeros(name, code):
    weight = normal(4, 128)
    weight[1] = 0
    assert (FORMATS[name].held(weight)[0].view(4, -1)[1] == code).all()
    again = rounded(name, weight)
    assert (again[1] == 0).all()
    assert again.isfinite().all()
