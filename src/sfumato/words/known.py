"""How a text encoder and its tokenizer know new words beside their own, and forget them again.

The tokenizer learns a word in place, for every pipeline that shares it, and is saved without it; words that diffusers'
`load_textual_inversion` adds meanwhile stay, and their rows move up into ours' place.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from torch import Tensor, nn

from sfumato.errors import ConfigError
from sfumato.precision import tensors
from sfumato.words.placeholders import check_placeholder, is_alone, pattern, spelling

if TYPE_CHECKING:
    from sfumato.words.in_use import Words

PARTS = ("text_encoder", "text_encoder_2")


@dataclass
class EncoderSite:
    """One text encoder of a pipeline or a base, without torch.compile's wrapper, and its tokenizer."""

    encoder: Any
    tokenizer: Any
    number: int
    max_tokens: int | None = None

    @property
    def token_limit(self) -> int:
        """Tokens of a prompt that are read, without both ends; see `Base.max_tokens`."""
        return self.max_tokens or int(self.encoder.config.max_position_embeddings) - 2

    @property
    def table(self) -> nn.Embedding:
        """The token embedding."""
        return cast(nn.Embedding, self.encoder.get_input_embeddings())

    @property
    def weight(self) -> Tensor:
        """The table's numbers, (tokens, width), wherever offloading has put them."""
        weight = tensors.stored(self.table, "weight")
        if weight is None or weight.is_meta:
            raise ConfigError(
                "the text encoder's token embedding is not in memory (an empty shell). Load its weights first."
            )
        return weight.detach()

    def set_words(self, words: Sequence[Words]) -> None:
        """Let the tokenizer know exactly these words besides its own."""
        tokenizer = self.tokenizer
        self._pool_at_the_end()
        if self.words:
            self._forget()
        if not words:
            return
        plain = copy.copy(tokenizer)
        tokenizer._tokenizer = copy.deepcopy(plain.backend_tokenizer)
        tokenizer._sfumato_plain, tokenizer._sfumato_words = (plain,), tuple(words)
        tokenizer._sfumato_rows = self.table.num_embeddings
        for each in words:
            each.first[self.number] = _extend(tokenizer, each.tokens)
        tokenizer.save_pretrained = partial(_save_without_words, tokenizer)

    def _pool_at_the_end(self) -> None:
        """While words are in use, pool at the end token by its number.

        The published configs say 2, on which transformers pools at the highest id: that would be a new word's.
        """
        text = getattr(self.encoder, "text_model", self.encoder)
        if not self.in_use and hasattr(text, "_sfumato_eos"):
            text.eos_token_id = text.__dict__.pop("_sfumato_eos")
        elif self.in_use and getattr(text, "eos_token_id", None) == 2 != self.tokenizer.eos_token_id:
            text._sfumato_eos, text.eos_token_id = 2, self.tokenizer.eos_token_id

    def _forget(self) -> None:
        """Put the tokenizer back as it was, but for other words that diffusers has loaded or unloaded since.

        Of a vocabulary of 49408 tokens, a word of ours with four vectors, and one of diffusers' that was loaded after
        it:

                           ours: ids      rows             diffusers': id   row      rows of the table
            before         49408-49411    beside the table 49412            49412    49413
            after          none           none             49408            49408    49409
        """
        tokenizer = self.tokenizer
        extended, others = tokenizer.backend_tokenizer, list(_others(tokenizer))
        changed = _others_changed(tokenizer) or tokenizer._sfumato_rows != self.table.num_embeddings
        tokenizer._tokenizer = tokenizer._sfumato_plain[0].backend_tokenizer
        for name in ("_sfumato_plain", "_sfumato_words", "_sfumato_rows", "save_pretrained"):
            delattr(tokenizer, name)
        if changed:
            self._close_ranks(extended, others)

    @torch.no_grad()
    def _close_ranks(self, extended: Tokenizer, others: Sequence[int]) -> None:
        """Number other words from the end of the vocabulary on, as a tokenizer does, and bring their rows there.

        others: the ids of the added tokens in `extended`, and in the table so far. In the example of `_forget` these
        are 49406 and 49407, both ends, which are of the vocabulary and stay, and 49412, whose place is 49408.
        """
        plain = self.tokenizer.backend_tokenizer
        vocabulary = plain.get_vocab_size(with_added_tokens=False)
        ids = [*range(vocabulary), *(index for index in others if index >= vocabulary)]
        places = {index: place for place, index in enumerate(ids)}
        described = json.loads(plain.to_str())
        described["added_tokens"] = [
            token | {"id": places[token["id"]]}
            for token in json.loads(extended.to_str())["added_tokens"]
            if token["id"] in places
        ]
        self.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))
        weight = self.weight
        rows = weight[[index for index in ids if index < len(weight)]]  # tokens may be added without rows
        weight[: len(rows)] = rows
        if not self.table.weight.is_meta:
            self.encoder.resize_token_embeddings(len(rows))

    @property
    def in_use(self) -> list[Words]:
        """The words that the encoder answers for, whichever tokenizer knows them."""
        found: list[Words] = self.encoder.__dict__.setdefault("_sfumato_words", [])
        return found

    @property
    def words(self) -> tuple[Words, ...]:
        """The words that the tokenizer knows besides its own."""
        return getattr(self.tokenizer, "_sfumato_words", ())

    def check(self, tokens: Mapping[str, int]) -> None:
        """Raises ConfigError for new words, of so many vectors each, that cannot be or are not told from others."""
        in_use = [(token, count) for words in self.words for token, count in words.tokens.items()]
        written_out = {token: pattern(spelling(token, self.tokenizer)) for token, count in in_use if count > 1}
        added = set(self.tokenizer.get_added_vocab())
        for token, count in tokens.items():
            check_placeholder(token, self.tokenizer)
            spelt = spelling(token, self.tokenizer)
            names = _names(spelt, count)
            # diffusers reads "word" and "word_1" as two vectors of one word.
            alike = {form for name in names for form in (name, f"{name}_1", name.removesuffix("_1"))} & added
            alike |= {other for other, place in written_out.items() if re.search(place, spelt)}
            if count > 1:
                written_out[token] = pattern(spelt)
                alike |= {other for other in added if re.search(pattern(spelt), other)}
            if alike:
                raise ConfigError(
                    f"placeholder {token} is not told from {min(alike)}, a word already; spell one of them otherwise."
                )
            added.update(names)


