"""New words: vectors that a text encoder takes for a placeholder, beside its table, which stays as it is.

    with embedding.load(pipe, "otter.safetensors", token="<otter>"):
        pipe("a <otter> in the snow")

Textual Inversion (Gal et al. 2022) learns such vectors; `trainers/textual_inversion.py` trains what `new_words` makes.

A word's vectors are rows of their own, put in where the token embedding meets the word's ids. The tokenizer learns the
word, which it writes out as one token a vector, for every pipeline that shares it. Removing a word takes it and the
hooks away again; no weight was touched.

A pipeline that shares the tokenizer and not the text encoder has no rows for them: give it a tokenizer of its own
(`copy.deepcopy(pipe.tokenizer)`) before. Without, it takes no words itself, and fails at a prompt with one of these: of
the pipelines that share a tokenizer none knows another, so nothing can say so earlier. A copied or pickled pipeline has
copies of its words, for good.

A pipeline that is saved while words are in use is saved without them. Words that diffusers' `load_textual_inversion`
adds meanwhile stay: their rows move up into ours' place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato import randomness
from sfumato.errors import AdapterError, ConfigError
from sfumato.numerals import so_many
from sfumato.words.known import PARTS, Site, sites_of
from sfumato.words.placeholders import MOST_VECTORS, check_placeholder, holds, shown, spelling

if TYPE_CHECKING:
    from os import PathLike

    from torch.utils.hooks import RemovableHandle

    from sfumato.bases import Base, TextEmbedding

Start = Literal["words", "random", "mean"]
Vectors = Mapping[str, Mapping[str, Tensor]]
"""By placeholder, then by part ("text_encoder", "text_encoder_2"): (vectors, width)."""

_ASKED = "_sfumato_ids"
"""Attribute of the ids that the table is given: the ids that it was asked for, new words' among them."""
_SHORTEST, _LONGEST = 0.05, 0.95


class Words(nn.Module):
    """New words in use by a base or a diffusers pipeline; a context manager that takes them out again.

    rows: one parameter an encoder, (all vectors, width) fp32, the words' vectors in the order of `tokens`.
    tokens: the placeholders and how many vectors each has. first: each encoder's first new token id.
    """

    def __init__(self, source: Any, vectors: Vectors):
        super().__init__()
        self._sites = sites_of(source)
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
        for number, site in enumerate(self._sites):
            site.in_use.append(self)
            site.know([*(words for words in site.words if words is not self), self])
            self._handles += self._hook(site, number)

    def remove(self) -> None:
        """Take the words out: tokenizer and text encoder are what they were. The vectors stay, and can be attached.

        Words that diffusers loaded meanwhile stay, too.
        """
        for handle in self._handles:
            handle.remove()
        if self._handles:
            for site in self._sites:
                site.in_use.remove(self)
                site.know([words for words in site.words if words is not self])
        self._handles = []

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

    def _hook(self, site: Site, number: int) -> list[RemovableHandle]:
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
        """Raises ConfigError, with the count, for a prompt with a word in it that has more tokens than positions."""
        for prompt in dict.fromkeys(prompts):
            inside = [token for token in self.tokens if holds(token, prompt)]
            for site in self._sites if inside else []:
                count = len(site.tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids)
                limit = int(site.encoder.config.max_position_embeddings) - 2
                if count > limit:
                    of = ", ".join(f"{token} has {self.tokens[token]}" for token in inside)
                    raise ConfigError(
                        f"{prompt[:60]!r}: {count} tokens ({of}), and the text encoder has {limit} positions. "
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
                f"{name}: {token} has {so_many(count, 'vector')} of width {width}, this run learns {wanted} of width "
                f"{own}. Give its own --word-vectors, and its own base."
            )
        held[token] = dict(parts)
        for rows, part in zip(self.rows, PARTS, strict=False):
            rows.copy_(torch.cat([each[part].to(rows) for each in held.values()]))

    def settle_gradients(self) -> None:
        """Zeros where no caption held a word: processes that met other captions sum the same tensors."""
        for rows in self.rows:
            if rows.requires_grad and rows.grad is None:
                rows.grad = torch.zeros_like(rows)

    @torch.no_grad()
    def keep_scale(self) -> None:
        """Bring vectors that are longer or shorter than nearly all of the table's back to where its 5 % or 95 % lie.

        A vector far outside drowns the rest of the prompt.
        """
        for rows, (low, high) in zip(self.rows, self._lengths, strict=True):
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
            [(shown(site.tokenizer, index), value) for index, value in zip(indices, values, strict=True)]
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


