"""New words in use: rows beside a text encoder's table, and the hooks that put them in.

A word's vectors are rows of their own, put in where the token embedding meets the word's ids. The tokenizer learns the
word, which it writes out as one token a vector, for every pipeline that shares it. Removing a word takes it and the
hooks away again; no weight was touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import AdapterError, ConfigError
from sfumato.numerals import pluralize
from sfumato.words.known import PARTS, EncoderSite, sites_of
from sfumato.words.placeholders import holds, readable_token

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

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
        self._sites = sites_of(source)
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
            inside = [token for token in self.tokens if holds(token, prompt)]
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
