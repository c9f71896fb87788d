"""What a small base's text encoder says of captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sfumato.pocket.directions import Directions, Things


def encode_text(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: Sequence[str], device: torch.device) -> Tensor:
    """(len(texts), positions, width) hidden states; each distinct text is encoded once."""
    distinct = sorted(set(texts))
    tokens = tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt").input_ids
    hidden: Tensor = encoder(tokens.to(device)).last_hidden_state
    return hidden[[distinct.index(text) for text in texts]]


def directions_of(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, things: Things, seed: int, device: torch.device
) -> Directions:
    """What each style adds to all things, as a text encoder at rest says it."""

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        return encode_text(encoder, tokenizer, texts, device)

    return Directions(encode, lambda text: len(tokenizer(text).input_ids), things, seed)