def new_words(
    source: Any,
    placeholders: Sequence[str],
    *,
    vectors: int = 1,
    start: Start = "mean",
    initial: Sequence[str] = (),
    seed: int = 0,
) -> Words:
    """Words to be learned, in use by `source` (a Base, or a diffusers pipeline of SD 1.x, 2.x or SDXL).

    vectors: of each placeholder, 1 to 16. start: "words" copies the rows of the words in `initial`, one entry for all
    placeholders or one for each, from its first token on and over again where it has fewer tokens than vectors;
    "random" copies rows drawn from the table; "mean" is the mean of all rows, at their mean length.
    Raises ConfigError for a placeholder that is a token already, and for capitals in one of several vectors.
    """
    sites = sites_of(source)
    for name, texts in {"placeholders": placeholders, "initial": initial}.items():
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{name} {texts!r:.60}: wanted a list of texts, such as ['otter'].")
    _check_placeholders(placeholders, sites, vectors)
    if start not in get_args(Start):
        raise ConfigError(f"start {start!r:.40}: wanted one of {', '.join(get_args(Start))}.")
    if start == "words" and len(initial) not in (1, len(placeholders)):
        raise ConfigError(
            f"{so_many(len(initial), 'initial word')} for {so_many(len(placeholders), 'placeholder')}; give "
            "one for all, or one for each."
        )
    made: dict[str, dict[str, Tensor]] = {}
    for place, token in enumerate(placeholders):
        made[token] = {}
        for site, part in zip(sites, PARTS, strict=False):
            rows = site.weight.float().cpu()
            if start == "words":
                chosen = _ids_of(initial[place if len(initial) > 1 else 0], site, vectors)
                made[token][part] = rows[chosen]
            elif start == "random":
                chosen = randomness.permutation(len(rows), seed, f"words/{token}/{part}")
                made[token][part] = rows[chosen[:vectors]]
            else:
                mean = F.normalize(rows.mean(0), dim=0) * rows.norm(dim=1).mean()
                made[token][part] = mean.expand(vectors, -1)
    return Words(source, made)


def _check_placeholders(placeholders: Sequence[str], sites: Sequence[Site], vectors: int) -> None:
    """Raises ConfigError for placeholders that cannot be learned beside each other, with so many vectors each."""
    if not isinstance(vectors, int) or not 1 <= vectors <= MOST_VECTORS:
        raise ConfigError(f"{vectors!r:.40} vectors for a placeholder; wanted 1 to {MOST_VECTORS}.")
    if not placeholders or len({token.lower() for token in placeholders}) < len(placeholders):
        raise ConfigError(f"placeholders {', '.join(placeholders) or 'none'}: wanted one or more, each of its own.")
    for token in placeholders:
        inside = [other for other in placeholders if other != token and other.lower() in token.lower()]
        if inside:
            raise ConfigError(f"placeholder {token} has {inside[0]} within it; give each a spelling of its own.")
        for site in sites:
            check_placeholder(token, site.tokenizer)
            if vectors > 1 and (spelt := spelling(token, site.tokenizer)) != token:
                raise ConfigError(
                    f"placeholder {token}: the tokenizer reads {spelt}, and of a word spelt otherwise diffusers finds "
                    f"the first vector alone; write {spelt}."
                )


