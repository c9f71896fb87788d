"""What a U-Net is told about prompts, and the token ids that text encoders get for them, 75 tokens at a time.

What a folder needs beside what transformers writes today, so that earlier versions read it, too.

Since 5.6 transformers saves a CLIPTextModel without the level `text_model`. Earlier versions then draw with a random
text encoder, and only warn. Since 5.0 it saves a tokenizer as `tokenizer.json` alone, which versions before 5.0 cannot
load. InvokeAI, OneTrainer, ai-toolkit and sd-scripts take earlier versions; ComfyUI and diffusers' scripts that make
single files look for the level, too. Current versions read both (and `models.folder` does by itself).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class TextEmbedding:
    """The embeddings of some prompts, as the U-Net takes them. hidden: (batch, tokens, width). pooled: (batch, width),
    only for SDXL."""

    hidden: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: slice | Tensor | list[int]) -> TextEmbedding:
        """The embeddings of some of the prompts; an index keeps the batch dimension."""
        return TextEmbedding(self.hidden[index], None if self.pooled is None else self.pooled[index])

    def to(self, *args: Any, **kwargs: Any) -> TextEmbedding:
        """As `torch.Tensor.to`."""
        pooled = None if self.pooled is None else self.pooled.to(*args, **kwargs)
        return TextEmbedding(self.hidden.to(*args, **kwargs), pooled)

    def zeros(self) -> TextEmbedding:
        """The same shapes, filled with zeros."""
        return TextEmbedding(
            torch.zeros_like(self.hidden), None if self.pooled is None else torch.zeros_like(self.pooled)
        )

    def joined(self) -> TextEmbedding:
        """All rows, which are the chunks of one prompt, as one row: their tokens one after another, and the first
        chunk's pooled embedding."""
        return TextEmbedding(self.hidden.flatten(0, 1)[None], None if self.pooled is None else self.pooled[:1])

    def repeated(self, tokens: int) -> TextEmbedding:
        """The same with this many tokens, a multiple of its own; the tokens are repeated.

        Attention gives the same result, because each key and its value occurs as often as every other. So prompts of
        several lengths form one batch without a mask, and each gets what it would get by itself.
        """
        times = tokens // self.hidden.shape[1]
        return self if times == 1 else TextEmbedding(self.hidden.repeat(1, times, 1), self.pooled)

    @staticmethod
    def cat(parts: Sequence[TextEmbedding]) -> TextEmbedding:
        """One embedding of all prompts of the parts, in their order, `repeated` to the same number of tokens."""
        tokens = math.lcm(*(part.hidden.shape[1] for part in parts))
        pooled = [part.pooled for part in parts if part.pooled is not None]
        hidden = torch.cat([part.repeated(tokens).hidden for part in parts])
        return TextEmbedding(hidden, torch.cat(pooled) if pooled else None)


def chunk_token_ids(tokenizer: Any, ids: Sequence[int], size: int, count: int) -> list[list[int]]:
    """The ids of a prompt in `count` rows of `size` + 2: start, at most `size` of the ids, end, padding."""
    start, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    chunks = [[start, *ids[size * place : size * (place + 1)], end] for place in range(count)]
    return [chunk + [padding] * (size + 2 - len(chunk)) for chunk in chunks]


def convert_multi_vector_prompt(tokenizer: Any, prompt: str) -> str:
    """The prompt with all tokens of words of several vectors that diffusers loaded (<x> and <x>_1), as it has them.

    Our own words' tokenizers do so themselves.
    """
    added = tokenizer.get_added_vocab()
    for first in (token for token in added if f"{token}_1" in added and token in prompt and f"{token}_1" not in prompt):
        count = next(number for number in range(1, len(added) + 1) if f"{first}_{number}" not in added)
        prompt = prompt.replace(first, " ".join([first, *(f"{first}_{number}" for number in range(1, count))]))
    return prompt


_LEVEL = "text_model."


def make_portable(folder: Path, pipe: Any) -> None:
    """Give a diffusers folder, as `pipe.save_pretrained` has just left it, the names and files of earlier versions."""
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, part, None)
        weights = {} if encoder is None else encoder.state_dict()
        # SDXL's second encoder has the level in every version.
        if weights and not any(name.startswith(_LEVEL) for name in weights):
            named = {_LEVEL + name: weight for name, weight in weights.items()}
            save_file(named, folder / part / "model.safetensors", {"format": "pt"})
    for part in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, part, None)
        if tokenizer is not None:
            tokenizer.backend_tokenizer.model.save(str(folder / part))  # vocab.json and merges.txt
