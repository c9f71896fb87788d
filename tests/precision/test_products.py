"""Quicker fp32 products: torch's own values and gradients, and torch's own way wherever they are no gain."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfumato.precision import cpu_matmul


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def maker(request, monkeypatch):
    """Both makers' processors, whatever this one is."""
    if request.param and cpu_matmul.onednn() is None:
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(cpu_matmul, "mkl_is_slow", lambda: request.param)
    monkeypatch.setattr(cpu_matmul, "_LEAST", 1)


@pytest.fixture
def by_onednn(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu_matmul, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(cpu_matmul, "_matmul", lambda *given: calls.append(given) or F.linear(*given))
    return calls


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learn(function, inputs, wanted):
    """The value, and the gradients of those inputs that are wanted, of a sum that weighs each output otherwise."""
    given = [None if x is None else x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    y = function(*given)
    found = torch.autograd.grad(
        (y * drawn(*y.shape, seed=9)).sum(), [x for x in given if x is not None and x.requires_grad]
    )
    return y.detach(), found


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (True, True, True), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (2, 3, 4, 24)])
def test_linear_layers_give_torchs_values_and_gradients(maker, shape, wanted):
    inputs = drawn(*shape), drawn(17, 24, seed=1), drawn(17, seed=2)
    torch.testing.assert_close(learn(cpu_matmul.linear, inputs, wanted), learn(F.linear, inputs, wanted))
    with torch.no_grad():
        torch.testing.assert_close(cpu_matmul.linear(*inputs), F.linear(*inputs))
        turned = drawn(24, 7).t()
        torch.testing.assert_close(cpu_matmul.linear(turned, inputs[1]), F.linear(turned, inputs[1]))


@pytest.mark.parametrize(
    ("pictures", "side", "geometry"),
    [(1, 4, ((1, 1), (1, 1), (1, 1))), (3, 5, ((2, 2), (1, 1), (1, 1))), (2, 6, ((1, 2), (2, 0), (2, 1)))],
)
@pytest.mark.parametrize("wanted", [(True, False, False), (True, True, True), (False, True, False)])
def test_convolutions_of_small_pictures_give_torchs_values_and_gradients(maker, pictures, side, geometry, wanted):
    inputs = drawn(pictures, 8, side, side + 1), drawn(12, 8, 3, 3, seed=1), drawn(12, seed=2)
    ours = learn(lambda *given: cpu_matmul.convolve_small(*given, geometry), inputs, wanted)
    torch.testing.assert_close(
        ours, learn(lambda *given: F.conv2d(*given, *geometry), inputs, wanted), atol=1e-4, rtol=1e-5
    )


class Quantised(torch.Tensor):
    """Of a class of its own, as libraries have them whose numbers are stored in another way."""


def test_only_large_plain_fp32_products_take_the_other_way(by_onednn):
    large, weight = drawn(64, 512), drawn(512, 512)
    with torch.no_grad():
        cpu_matmul.linear(large[:1], weight)
        cpu_matmul.linear(large.bfloat16(), weight.bfloat16())
        cpu_matmul.linear(large[:0], weight)
        cpu_matmul.linear(large, weight.as_subclass(Quantised))
        with torch.autocast("cpu", torch.bfloat16):
            assert cpu_matmul.linear(large, weight).dtype == torch.bfloat16
        assert not by_onednn
        cpu_matmul.linear(large, weight)
    assert len(by_onednn) == 1


def test_where_onednn_is_switched_off_it_is_not_asked(maker):
    with torch.backends.mkldnn.flags(enabled=False):
        assert cpu_matmul._product() is None
    assert (cpu_matmul._product() is not None) == cpu_matmul.mkl_is_slow()


def test_a_frozen_layer_keeps_no_input(by_onednn):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        cpu_matmul.linear(drawn(64, 512).requires_grad_(), drawn(500, 512))
        cpu_matmul.convolve_small(drawn(1, 8, 4, 4).requires_grad_(), drawn(9, 8, 3, 3), None, ((1, 1), (1, 1), (1, 1)))
    assert kept == [(500, 512), (9, 8, 3, 3)]


def test_a_convolution_is_a_product_where_its_weight_outweighs_the_picture():
    taps = ((1, 1), (1, 1), (1, 1))
    weight = torch.zeros(1280, 1280, 3, 3)
    assert cpu_matmul.is_small_convolution(torch.zeros(1, 1280, 8, 8), weight, taps, 1)
    assert not cpu_matmul.is_small_convolution(torch.zeros(8, 1280, 8, 8), weight, taps, 1)
    assert cpu_matmul.is_small_convolution(torch.zeros(4, 1280, 16, 16), weight, ((4, 4), (1, 1), (1, 1)), 1)
    assert not cpu_matmul.is_small_convolution(torch.zeros(1, 1280, 8, 8), torch.zeros(1280, 1280, 1, 1), taps, 1)
    assert not cpu_matmul.is_small_convolution(torch.zeros(1, 1280, 8, 8), weight[:, :640], taps, 2)
    assert not cpu_matmul.is_small_convolution(torch.zeros(1, 1280, 8, 8).bfloat16(), weight.bfloat16(), taps, 1)
    assert not cpu_matmul.is_small_convolution(torch.zeros(0, 1280, 8, 8), weight, taps, 1)