def _ids_of(words: str, site: Site, count: int) -> list[int]:
    """So many tokens of the words, from the first on and over again. Raises ConfigError for words without any."""
    ids = site.tokenizer(words, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError(f"initial words {words!r} are none; name something like it, such as 'toy'.")
    return [ids[i % len(ids)] for i in range(count)]


def load(source: Any, path: str | PathLike[str], token: str | None = None) -> Words:
    """The words of an embedding's file, in use by `source` until `remove()` or the end of a `with` block.

    source: a Base, or a diffusers pipeline of SD 1.x, 2.x or SDXL. path: a safetensors file, as this package, diffusers
    or a web interface writes it. token: the placeholder, for a file with one word; the file's own by default, or the
    file's name where it has none. Raises FileError for a file that is no safetensors file (a .pt is a pickle, which can
    run programs) and AdapterError for one that does not fit this base.
    """
    vectors = fitting(source, read(path, token), Path(path).name)
    try:
        words = Words(source, vectors)
    except ConfigError as error:
        raise ConfigError(f"{Path(path).name}: {error} A file's word is named by token= (TOKEN=FILE).") from None
    return words.requires_grad_(False)


@contextmanager
def bundled(
    source: Any, found: Mapping[str, Vectors], *, partial: bool = False, quiet: bool = False
) -> Iterator[Words | None]:
    """Within the block the words are in use that adapters bring with them; None where they bring none.

    found: by the labels of the adapters that count. Words that are in use with the same vectors already stay as they
    are. partial: leave out words that cannot be used here, with a line on stderr each, if not quiet. Raises
    AdapterError where two mean different things by one word, and, without partial, for words that cannot be used.
    """
    from sfumato.files.embedding_file import united

    if not isinstance(found, Mapping):
        raise ConfigError(f"wanted new words by label, as mix.embeddings has them, got a {type(found).__name__}.")
    usable: dict[str, dict[str, Mapping[str, Tensor]]] = {label: {} for label in found}
    counts: dict[str, int] = {}
    for label, token, parts in ((label, *word) for label, vectors in found.items() for word in vectors.items()):
        count = len(next(iter(parts.values())))
        try:
            _check_usable(source, {**counts, token: count}, token, parts, label)
        except AdapterError as error:
            if not partial:
                raise AdapterError(f"{error} With --partial (partial=True) the word is left out.") from None
            if not quiet:
                print(f"{error} The word is left out (--partial).", file=sys.stderr)
            continue
        usable[label][token] = parts
        if _in_use(source, token) is None:
            counts[token] = count
    words = {token: parts for token, parts in united(usable).items() if not is_in_use(source, token, parts)}
    if not words:
        yield None
        return
    with Words(source, words).requires_grad_(False) as made:
        yield made


def _check_usable(source: Any, counts: Mapping[str, int], token: str, parts: Mapping[str, Tensor], label: str) -> None:
    """Raises AdapterError, with the adapter's label, for a word of its file that cannot be used by `source`.

    counts: vectors of this word and of those that were found usable before it.
    """
    fitting(source, {token: parts}, label)
    known = _in_use(source, token)
    if known is not None and not is_in_use(source, token, parts):
        raise AdapterError(f"{label}: brings other vectors for {token} than those in use; leave one of them out.")
    for site in sites_of(source) if known is None else []:
        try:
            site.check(counts)
        except ConfigError as error:
            raise AdapterError(f"{label}: a word of its file cannot be used: {error}") from None


def _in_use(source: Any, token: str) -> Mapping[str, Tensor] | None:
    """The vectors of a word that is in use, by part; None if it is not."""
    site = sites_of(source)[0]
    for words in site.words:
        for other, parts in words.vectors().items():
            if spelling(other, site.tokenizer) == spelling(token, site.tokenizer):
                return parts
    return None


def is_in_use(source: Any, token: str, parts: Mapping[str, Tensor]) -> bool:
    """Whether a word is in use with these vectors."""
    known = _in_use(source, token) or {}
    return known.keys() == parts.keys() and all(torch.equal(known[part], parts[part].float()) for part in parts)


def read(path: str | PathLike[str], token: str | None = None) -> dict[str, dict[str, Tensor]]:
    """{token: {"text_encoder" | "text_encoder_2": (vectors, width)}} of an embedding's file.

    token: what its one word is called instead.
    """
    from sfumato.files import read_embedding

    file = read_embedding(path)
    found = {key: dict(parts) for key, parts in file.embeddings.items()}
    if token is None:
        return found
    if len(found) != 1:
        raise AdapterError(f"{file.path.name}: holds {len(found)} words ({', '.join(found)}), so it cannot be {token}.")
    return {token: next(iter(found.values()))}


def fitting(source: Any, vectors: Vectors, name: str) -> dict[str, dict[str, Tensor]]:
    """The vectors by the parts that `source` has. Raises AdapterError where they are not all of its encoders' width."""
    widths = {part: site.table.embedding_dim for part, site in zip(PARTS, sites_of(source), strict=False)}
    for token, parts in vectors.items():
        found = {part: rows.shape[1] for part, rows in parts.items()}
        if found != widths:
            theirs, ours = (" and ".join(map(str, each.values())) for each in (found, widths))
            raise AdapterError(
                f"{name}: {token} has vectors of width {theirs}, and this base's text encoder takes {ours}. "
                "Use an embedding that was trained for this family."
            )
    return {token: dict(parts) for token, parts in vectors.items()}


def encode(base: Base, captions: Sequence[str], *, grad: bool = False) -> TextEmbedding:
    """The captions' embeddings, each distinct one encoded once; "" as the base has "no prompt".

    grad: whether gradients flow into what is trained of the text encoders. Zeros, which are SDXL's "", pass none on.
    """
    distinct = list(dict.fromkeys(captions))
    encoded = [caption for caption in distinct if caption or not base.zeros_for_empty_prompt]
    parts = [base.encode_text(encoded, grad=grad)] if encoded else []
    if len(encoded) < len(distinct):
        parts.append(base.unconditional(1))
    places = {caption: place for place, caption in enumerate(encoded)}
    return type(parts[0]).cat(parts)[[places.get(caption, len(encoded)) for caption in captions]]


def _quantiles(table: Tensor) -> tuple[float, float]:
    norms = table.float().norm(dim=1).sort().values
    last = len(norms) - 1
    return float(norms[round(_SHORTEST * last)]), float(norms[round(_LONGEST * last)])
