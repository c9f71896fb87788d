"""U-Nets that quantisers of other libraries have packed: mixed live, undone without a trace, never baked.

Each test skips where its library is not installed: `pip install torchao optimum-quanto bitsandbytes`.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sfumato.compose import Adapter, compose
from sfumato.errors import AdapterError
from sfumato.files import read_adapter
from tests.compose.conftest import fresh

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def torchao(unet):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(unet, quantization.Int8WeightOnlyConfig())


def quanto(unet):
    library = pytest.importorskip("optimum.quanto")
    library.quantize(unet, weights=library.qint8)
    library.freeze(unet)


def bitsandbytes(make):
    def pack(unet):
        library = pytest.importorskip("bitsandbytes")
        for module in list(unet.modules()):
            for name, layer in list(module.named_children()):
                if type(layer) is nn.Linear:
                    setattr(module, name, packed(make(library, layer), layer))

    return pack


def packed(quantised, layer):
    quantised.load_state_dict(layer.state_dict())
    return quantised.to("cpu")


def sizes(layer):
    return layer.in_features, layer.out_features, layer.bias is not None


QUANTISERS = {
    "torchao int8": torchao,
    "quanto int8": quanto,
    "bitsandbytes nf4": bitsandbytes(
        lambda library, layer: library.nn.Linear4bit(*sizes(layer), compute_dtype=torch.float32, quant_type="nf4")
    ),
    "bitsandbytes int8": bitsandbytes(
        lambda library, layer: library.nn.Linear8bitLt(*sizes(layer), has_fp16_weights=False)
    ),
}


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_packed_unet_takes_adapters_live_and_gives_them_back(quantiser, originals, write):
    pipe = fresh(originals["sd1"])
    file = write("a", pipe, "attn1.to_q")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        QUANTISERS[quantiser](pipe.unet)
        layer = pipe.unet.get_submodule(LAYER)
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = layer(x)
            with pytest.raises(AdapterError, match=r"quantised.*way='live'"):
                compose(pipe, Adapter(file), way="baked")
            assert torch.equal(layer(x), before)
            mix = compose(pipe, Adapter(file, 0.5))
            delta = read_adapter(file).changes["unet", LAYER].delta(torch.zeros(layer.out_features, layer.in_features))
            assert_close(layer(x) - before, 0.5 * x @ delta.T, atol=1e-5, rtol=1e-4)
            mix.undo()
            assert torch.equal(layer(x), before)
