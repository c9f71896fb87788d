"""Embeddings of prompts with weighted words, by the library compel: in its own syntax or, past its parser, A1111's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sfumato.errors import ConfigError, SfumatoError
from sfumato.models.base import Base
from sfumato.models.prompts.editing import Stage, prompt_stages
from sfumato.models.prompts.syntax import (
    Syntax,
    check_no_trailing_weight,
    compel_error,
    error_reason,
    import_compel,
    parse_prompt_attention,
)
from sfumato.models.text import TextEmbedding


def encode_prompts(
    base: Base, prompts: Sequence[str], negative: str, syntax: Syntax
) -> tuple[TextEmbedding, TextEmbedding]:
    """The embeddings of the prompts, and of the negative prompt for each: (batch, tokens, width), equal in tokens.

    Raises ConfigError where compel is not installed, cannot read a prompt, or does not know the base's clip skip.
    """
    encoders = _encoders(base)
    texts = [parse_prompt_attention(text) if syntax == "a1111" else text for text in (*prompts, negative)]
    hidden, pooled = [], []
    for encoder in encoders:
        found = [_encoded(encoder, text) for text in texts]
        hidden.append(torch.cat(encoder.pad_conditioning_tensors_to_same_length([first for first, _ in found])))
        pooled = [second for _, second in found if second is not None]
    whole = TextEmbedding(torch.cat(hidden, dim=-1), torch.cat(pooled) if pooled else None)
    count = len(prompts)
    other = whole[[count] * count]
    return whole[:count], other.zeros() if not negative and base.zeros_for_empty_prompt else other


def encode_stages(base: Base, prompts: Sequence[str], negative: str, steps: int) -> list[Stage]:
    """What A1111's prompts, and the negative prompt for each, tell the U-Net until which of the steps.

    One stage where no words change, as of `encode`; raises what that raises.
    """
    for prompt in prompts:
        check_no_trailing_weight(prompt)
    by_text = [prompt_stages(text, steps) for text in (*prompts, negative)]
    lasts = sorted({last for parts in by_text for last, _ in parts})
    said = [[next(text for end, text in parts if last <= end) for parts in by_text] for last in lasts]
    distinct = list(dict.fromkeys(text for texts in said for text in (texts if negative else texts[:-1])))
    whole, other = encode_prompts(base, distinct, "", "a1111")
    found = []
    for last, (*texts, without) in zip(lasts, said, strict=True):
        text = whole[[distinct.index(each) for each in texts]]
        count = len(texts)
        found.append(Stage(last, text, whole[[distinct.index(without)] * count] if negative else other[[0] * count]))
    return found


def _encoded(compel: Any, text: str | list[tuple[str, float]]) -> tuple[Any, Any]:
    """(hidden, pooled or None) of one prompt, (1, tokens, width) and (1, width). A list is texts and their weights."""
    try:
        with torch.no_grad():
            found = compel([text]) if isinstance(text, str) else _encode_pieces(compel, text)
    except SfumatoError:
        raise
    except Exception as error:  # its parser raises pyparsing's errors and its own
        if isinstance(text, str):
            raise compel_error(text, error) from None
        whole = "".join(words for words, _ in text)
        raise ConfigError(
            f"the prompt {whole[:60]!r} cannot be encoded by compel ({error_reason(error)}). Shorten it."
        ) from None
    return (found[0], found[1]) if isinstance(found, tuple | list) else (found, None)


def _encode_pieces(compel: Any, pieces: list[tuple[str, float]]) -> tuple[Any, Any]:
    """The same past compel's parser, to which `c++`, quotes and `.swap(` would say more than they do in A1111.

    What BREAK parts is encoded by itself, 75 tokens or a multiple of them; the pooled embedding is of the first part.
    """
    from compel.prompt_parser import Conjunction, FlattenedPrompt

    chunks: list[list[tuple[str, float]]] = [[]]
    for piece in pieces:
        if piece[0] == "BREAK":
            chunks.append([])
        else:
            chunks[-1].append(piece)
    if len(chunks) > 1 and not chunks[-1]:  # where BREAK ends the prompt, A1111 begins nothing behind it
        chunks.pop()
    prompts = Conjunction([FlattenedPrompt(chunk or [("", 1.0)]) for chunk in chunks])
    hidden, _ = compel.build_conditioning_tensor_for_conjunction(prompts)
    if not compel.requires_pooled:
        return hidden, None
    whole = "".join(text for text, _ in chunks[0])
    return hidden, compel.conditioning_provider.get_pooled_embeddings([whole], device=compel.device)


class _WithTextModel:
    """A text encoder with the level `text_model`, which transformers 5.6 dropped and compel still looks for."""

    def __init__(self, encoder: Any) -> None:
        self._encoder, self.text_model = encoder, getattr(encoder, "text_model", encoder)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._encoder(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)


def _encoders(base: Base) -> list[Any]:
    """A compel for each text encoder."""
    compel = import_compel()
    kind = compel.ReturnedEmbeddingsType
    is_sdxl = len(base.text_encoders) > 1
    kinds = {
        (False, 0): kind.LAST_HIDDEN_STATES_NORMALIZED,
        (False, 1): kind.PENULTIMATE_HIDDEN_STATES_NORMALIZED,
        (True, 0): kind.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
    }
    if (is_sdxl, base.clip_skip or 0) not in kinds:
        raise ConfigError(f"--clip-skip {base.clip_skip} does not go with --prompt-syntax; leave one of them.")
    last = len(base.text_encoders) - 1
    return [
        compel.Compel(
            tokenizer=tokenizer,
            text_encoder=_WithTextModel(encoder),
            returned_embeddings_type=kinds[is_sdxl, base.clip_skip or 0],
            requires_pooled=is_sdxl and place == last,
            truncate_long_prompts=False,
            device=str(base.precision.device),
        )
        for place, (tokenizer, encoder) in enumerate(zip(base.tokenizers, base.text_encoders, strict=True))
    ]
