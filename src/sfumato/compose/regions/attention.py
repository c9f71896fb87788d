"""Cross-attention in which every region attends to keys and values of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sfumato.compose.regions.layers import RegionChange, RegionChanges
from sfumato.compose.regions.prompts import RegionPrompts
from sfumato.compose.regions.region import Masks
from sfumato.errors import AdapterError


def check_no_picture_prompt(unet: Any) -> None:
    """Raises AdapterError for a U-Net with an IP-Adapter."""
    if getattr(unet.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise AdapterError(
            "the U-Net has an IP-Adapter, whose image is attended to where regions are told apart. Call "
            "pipe.unload_ip_adapter() first, or draw without regions."
        )


class Attention:
    """The processor of a cross-attention in which every region attends to keys and values of its own.

    keys, values: what the regions change in them.
    """

    def __init__(
        self, masks: Masks, texts: RegionPrompts, keys: RegionChanges | None, values: RegionChanges | None
    ) -> None:
        self._masks, self._texts = masks, texts
        self._keys = keys or [None] * len(texts.now)
        self._values = values or [None] * len(texts.now)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        if attention_mask is not None or encoder_hidden_states is None:
            raise AdapterError("regions want cross-attention without a mask, as Stable Diffusion has it.")
        text = encoder_hidden_states
        query = self._heads(attn, attn.to_q(hidden_states))
        outputs = self._attend(attn, query, attn.to_k(text), attn.to_v(text))
        under = self._masks.on_tokens(hidden_states.shape[1], outputs)
        shares = under / under.sum(0).clamp(min=1)
        base = outputs
        for place, own in enumerate(self._texts.now):
            key_change, value_change = self._keys[place], self._values[place]
            if own is None and key_change is None and value_change is None:
                continue
            here = text if own is None else self._with_own(text, own)
            keys = self._changed(attn.to_k, here, key_change)
            values = self._changed(attn.to_v, here, value_change)
            outputs = outputs + shares[place, :, None] * (self._attend(attn, query, keys, values) - base)
        projected: Tensor = attn.to_out[0](outputs)
        projected = attn.to_out[1](projected)
        if attn.residual_connection:
            projected = projected + hidden_states
        rescaled: Tensor = projected / attn.rescale_output_factor
        return rescaled

    def _with_own(self, text: Tensor, own: Tensor) -> Tensor:
        """The region's text in the rows with a prompt, (rows, tokens, width).

        Texts of different lengths are repeated to one: attention over the same keys twice is the same mean of values.
        """
        tokens = math.lcm(text.shape[1], own.shape[1])
        text, own = (some.repeat(1, tokens // some.shape[1], 1) for some in (text, own))
        rows = text.shape[0]
        first = self._texts.without(rows)
        own = own.to(text.device, text.dtype).expand(rows - first, -1, -1)
        return torch.cat([text[:first], own])

    @staticmethod
    def _changed(layer: nn.Module, text: Tensor, change: RegionChange | None) -> Tensor:
        output: Tensor = layer(text)
        return output if change is None else output + change.widen(change.narrow(layer, text)).to(output.dtype)

    @staticmethod
    def _heads(attn: Any, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)

    def _attend(self, attn: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        found = scaled_dot_product_attention(query, self._heads(attn, keys), self._heads(attn, values))
        return found.transpose(1, 2).flatten(2).to(query.dtype)