def _extend(tokenizer: Any, tokens: Mapping[str, int]) -> int:
    """Let a tokenizer know new tokens, of so many vectors each; returns the first new id."""
    first = len(tokenizer)
    for token, count in tokens.items():
        spelt, before = spelling(token, tokenizer), len(tokenizer)
        alone, names = is_alone(spelt), _names(spelt, count)
        tokenizer.add_tokens([AddedToken(name, normalized=True, single_word=alone, special=False) for name in names])
        if (added := len(tokenizer) - before) != count:  # it takes a piece of words for one that it has
            raise ConfigError(
                f"placeholder {token}: the tokenizer took {added} new tokens for it, not {count}; spell it otherwise."
            )
        if count > 1:
            written = normalizers.Replace(Regex(pattern(spelt)), " ".join(names))
            backend = tokenizer.backend_tokenizer
            backend.normalizer = normalizers.Sequence([backend.normalizer, written])
    return first


def _names(spelt: str, count: int) -> list[str]:
    """The tokens of a placeholder of so many vectors."""
    return [spelt] if count == 1 else [f"{spelt}_{i}" for i in range(count)]


def _others(tokenizer: Any) -> dict[int, str]:
    """The tokens by their ids that were added to a tokenizer, without the words' that it knows."""
    tokens = [pair for words in getattr(tokenizer, "_sfumato_words", ()) for pair in words.tokens.items()]
    ours = {name for token, count in tokens for name in _names(spelling(token, tokenizer), count)}
    added = {index: str(token) for index, token in sorted(tokenizer.added_tokens_decoder.items())}
    return {index: name for index, name in added.items() if name not in ours}


def _others_changed(tokenizer: Any) -> bool:
    """Whether diffusers has loaded or unloaded words of its own since the tokenizer knows ours."""
    return list(_others(tokenizer).values()) != list(_others(tokenizer._sfumato_plain[0]).values())


def _save_without_words(tokenizer: Any, *args: Any, **options: Any) -> Any:
    """As `save_pretrained` of the tokenizer, without the words: their rows are not in the encoder's table either."""
    if _others_changed(tokenizer):
        raise ConfigError(
            "words that diffusers loaded stand behind new words in use, which are not saved. Take the new ones out by "
            "remove(), or end their with block, and save then."
        )
    return tokenizer._sfumato_plain[0].save_pretrained(*args, **options)


def sites_of(source: Any) -> list[EncoderSite]:
    """The text encoders of a Base or a diffusers pipeline. Raises ConfigError for what has none."""
    if hasattr(source, "text_encoders"):
        encoders, tokenizers = source.text_encoders, source.tokenizers
    else:
        count = 1 if getattr(source, "text_encoder_2", None) is None else 2
        encoders = [getattr(source, part, None) for part in PARTS[:count]]
        tokenizers = [getattr(source, part, None) for part in ("tokenizer", "tokenizer_2")[:count]]
    if None in encoders:
        raise ConfigError("new words want a Base, or a diffusers pipeline of SD 1.x, 2.x or SDXL with text encoders.")
    if None in tokenizers:
        raise ConfigError(
            "the pipeline has no tokenizer, which new words are to be told to. Load it with its tokenizers."
        )
    return [
        EncoderSite(getattr(encoder, "_orig_mod", encoder), tokenizer, number, getattr(source, "max_tokens", None))
        for number, (encoder, tokenizer) in enumerate(zip(encoders, tokenizers, strict=True))
    ]
