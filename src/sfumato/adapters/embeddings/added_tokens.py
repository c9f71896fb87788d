"""How a text encoder and its tokenizer know new words beside their own, and forget them again.

The tokenizer learns a word in place, for every pipeline that shares it, and is saved without it; words that diffusers'
`load_textual_inversion` adds meanwhile stay, and their rows move up into ours' place.

New words in use: rows beside a text encoder's table, and the hooks that put them in.

A word's vectors are rows of their own, put in where the token embedding meets the word's ids. The tokenizer learns the
word, which it writes out as one token a vector, for every pipeline that shares it. Removing a word takes it and the
hooks away again; no weight was touched.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.adapters.embeddings.tokens import (
    check_placeholder,
    contains_placeholder,
    needs_word_boundary,
    normalized_spelling,
    placeholder_pattern,
    readable_token,
)
from sfumato.errors import AdapterError, ConfigError
from sfumato.precision import quantization
from sfumato.utils.formatting import pluralize

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


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
        weight = quantization.stored_tensor(self.table, "weight")
        if weight is None or weight.is_meta:
            raise ConfigError(
                "the text encoder's token embedding is not in memory (an empty shell). Load its weights first."
            )
        return weight.detach()

    def set_words(self, words: Sequence[Words]) -> None:
        """Let the tokenizer know exactly these words besides its own."""
        tokenizer = self.tokenizer
        self._pool_at_end_token()
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

    def _pool_at_end_token(self) -> None:
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
        extended, others = tokenizer.backend_tokenizer, list(_foreign_tokens(tokenizer))
        changed = _foreign_tokens_changed(tokenizer) or tokenizer._sfumato_rows != self.table.num_embeddings
        tokenizer._tokenizer = tokenizer._sfumato_plain[0].backend_tokenizer
        for name in ("_sfumato_plain", "_sfumato_words", "_sfumato_rows", "save_pretrained"):
            delattr(tokenizer, name)
        if changed:
            self._renumber_tokens(extended, others)

    @torch.no_grad()
    def _renumber_tokens(self, extended: Tokenizer, others: Sequence[int]) -> None:
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
        written_out = {
            token: placeholder_pattern(normalized_spelling(token, self.tokenizer))
            for token, count in in_use
            if count > 1
        }
        added = set(self.tokenizer.get_added_vocab())
        for token, count in tokens.items():
            check_placeholder(token, self.tokenizer)
            spelt = normalized_spelling(token, self.tokenizer)
            names = _vector_tokens(spelt, count)
            # diffusers reads "word" and "word_1" as two vectors of one word.
            alike = {form for name in names for form in (name, f"{name}_1", name.removesuffix("_1"))} & added
            alike |= {other for other, place in written_out.items() if re.search(place, spelt)}
            if count > 1:
                written_out[token] = placeholder_pattern(spelt)
                alike |= {other for other in added if re.search(placeholder_pattern(spelt), other)}
            if alike:
                raise ConfigError(
                    f"placeholder {token} is not told from {min(alike)}, a word already; spell one of them otherwise."
                )
            added.update(names)


def _extend(tokenizer: Any, tokens: Mapping[str, int]) -> int:
    """Let a tokenizer know new tokens, of so many vectors each; returns the first new id."""
    first = len(tokenizer)
    for token, count in tokens.items():
        spelt, before = normalized_spelling(token, tokenizer), len(tokenizer)
        alone, names = needs_word_boundary(spelt), _vector_tokens(spelt, count)
        tokenizer.add_tokens([AddedToken(name, normalized=True, single_word=alone, special=False) for name in names])
        if (added := len(tokenizer) - before) != count:  # it takes a piece of words for one that it has
            raise ConfigError(
                f"placeholder {token}: the tokenizer took {added} new tokens for it, not {count}; spell it otherwise."
            )
        if count > 1:
            written = normalizers.Replace(Regex(placeholder_pattern(spelt)), " ".join(names))
            backend = tokenizer.backend_tokenizer
            backend.normalizer = normalizers.Sequence([backend.normalizer, written])
    return first


def _vector_tokens(spelt: str, count: int) -> list[str]:
    """The tokens of a placeholder of so many vectors."""
    return [spelt] if count == 1 else [f"{spelt}_{i}" for i in range(count)]


def _foreign_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens by their ids that were added to a tokenizer, without the words' that it knows."""
    tokens = [pair for words in getattr(tokenizer, "_sfumato_words", ()) for pair in words.tokens.items()]
    ours = {name for token, count in tokens for name in _vector_tokens(normalized_spelling(token, tokenizer), count)}
    added = {index: str(token) for index, token in sorted(tokenizer.added_tokens_decoder.items())}
    return {index: name for index, name in added.items() if name not in ours}


