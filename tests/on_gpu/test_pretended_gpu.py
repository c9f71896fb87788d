"""The pretended GPU: it refuses what a GPU refuses, takes what one takes, and has the dtypes of CUDA's autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.pretended_gpu import pretended_gpu


@pytest.mark.parametrize(
    "operation",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here.T,
        lambda here, there: torch.cat([there, here]),
        lambda here, there: torch.where(there > 0, there, here),
        lambda here, there: there.add_(here),
        lambda here, there: F.linear(there, here),
        lambda here, there: here[there.long()],
        lambda here, there: there.numpy(),
        lambda here, there: there.normal_(generator=torch.Generator()),
        lambda here, there: torch.randn(2, generator=torch.Generator("cuda")),
    ],
)
def test_what_a_gpu_refuses_is_refused(operation):
    with pretended_gpu(), pytest.raises((RuntimeError, TypeError), match=r"two devices|numpy|for generator"):
        operation(torch.ones(2, 3), torch.ones(2, 3, device="cuda"))


def test_what_a_gpu_takes_of_the_cpu_is_taken():
    with pretended_gpu():
        there = torch.arange(6.0).to("cuda")
        assert (there * torch.tensor(2.0))[torch.tensor([5, 0])].tolist() == [10, 0]
        assert there.copy_(torch.ones(6)).device == torch.empty(6).copy_(there).to(there).device
        assert there.to("cuda") is there.cuda() is there
        assert there.cpu().numpy().sum() == there.sum().item() == 6
        assert torch.zeros_like(there, device="cpu").device.type == "cpu"
        assert torch.rand(3, generator=torch.Generator("cuda").manual_seed(1), device="cuda").is_cuda


def test_apples_have_no_fp64():
    with pretended_gpu("mps"):
        there = torch.ones(2, device="mps")
        assert there.device.type == "mps"
        assert there.cpu().double().sum() == 2
        for wide in (lambda: there.double(), lambda: torch.ones(2, dtype=torch.float64).to("mps")):
            with pytest.raises(TypeError, match="float64"):
                wide()


def test_gradients_go_back_over_both_moves_and_a_module_keeps_its_parameters():
    with pretended_gpu():
        start = torch.ones(3, requires_grad=True)
        (start.to("cuda").square().cpu() * 2).sum().backward()
        assert start.grad.tolist() == [4, 4, 4]
        layer = nn.Linear(3, 2)
        before = layer.weight
        layer.to("cuda", torch.float16)
        assert layer.weight is before
        assert layer.weight.is_cuda
        assert layer.weight.dtype == torch.float16


def test_autocast_has_the_dtypes_of_cudas():
    """torch's table of operations for CUDA, of which the CPU's differs."""
    with pretended_gpu(), torch.autocast("cuda", torch.float16):
        x = torch.ones(2, 4, 8, 8, device="cuda", dtype=torch.float16)
        assert torch.is_autocast_enabled("cuda")
        assert F.conv2d(x.float(), torch.ones(1, 4, 1, 1, device="cuda")).dtype == torch.float16
        assert {f.dtype for f in (F.group_norm(x, 2), F.layer_norm(x, (8,)), x.softmax(1), x.sum(), x**2)} == {
            torch.float32
        }
        assert F.silu(x).dtype == torch.float16