@pytest.mark.parametrize("wanted", [(True, False, False), (True, True, True)])
@pytest.mark.parametrize("pictures", [1, 3])
def test_a_pointwise_convolution_gives_torchs_values_and_gradients(maker, pictures, wanted):
    inputs = drawn(pictures, 24, 5, 6), drawn(16, 24, 1, 1, seed=1), drawn(16, seed=2)
    taps = ((1, 1), (0, 0), (1, 1))

    def ours(*given):
        quick = cpu_matmul.convolve(*given, taps, 1)
        assert (quick is not None) == cpu_matmul.mkl_is_slow()
        return F.conv2d(*given) if quick is None else quick

    torch.testing.assert_close(learn(ours, inputs, wanted), learn(F.conv2d, inputs, wanted))
    assert ours(*inputs).is_contiguous()


def test_other_convolutions_stay_torchs(by_onednn):
    x, weight = drawn(1, 24, 5, 6), drawn(16, 24, 1, 1)
    for stride, padding, groups in (((2, 2), (0, 0), 1), ((1, 1), (1, 1), 1), ((1, 1), (0, 0), 2)):
        assert cpu_matmul.convolve(x, weight, None, (stride, padding, (1, 1)), groups) is None
    assert cpu_matmul.convolve(drawn(1, 24, 46, 46), weight, None, ((1, 1), (0, 0), (1, 1)), 1) is None
    assert cpu_matmul.convolve(x, drawn(16, 24, 3, 3), None, ((1, 1), (1, 1), (1, 1)), 1) is None


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(512, 512, 3, padding=1)
        self.same = nn.Conv2d(512, 512, 3, padding="same")
        self.around = nn.Conv2d(512, 512, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(512, 512, 3, padding=1, groups=2)
        self.linear = nn.Linear(512, 512)

    def forward(self, x):
        return self.linear(self.grouped(self.around(self.same(self.conv(x)))).flatten(2).transpose(1, 2))


def test_a_quickened_model_is_the_same_model(maker):
    torch.manual_seed(0)
    model = Small()
    quick = copy.deepcopy(model)
    cpu_matmul.use_fast_matmul(quick)
    other = copy.deepcopy(quick)
    with torch.no_grad():
        other.linear.weight.zero_()
        x = drawn(1, 512, 4, 4)
        torch.testing.assert_close(quick(x), model(x))
        assert not torch.equal(quick(x), other(x))
    assert list(quick.state_dict()) == list(model.state_dict())


def test_a_layer_after_which_something_else_computes_is_not_a_plain_one():
    layer = nn.Linear(2, 2)
    assert cpu_matmul.is_plain_linear(layer)
    with layer.register_forward_hook(lambda module, inputs, output: output + 1):
        assert not cpu_matmul.is_plain_linear(layer)
    layer.forward = lambda x: x
    assert not cpu_matmul.is_plain_linear(layer)


@pytest.mark.parametrize(
    ("processor", "slow"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx avx2 avx512f", True),
        ("vendor_id : AuthenticAMD\nflags : avx avx2", False),
        ("vendor_id : GenuineIntel\nflags : avx avx2 avx512f", False),
        ("arm", False),
    ],
)
def test_maker_and_flags_decide(monkeypatch, processor, slow):
    cpu_matmul.mkl_is_slow.cache_clear()
    monkeypatch.setattr(cpu_matmul, "processor", lambda: processor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert cpu_matmul.mkl_is_slow() is slow
    monkeypatch.undo()
    cpu_matmul.mkl_is_slow.cache_clear()


def test_without_the_product_or_with_another_nothing_breaks(monkeypatch):
    for product in (lambda *_: torch.zeros(3, 4), lambda x: x):
        cpu_matmul.onednn.cache_clear()
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
        assert cpu_matmul.onednn() is None
    monkeypatch.undo()
    cpu_matmul.onednn.cache_clear()


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_and_stays_torchs(by_onednn):
    quick = Small()
    cpu_matmul.use_fast_matmul(quick)
    x = drawn(1, 512, 4, 4)
    wanted = quick(x)
    assert by_onednn
    by_onednn.clear()
    torch.testing.assert_close(torch.compile(quick, fullgraph=True)(x), wanted)
    assert not by_onednn
