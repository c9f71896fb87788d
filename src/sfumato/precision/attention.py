"""Attention that learns faster on a CPU in bf16: small score matrices as plain products, quick in both directions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from transformers import PreTrainedModel

LARGEST_SCORES = 20 * 2**20
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
        if not (usual and torch.is_grad_enabled() and scores * width <= LARGEST_SCORES):
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


def learn_on_cpu(module: nn.Module) -> None:
    """A U-Net gets the attention above where it has diffusers' own, a text encoder transformers' plain products."""
    processors = getattr(module, "attn_processors", {})
    if processors and all(type(processor) is AttnProcessor2_0 for processor in processors.values()):
        module.set_attn_processor(ProductAttention())  # type: ignore[operator]
    if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
        module.set_attn_implementation("eager")
