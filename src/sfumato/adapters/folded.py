"""A frozen layer and its LoRA as one product, y = (W + s B A) x + b, where that takes fewer multiplications.

As two branches, a layer of `in` numbers to `out` and an update of rank r cost 3 r (in + out) multiplications a row
beside the layer's own: A x and B A x, the gradients of A and B, and those of both branches' inputs. As one product
the update is in the forward pass and in the input's gradient for nothing but r in out a step, and its own gradients
follow either from A x and B' dy, 2 r (in + out) a row, or from the layer's whole gradient, in out a row, whichever is
less. A layer of the pocket base is no wider than a few ranks, and has many more rows than numbers; at the inner levels
of a large U-Net it is the other way round. Values and gradients are those of two branches to fp32 rounding.
`python -m bench.folded` measures both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.imagined import Imagined
from sfumato.precision import products
from sfumato.precision.products import Geometry

aten = torch.ops.aten


def folded(host: nn.Linear | nn.Conv2d, down: Tensor, up: Tensor, scale: float, x: Tensor) -> Tensor | None:
    """What the layer and its update make of x; None where two branches are the way.

    host: the frozen layer. down, up: A and B, with (rank, in) and (out, rank), or as convolutions' weights. Two
    branches are the way where they multiply less, under autocast, and where the layer is not an fp32 one of torch's.
    """
    weight = host.weight
    if not is_plain(host, x) or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        return None
    geometry = geometry_of(host)
    out, inner = len(weight), weight[0].numel()
    if _rows(x, host) * (inner + out) <= 2 * inner * out:  # the changed weight is made twice
        return None
    result: Tensor = _Folded.apply(x, weight, host.bias, down, up, scale, geometry)  # type: ignore[no-untyped-call]
    return result


def is_plain(host: nn.Linear | nn.Conv2d, x: Tensor) -> bool:
    """Whether the layer is a frozen fp32 one of torch's, and x such that it computes in fp32 without autocast."""
    if type(host) is nn.Conv2d:
        usual = host.groups == 1 and host.padding_mode == "zeros" and not isinstance(host.padding, str)
        usual = usual and x.ndim == 4
    else:
        usual = type(host) is nn.Linear
    if not usual:  # the weight of a quantised layer is made each time it is asked for
        return False
    frozen = not host.weight.requires_grad and not (host.bias is not None and host.bias.requires_grad)
    # Of other classes are quantised weights, which call themselves fp32; a forecast computes with imagined ones.
    kinds = (nn.Parameter, Tensor, Imagined)
    return frozen and x.dtype == host.weight.dtype == torch.float32 and type(host.weight) in kinds


def geometry_of(host: nn.Linear | nn.Conv2d) -> Geometry | None:
    """(stride, padding, dilation) of a convolution; None for a linear layer."""
    if isinstance(host, nn.Linear):
        return None
    return host.stride, host.padding, host.dilation  # type: ignore[return-value]


def _rows(x: Tensor, host: nn.Linear | nn.Conv2d) -> int:
    """Of all samples together: tokens of a linear layer's input, pixels of a convolution's output."""
    if isinstance(host, nn.Linear):
        return x.numel() // x.shape[-1]
    down, right = host.stride
    return len(x) * (x.shape[2] // down) * (x.shape[3] // right)


class _Folded(torch.autograd.Function):
    """Keeps the input, as two branches would, and no changed weight: that is made again for the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        geometry: Geometry | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale, ctx.geometry = scale, geometry
        return product(x, _changed(weight, down, up, scale), bias, geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight, down, up), geometry = grads, ctx.saved_tensors, ctx.geometry
        of_x, learns = ctx.needs_input_grad[0], ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        out, inner, rank = len(weight), weight[0].numel(), len(down)
        by_whole = learns and out * inner <= 2 * rank * (out + inner)
        changed = _changed(weight, down, up, ctx.scale) if of_x else weight
        found, whole = gradients(grad, x, changed, geometry, (of_x, by_whole))
        if not learns:
            return found, None, None, None, None, None, None
        if whole is not None:
            whole = whole.flatten(1)
            of_down, of_up = up.flatten(1).t() @ whole, whole @ down.flatten(1).t()
        else:
            low = product(x, down, None, geometry)
            of_low, of_up = _through(grad, low, up.flatten(1), geometry)
            of_down = gradients(of_low, x, down, geometry, (False, True))[1]
        return found, None, None, of_down.mul_(ctx.scale).view_as(down), of_up.mul_(ctx.scale).view_as(up), None, None


def _changed(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A."""
    return torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1), alpha=scale).view_as(weight)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """The layer's output, a linear one's without a geometry."""
    if geometry is None:
        return products.linear(x, weight, bias)
    quick = products.convolve(x, weight, bias, geometry, 1)
    return F.conv2d(x, weight, bias, *geometry) if quick is None else quick


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry | None, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of the layer's input and of its weight, from that of its output; those that are wanted."""
    of_x, of_weight = wanted
    if geometry is not None and any(wanted):
        mask = [of_x, of_weight, False]
        found = aten.convolution_backward(grad, x, weight, None, *geometry, False, [0, 0], 1, mask)
        return found[0], found[1]
    return (
        products.linear(grad, weight.t()) if of_x else None,
        products.linear(_as_rows(grad).t(), _as_rows(x).t()) if of_weight else None,
    )


def _through(grad: Tensor, low: Tensor, up: Tensor, geometry: Geometry | None) -> tuple[Tensor, Tensor]:
    """The gradients of `low` and of `up` from that of what `up` makes of it; up: (out, rank)."""
    if geometry is None:
        return products.linear(grad, up.t()), products.linear(_as_rows(grad).t(), _as_rows(low).t())
    pixels = grad.flatten(2)
    of_up = torch.bmm(pixels, low.flatten(2).transpose(1, 2)).sum(0)
    return (up.t() @ pixels).view_as(low), of_up


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
