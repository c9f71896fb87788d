"""What every kind of update is to the layer beside which it learns.

A frozen layer and an update that is a matrix of the weight's shape, such as a Kronecker product.

In fp32 they are one product, y = (W + delta) x + b. In half precision W + delta would round most of delta away, so that
W x and delta x are added there. Between the passes x is kept and nothing of the weight's size: the matrix, and what its
factors' gradients need of it, are made again for the way back, as a LoRA's is in `sfumato.adapters.layers`.

A frozen layer and its LoRA as one product, y = (W + s B A) x + b, where that takes fewer multiplications.

As two branches, a layer of `in` numbers to `out` and an update of rank r cost 3 r (in + out) multiplications a row
beside the layer's own: A x and B A x, the gradients of A and B, and those of both branches' inputs. As one product
the update is in the forward pass and in the input's gradient for nothing but r in out a step, and its own gradients
follow either from A x and B' dy, 2 r (in + out) a row, or from the layer's whole gradient, in out a row, whichever is
less. A layer of the pocket base is no wider than a few ranks, and has many more rows than numbers; at the inner levels
of a large U-Net it is the other way round. Values and gradients are those of two branches to fp32 rounding.
`python -m bench.folded` measures both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sfumato.files.kinds import Change
from sfumato.precision import cpu_matmul
from sfumato.precision.cpu_matmul import Geometry
from sfumato.precision.fake_tensors import FakeTensor

aten = torch.ops.aten


def fused_output(host: nn.Linear | nn.Conv2d, down: Tensor, up: Tensor, scale: float, x: Tensor) -> Tensor | None:
    """What the layer and its update make of x; None where two branches are the way.

    host: the frozen layer. down, up: A and B, with (rank, in) and (out, rank), or as convolutions' weights. Two
    branches are the way where they multiply less, under autocast, and where the layer is not an fp32 one of torch's.
    """
    weight = host.weight
    if not is_fusable(host, x) or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        return None
    geometry = geometry_of(host)
    out, inner = len(weight), weight[0].numel()
    if _rows(x, host) * (inner + out) <= 2 * inner * out:  # the changed weight is made twice
        return None
    result: Tensor = _FusedLora.apply(x, weight, host.bias, down, up, scale, geometry)  # type: ignore[no-untyped-call]
    return result


def is_fusable(host: nn.Linear | nn.Conv2d, x: Tensor) -> bool:
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
    kinds = (nn.Parameter, Tensor, FakeTensor)
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


class _FusedLora(torch.autograd.Function):
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
        return layer_output(x, _merged_weight(weight, down, up, scale), bias, geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight, down, up), geometry = grads, ctx.saved_tensors, ctx.geometry
        of_x, learns = ctx.needs_input_grad[0], ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        out, inner, rank = len(weight), weight[0].numel(), len(down)
        by_whole = learns and out * inner <= 2 * rank * (out + inner)
        changed = _merged_weight(weight, down, up, ctx.scale) if of_x else weight
        found, whole = gradients(grad, x, changed, geometry, (of_x, by_whole))
        if not learns:
            return found, None, None, None, None, None, None
        if whole is not None:
            whole = whole.flatten(1)
            of_down, of_up = up.flatten(1).t() @ whole, whole @ down.flatten(1).t()
        else:
            low = layer_output(x, down, None, geometry)
            of_low, of_up = _factor_gradients(grad, low, up.flatten(1), geometry)
            of_down = gradients(of_low, x, down, geometry, (False, True))[1]
        return found, None, None, of_down.mul_(ctx.scale).view_as(down), of_up.mul_(ctx.scale).view_as(up), None, None


def _merged_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A."""
    return torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1), alpha=scale).view_as(weight)


def layer_output(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """The layer's output, a linear one's without a geometry."""
    if geometry is None:
        return cpu_matmul.linear(x, weight, bias)
    quick = cpu_matmul.convolve(x, weight, bias, geometry, 1)
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
        cpu_matmul.linear(grad, weight.t()) if of_x else None,
        cpu_matmul.linear(_as_rows(grad).t(), _as_rows(x).t()) if of_weight else None,
    )


def _factor_gradients(grad: Tensor, low: Tensor, up: Tensor, geometry: Geometry | None) -> tuple[Tensor, Tensor]:
    """The gradients of `low` and of `up` from that of what `up` makes of it; up: (out, rank)."""
    if geometry is None:
        return cpu_matmul.linear(grad, up.t()), cpu_matmul.linear(_as_rows(grad).t(), _as_rows(low).t())
    pixels = grad.flatten(2)
    of_up = torch.bmm(pixels, low.flatten(2).transpose(1, 2)).sum(0)
    return (up.t() @ pixels).view_as(low), of_up


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


BaseLayer = nn.Linear | nn.Conv2d


def is_plain_fp32(host: BaseLayer, x: Tensor) -> bool:
    """Whether the layer is a frozen fp32 one of torch's, and called so that it computes in fp32."""
    return not (torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()) and is_fusable(host, x)


def adapted_output(layer: UpdateLayer, host: BaseLayer, x: Tensor) -> Tensor:
    """(W + delta) x + b."""
    return _product(layer, host, host.bias, x, whole=True)