def _foreign_tokens_changed(tokenizer: Any) -> bool:
    """Whether diffusers has loaded or unloaded words of its own since the tokenizer knows ours."""
    return list(_foreign_tokens(tokenizer).values()) != list(_foreign_tokens(tokenizer._sfumato_plain[0]).values())


def _save_without_words(tokenizer: Any, *args: Any, **options: Any) -> Any:
    """As `save_pretrained` of the tokenizer, without the words: their rows are not in the encoder's table either."""
    if _foreign_tokens_changed(tokenizer):
        raise ConfigError(
            "words that diffusers loaded stand behind new words in use, which are not saved. Take the new ones out by "
            "remove(), or end their with block, and save then."
        )
    return tokenizer._sfumato_plain[0].save_pretrained(*args, **options)


def text_encoder_sites(source: Any) -> list[EncoderSite]:
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


Vectors = Mapping[str, Mapping[str, Tensor]]
"""By placeholder, then by part ("text_encoder", "text_encoder_2"): (vectors, width)."""

_ASKED = "_sfumato_ids"
"""Attribute of the ids that the table is given: the ids that it was asked for, new words' among them."""
_SHORTEST, _LONGEST = 0.05, 0.95


def check_vectors(vectors: Any, name: str = "new words") -> None:
    """Raises AdapterError, which begins with `name`, for what is no `Vectors` of finite numbers."""
    wanted = "wanted {token: {part: (vectors, width)}} with finite numbers, as files have them"
    if not isinstance(vectors, Mapping) or not vectors:
        raise AdapterError(f"{name}: {wanted}; got {'none' if vectors == {} else f'a {type(vectors).__name__}'}.")
    for token, parts in vectors.items():
        if not isinstance(token, str) or not token:
            raise AdapterError(f"{name}: {token!r:.40} is no word; {wanted}.")
        if not isinstance(parts, Mapping) or not parts or not parts.keys() <= set(PARTS):
            raise AdapterError(f"{name}: {token!r:.40} has no vectors of {' or '.join(PARTS)}; {wanted}.")
        for part, rows in parts.items():
            if not isinstance(rows, Tensor) or rows.ndim != 2 or not len(rows) or not bool(rows.isfinite().all()):
                raise AdapterError(f"{name}: the vectors of {token!r:.40} for the {part} are {_short(rows)}; {wanted}.")


def check_widths(sites: Sequence[EncoderSite], vectors: Vectors, name: str = "new words") -> None:
    """Raises AdapterError, which begins with `name`, for vectors that are not of the width of each of the encoders."""
    widths = {part: site.table.embedding_dim for part, site in zip(PARTS, sites, strict=False)}
    for token, parts in vectors.items():
        found = {part: rows.shape[1] for part, rows in parts.items()}
        if found != widths:
            theirs, ours = (" and ".join(map(str, each.values())) for each in (found, widths))
            raise AdapterError(
                f"{name}: {token} has vectors of width {theirs}, and this base's text encoder takes {ours}. "
                "Use an embedding that was trained for this family."
            )


def _short(rows: Any) -> str:
    return f"of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"


