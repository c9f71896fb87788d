"""Layer norms whose weights learn in bf16 on a CPU: their gradients are summed in fp32.

torch 2.13 sums them in bf16, to which a row more soon adds nothing: over 4,096 rows the bias gets two thirds of its
gradient, over 16,384, such as four images of 512 px in a U-Net's first block, a fifth.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten


class _LayerNorm(torch.autograd.Function):
    """Layer normalization over the last side, with torch's values and torch's gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        normal, mean, deviation = aten.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        result: Tensor = normal
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        x, weight, bias, mean, deviation = ctx.saved_tensors
        of_x = aten.native_layer_norm_backward(
            grad, x, weight.shape, mean, deviation, weight, bias, [ctx.needs_input_grad[0], False, False]
        )[0]
        normal = (x.float() - mean) * deviation
        rows = tuple(range(x.ndim - 1))
        return of_x, (grad * normal).sum(rows), grad.sum(rows, dtype=torch.float32), None


def _forward(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    sums_in_bf16 = x.dtype == torch.bfloat16 and norm.weight.requires_grad and torch.is_grad_enabled()
    if not sums_in_bf16 or torch.compiler.is_compiling():  # whose kernels sum in fp32
        return nn.LayerNorm.forward(norm, x)
    result: Tensor = _LayerNorm.apply(x, norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
    return result


def use_fp32_norm_gradients(model: nn.Module) -> None:
    """Let a model's layer norms sum so wherever their weights learn; what they draw keeps its bits."""
    for module in model.modules():
        usual = type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and module.bias is not None
        if usual and "forward" not in vars(module):
            module.forward = partial(_forward, module)  # type: ignore[arg-type]