def update_output(layer: UpdateLayer, host: BaseLayer, x: Tensor) -> Tensor:
    """delta x, in autocast's dtype; without one, as a frozen text encoder in half precision is called, in fp32."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return _product(layer, host, None, x.to(dtype), whole=False)


def _product(layer: UpdateLayer, host: BaseLayer, bias: Tensor | None, x: Tensor, *, whole: bool) -> Tensor:
    geometry, strength, factors = geometry_of(host), layer.strength, layer.factors()
    made: Tensor = _Product.apply(x, host.weight, bias, layer, strength, geometry, whole, *factors)  # type: ignore[no-untyped-call]
    return made


def _matrix(layer: UpdateLayer, strength: float, weight: Tensor, factors: list[Tensor], whole: bool) -> Tensor:
    """W + strength delta, or without W: fp32 whatever autocast says, of factors that are fp32."""
    with torch.autocast(weight.device.type, enabled=False):
        delta = layer.delta(weight, *factors)
        return torch.add(weight, delta, alpha=strength) if whole else delta * strength


class _Product(torch.autograd.Function):
    """Keeps the input and the factors, and no matrix of the weight's size."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: UpdateLayer,
        strength: float,
        geometry: Geometry | None,
        whole: bool,
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *factors)
        ctx.made_of = layer, strength, geometry, whole
        return layer_output(x, _matrix(layer, strength, weight, list(factors), whole).to(x.dtype), bias, geometry)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight, *factors) = grads, ctx.saved_tensors
        layer, strength, geometry, whole = ctx.made_of
        of_x, learn = ctx.needs_input_grad[0], ctx.needs_input_grad[7:]
        with torch.enable_grad():  # on copies of its own, so that nothing flows further than to the factors
            again = [factor.detach().requires_grad_(wanted) for factor, wanted in zip(factors, learn, strict=True)]
            matrix = _matrix(layer, strength, weight, again, whole)
        with torch.autocast(x.device.type, enabled=False):
            found, of_matrix = gradients(grad, x, matrix.detach().to(x.dtype), geometry, (of_x, any(learn)))
        of_factors: Iterator[Tensor] = iter(())
        if of_matrix is not None:
            wanted = [factor for factor in again if factor.requires_grad]
            of_factors = iter(torch.autograd.grad(matrix, wanted, of_matrix.to(matrix.dtype).view_as(matrix)))
        by_factor = [next(of_factors) if wanted else None for wanted in learn]
        return found, None, None, None, None, None, None, *by_factor


class UpdateLayer(nn.Module):
    """A trained change of one frozen weight, in fp32 whatever the model's dtype is, which begins as none.

    kind: of its `Change`, a key of `sfumato.files.kinds.KINDS`, or "DoRA", "DoRA of LoHa", ... rank: of its factors.
    scale: what their product is multiplied with. strength: how often the whole change counts, see `Attached.scaled`.
    """

    kind: str
    rank: int
    scale: float
    strength: float = 1.0

    def factors(self) -> tuple[Tensor, ...]:
        """What is trained, in the order in which `delta` takes it."""
        raise NotImplementedError

    def delta(self, weight: Tensor, *factors: Tensor) -> Tensor:
        """What these factors add to the frozen `weight`: fp32, of its shape; torch knows the gradients."""
        raise NotImplementedError

    def together(self, host: BaseLayer, x: Tensor) -> Tensor | None:
        """What the layer and its update make of x as one product; None where each has its own, see `forward`."""
        return adapted_output(self, host, x) if is_plain_fp32(host, x) else None

    def forward(self, host: BaseLayer, x: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The update's share of the layer's output, for the layer's input x.

        drop: leaves ranks out of what is within the update, see `Attached.dropped_ranks`. A matrix has none of its own,
        and so its rows are left out, as by LyCORIS: its outputs.
        """
        share = update_output(self, host, x)
        return share if drop is None else drop(share)

    def ups(self) -> tuple[nn.Parameter, ...]:
        """The factors B, which LoRA+ gives a rate of their own; none where no factor is what B is to A."""
        return ()

    def norm(self, host: BaseLayer) -> Tensor:
        """The Frobenius norm of the update, as a file will have it; of no elements, on the layer's device."""
        norm: Tensor = torch.linalg.vector_norm(self.delta(host.weight, *self.factors()))
        return norm

    @torch.no_grad()
    def limit_norm(self, host: BaseLayer, most: float) -> Tensor:
        """Shrink the factors, all by one ratio, where the update's norm is larger than `most`; whether it was.

        Max norm regularization as sd-scripts has it (scale_weight_norms). Waits for no GPU.
        """
        factors = self.factors()
        norm = self.norm(host)
        ratio = (most / norm.clamp(min=most)) ** (1 / len(factors))
        for factor in factors:
            factor.mul_(ratio)
        return norm > most

    def change(self) -> Change:
        """The update as files have it; it shares the factors' memory, and does not know `strength`."""
        raise NotImplementedError

    def load(self, change: Change, where: str) -> None:
        """Start from a change of this kind. where: whose it is, which an AdapterError for another shape begins with."""
        raise NotImplementedError


def init_uniform(*shape: int, generator: torch.Generator) -> nn.Parameter:
    """A factor that starts uniform in +-1 / sqrt(inputs), as PyTorch and peft start a linear layer or a convolution."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * bound)