class Words(nn.Module):
    """New words in use by a base or a diffusers pipeline; a context manager that takes them out again.

    rows: one parameter an encoder, (all vectors, width) fp32, the words' vectors in the order of `tokens`.
    tokens: the placeholders and how many vectors each has. first: each encoder's first new token id.
    """

    def __init__(self, source: Any, vectors: Vectors):
        super().__init__()
        check_vectors(vectors)
        self._sites = text_encoder_sites(source)
        check_widths(self._sites, vectors)
        self._handles: list[RemovableHandle] = []
        self.tokens = {token: len(next(iter(parts.values()))) for token, parts in vectors.items()}
        self.first = [0] * len(self._sites)
        self.rows = nn.ParameterList()
        for site, part in zip(self._sites, PARTS, strict=False):
            values = torch.cat([parts[part] for parts in vectors.values()])
            self.rows.append(nn.Parameter(values.to(site.weight.device, torch.float32, copy=True)))
        self.attach()

    def attach(self) -> None:
        """Bring the words into use; `Words` does so when it is made."""
        if self._handles:
            return
        for site in self._sites:
            site.check(self.tokens)
            if any(words not in site.words for words in site.in_use):
                raise ConfigError(
                    "the text encoder has new words of another pipeline that shares it, with a tokenizer of its own. "
                    "Load all words into one of them before the other is made of it."
                )
            if any(words not in site.in_use for words in site.words):
                raise ConfigError(
                    "the tokenizer has new words of another pipeline that shares it, with a text encoder of its own. "
                    "Take them out by remove(), give this one a copy.deepcopy(pipe.tokenizer), and load them again."
                )
        try:
            for number, site in enumerate(self._sites):
                site.in_use.append(self)
                site.set_words([*(words for words in site.words if words is not self), self])
                self._handles += self._hook(site, number)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the words out: tokenizer and text encoder are what they were. The vectors stay, and can be attached.

        Words that diffusers loaded meanwhile stay, too.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for site in self._sites:
            if self in (*site.in_use, *site.words):
                site.in_use[:] = [words for words in site.in_use if words is not self]
                site.set_words([words for words in site.words if words is not self])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block nothing knows the words."""
        in_use = bool(self._handles)
        self.remove()
        try:
            yield
        finally:
            if in_use:
                self.attach()

    def __enter__(self) -> Words:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _hook(self, site: EncoderSite, number: int) -> list[RemovableHandle]:
        table = site.table
        return [
            site.encoder.register_forward_pre_hook(partial(_check_table, table)),
            table.register_forward_pre_hook(partial(self._before, number)),
            table.register_forward_hook(partial(self._after, number)),
        ]

    def _before(self, number: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        known = torch.where(self._places(number, inputs[0]) >= 0, 0, inputs[0])
        setattr(known, _ASKED, getattr(inputs[0], _ASKED, inputs[0]))
        return (known, *inputs[1:])

    def _after(self, number: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        place = self._places(number, getattr(inputs[0], _ASKED)).to(output.device)
        rows = self.rows[number].to(output.device, output.dtype)
        return torch.where((place >= 0).unsqueeze(-1), F.embedding(place.clamp(min=0), rows), output)

    def _places(self, number: int, ids: Tensor) -> Tensor:
        """Which of the rows each id is, -1 for one that is none of theirs."""
        place = ids - self.first[number]
        return torch.where((place >= 0) & (place < len(self.rows[number])), place, -1)

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled pipeline has copies of its words, for good, and nothing of the first pipeline."""
        return {**self.__dict__, "_sites": [], "_handles": []}

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ConfigError, with the count, for a prompt with a word in it that has more tokens than are read."""
        for prompt in dict.fromkeys(prompts):
            inside = [token for token in self.tokens if contains_placeholder(token, prompt)]
            for site in self._sites if inside else []:
                count = len(site.tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids)
                if count > site.token_limit:
                    of = ", ".join(f"{token} has {self.tokens[token]}" for token in inside)
                    raise ConfigError(
                        f"{prompt[:60]!r}: {count} tokens ({of}), and {site.token_limit} are read. "
                        "Shorten the prompt, or learn fewer vectors."
                    )

    def vectors(self) -> dict[str, dict[str, Tensor]]:
        """The words' vectors, copied to the CPU: by placeholder, then by part."""
        found: dict[str, dict[str, Tensor]] = {token: {} for token in self.tokens}
        for rows, part in zip(self.rows, PARTS, strict=False):
            pieces = torch.split(rows.detach().cpu().clone(), list(self.tokens.values()))
            for token, piece in zip(self.tokens, pieces, strict=True):
                found[token][part] = piece
        return found

    @torch.no_grad()
    def copy_from(self, token: str, parts: Mapping[str, Tensor], name: str) -> None:
        """Take a word's vectors from those of a file of this name. Raises AdapterError where they do not fit."""
        held = self.vectors()
        theirs, ours = ({part: tuple(rows.shape) for part, rows in each.items()} for each in (parts, held[token]))
        if theirs != ours:
            (count, width), (wanted, own) = next(iter(theirs.values())), next(iter(ours.values()))
            raise AdapterError(
                f"{name}: {token} has {pluralize(count, 'vector')} of width {width}, this run learns {wanted} of width "
                f"{own}. Give its own --word-vectors, and its own base."
            )
        held[token] = dict(parts)
        for rows, part in zip(self.rows, PARTS, strict=False):
            rows.copy_(torch.cat([each[part].to(rows) for each in held.values()]))

    def zero_missing_gradients(self) -> None:
        """Zeros where no caption held a word: processes that met other captions sum the same tensors."""
        for rows in self.rows:
            if rows.requires_grad and rows.grad is None:
                rows.grad = torch.zeros_like(rows)

    @torch.no_grad()
    def keep_scale(self) -> None:
        """Bring vectors that are longer or shorter than nearly all of the table's back to where its 5 % or 95 % lie.

        A vector far outside drowns the rest of the prompt. Rows that do not learn, by `requires_grad`, stay: a running
        mean that is to be saved may be shorter.
        """
        for rows, (low, high) in zip(self.rows, self._lengths, strict=True):
            if not rows.requires_grad:
                continue
            largest = rows.abs().amax(dim=1, keepdim=True)
            rows.div_(torch.where(largest > 1e15, largest, 1.0))  # whose squares would be infinite
            norm = rows.norm(dim=1, keepdim=True)
            rows.mul_(norm.clamp(low, high) / norm.clamp(min=1e-12))

    @cached_property
    def _lengths(self) -> list[tuple[float, float]]:
        return [_quantiles(site.weight) for site in self._sites]

    @torch.no_grad()
    def nearest(self, count: int = 3, *, encoder: int = 0) -> dict[str, list[list[tuple[str, float]]]]:
        """The table's words nearest to each vector of one of the encoders, with the cosines, by placeholder."""
        site, found = self._sites[encoder], {}
        table = F.normalize(site.weight.float(), dim=1)
        cosines = F.normalize(self.rows[encoder].detach().to(table.device), dim=1) @ table.T
        best = cosines.topk(count, dim=1)
        lines = [
            [(readable_token(site.tokenizer, index), value) for index, value in zip(indices, values, strict=True)]
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        for token, vectors in self.tokens.items():
            found[token], lines = lines[:vectors], lines[vectors:]
        return found

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(rows.numel() for rows in self.rows)

    def report(self) -> list[str]:
        """`nearest` in a line a vector of each encoder, and how long the vector is beside the mean of its table."""
        return [line for encoder in range(len(self._sites)) for line in self._report(encoder)]

    def _report(self, encoder: int) -> list[str]:
        mean = float(self._sites[encoder].weight.float().norm(dim=1).mean())
        lengths = iter((self.rows[encoder].detach().norm(dim=1) / mean).tolist())
        part = f" in {PARTS[encoder]}" if len(self._sites) > 1 else ""
        return [
            f"{token} {number} of {len(vectors)}{part}: {', '.join(f'{word} {cosine:.2f}' for word, cosine in words)}; "
            f"{next(lengths):.2f} of the mean length"
            for token, vectors in self.nearest(encoder=encoder).items()
            for number, words in enumerate(vectors, start=1)
        ]


def _check_table(table: nn.Embedding, encoder: Any, _: Any) -> None:
    if encoder.get_input_embeddings() is not table:
        raise ConfigError(
            "the text encoder's token embedding was replaced, as unload_textual_inversion() of diffusers does, while "
            "new words are in use. Take them out by remove(), or end their with block, and bring them back by attach()."
        )


def _quantiles(table: Tensor) -> tuple[float, float]:
    norms = table.float().norm(dim=1).sort().values
    last = len(norms) - 1
    return float(norms[round(_SHORTEST * last)]), float(norms[round(_LONGEST * last)])
