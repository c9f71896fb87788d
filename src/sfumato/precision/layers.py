"""A U-Net that keeps less between its forward and backward pass, at the same values and the same gradients.

torch keeps a convolution's input even where its weight is frozen, and then only the input's shape is used; the output
of a normalisation for the SiLU after it, although the normalisation's input, which is kept too, gives it again; and the
gate of a gated GELU beside what both came from. Where a gated GELU's projection is frozen, its output, the largest that
a U-Net makes, is computed twice instead of kept: a twentieth of a step's time. `bench/lean.py` measures what is left.

Attention that learns faster on a CPU in bf16: small score matrices as plain products, quick in both directions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sfumato.precision import cpu_matmul

aten = torch.ops.aten


class _FrozenConvolution(torch.autograd.Function):
    """Keeps the weight, in the dtype it is stored in, and not the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.geometry = x.shape, x.dtype, geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (weight,) = grads, ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        shape_only = grad.new_empty(1).expand(ctx.shape)
        found, _, _ = aten.convolution_backward(
            grad, shape_only, weight.to(grad.dtype), None, stride, padding, dilation, False, [0, 0], groups,
            [True, False, False],
        )  # fmt: skip
        return found.to(ctx.dtype), None, None, None, None, None, None


class _NormThenSilu(torch.autograd.Function):
    """silu(group_norm(x)) that keeps x and each group's mean and deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        size = (len(x), x.shape[1], x[0, 0].numel(), groups)
        normal, mean, deviation = aten.native_group_norm(x, weight, bias, *size, eps)
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        ctx.size, ctx.eps = size, eps
        return F.silu(normal, inplace=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, mean, deviation = ctx.saved_tensors
        normal = aten.native_group_norm(x, weight, bias, *ctx.size, ctx.eps)[0]
        grad = aten.silu_backward(grads[0], normal)
        wanted = list(ctx.needs_input_grad[:3])
        found = aten.native_group_norm_backward(grad, x, mean, deviation, weight, *ctx.size, wanted)
        return *found, None, None


def _gated(both: Tensor) -> Tensor:
    """a gelu(b) of the halves of the last side."""
    hidden, gate = both.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def _gated_gradient(grad: Tensor, both: Tensor) -> Tensor:
    """The gradient of both halves, from that of `_gated`."""
    hidden, gate = both.chunk(2, dim=-1)
    return torch.cat([grad * F.gelu(gate), aten.gelu_backward(grad * hidden, gate)], dim=-1)


class _GatedGelu(torch.autograd.Function):
    """a gelu(b) that keeps the tensor whose halves a and b are."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return _gated(both)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (both,) = ctx.saved_tensors
        return _gated_gradient(grads[0], both)


class _ProjectedGelu(torch.autograd.Function):
    """a gelu(b) of (a, b) = projection of x, which is done again in the backward pass: its output is eight times x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _gated(cpu_matmul.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        gradient = _gated_gradient(grads[0], cpu_matmul.linear(x, weight, bias))
        return cpu_matmul.linear(gradient, weight.t()), None, None


def _convolve(geometry: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    *taps, groups = geometry
    quick = cpu_matmul.convolve(x, weight, bias, (taps[0], taps[1], taps[2]), groups)
    if quick is not None:
        return quick
    if torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad:
        result: Tensor = _FrozenConvolution.apply(x, weight, bias, *geometry)  # type: ignore[no-untyped-call]
        return result
    return F.conv2d(x, weight, bias, *geometry)


def _norm_then_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    usual = x.device.type in ("cpu", "meta") and not torch.is_autocast_enabled("cpu") and x.is_contiguous()
    if not (usual and torch.is_grad_enabled() and x.requires_grad):
        return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
    result: Tensor = _NormThenSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)  # type: ignore[no-untyped-call]
    return result


def _silu_of_time(x: Tensor) -> Tensor:
    """A block's activation where its normalisations have it already: only the time embedding is left."""
    return F.silu(x) if x.ndim == 2 else x


def _gated_gelu(proj: nn.Module, x: Tensor) -> Tensor:
    frozen = cpu_matmul.is_plain_linear(proj) and not proj.weight.requires_grad
    if frozen and torch.is_grad_enabled() and x.requires_grad and not torch.is_autocast_enabled(x.device.type):
        projected: Tensor = _ProjectedGelu.apply(x, proj.weight, proj.bias)  # type: ignore[no-untyped-call]
        return projected
    result: Tensor = _GatedGelu.apply(proj(x))  # type: ignore[no-untyped-call]
    return result


def save_activation_memory(unet: nn.Module) -> None:
    """Let a U-Net's layers keep less; its modules, their names and their weights are what they were."""
    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            geometry = (module.stride, module.padding, module.dilation, module.groups)
            module._conv_forward = partial(_convolve, geometry)  # type: ignore[method-assign]
        elif isinstance(module, GEGLU):
            module.forward = partial(_gated_gelu, module.proj)
        elif isinstance(module, ResnetBlock2D) and _is_supported_block(module):
            for norm in (module.norm1, module.norm2):
                norm.forward = partial(_norm_then_silu, norm)
            module.nonlinearity.forward = _silu_of_time


def _is_supported_block(block: Any) -> bool:
    norms = all(type(norm) is nn.GroupNorm for norm in (block.norm1, block.norm2))
    return norms and type(block.nonlinearity) is nn.SiLU and block.time_embedding_norm == "default"


MAX_SCORES = 20 * 2**20
"""Bytes of a score matrix up to which two products and a softmax beat torch's fused attention, backward included.

Measured by `bench/cpu_training.py`; beyond the processor's cache the fused kernel wins, which never stores the scores.
"""


class ProductAttention(AttnProcessor2_0):  # type: ignore[misc]  # diffusers has no types
    """Softmax(Q K^T / sqrt(d)) V written out wherever a gradient is wanted and the scores are small on a CPU.

    Everything else, drawing included, goes the way of diffusers' own processor, to the same bits.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *arguments: Any,
        **more: Any,
    ) -> Tensor:
        """(rows, tokens, width) hidden states, and the text's in cross-attention; the same shape back."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        usual = attention_mask is None and hidden_states.ndim == 3 and attn.group_norm is None and not attn.norm_cross
        scores = hidden_states.shape[0] * attn.heads * hidden_states.shape[1] * text.shape[1]
        width = 2 if torch.is_autocast_enabled("cpu") else hidden_states.element_size()
        if not (usual and torch.is_grad_enabled() and scores * width <= MAX_SCORES):
            usual_way: Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, *arguments, **more
            )
            return usual_way
        query, key, value = (
            attn.head_to_batch_dim(layer(x))
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        # Scaling the queries and not the scores takes less time, and the scores' gradient is never scaled.
        shares = ((query * attn.scale) @ key.mT).softmax(-1).to(value.dtype)
        hidden = attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(shares @ value)))
        hidden = hidden + hidden_states if attn.residual_connection else hidden
        result: Tensor = hidden / attn.rescale_output_factor
        return result


def use_cpu_training_attention(module: nn.Module) -> None:
    """A U-Net gets the attention above where it has diffusers' own, a text encoder transformers' plain products."""
    processors = getattr(module, "attn_processors", {})
    if processors and all(type(processor) is AttnProcessor2_0 for processor in processors.values()):
        module.set_attn_processor(ProductAttention())  # type: ignore[operator]
    if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
        module.set_attn_implementation("eager")
