"""A frozen layer and an update that is a matrix of the weight's shape, such as a Kronecker product.

In fp32 they are one product, y = (W + delta) x + b. In half precision W + delta would round most of delta away, so that
W x and delta x are added there. Between the passes x is kept and nothing of the weight's size: the matrix, and what its
factors' gradients need of it, are made again for the way back, as a LoRA's is in `sfumato.adapters.folded`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sfumato.adapters.folded import geometry_of, gradients, is_plain, product
from sfumato.precision.products import Geometry

if TYPE_CHECKING:
    from sfumato.adapters.layer import UpdateLayer

Host = nn.Linear | nn.Conv2d


def is_exact(host: Host, x: Tensor) -> bool:
    """Whether the layer is a frozen fp32 one of torch's, and called so that it computes in fp32."""
    return not (torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()) and is_plain(host, x)


def changed(layer: UpdateLayer, host: Host, x: Tensor) -> Tensor:
    """(W + delta) x + b."""
    return _product(layer, host, host.bias, x, whole=True)


def share(layer: UpdateLayer, host: Host, x: Tensor) -> Tensor:
    """delta x, in autocast's dtype; without one, as a frozen text encoder in half precision is called, in fp32."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return _product(layer, host, None, x.to(dtype), whole=False)


def _product(layer: UpdateLayer, host: Host, bias: Tensor | None, x: Tensor, *, whole: bool) -> Tensor:
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
        return product(x, _matrix(layer, strength, weight, list(factors), whole).to(x.dtype), bias, geometry)

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
