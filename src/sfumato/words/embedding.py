"""New words: vectors that a text encoder uses for a placeholder, beside its embedding table, which stays unchanged.

    with embedding.load(pipe, "otter.safetensors", token="<otter>"):
        pipe("a <otter> in the snow")

Textual Inversion (Gal et al. 2022) learns such vectors; `trainers/textual_inversion.py` trains what `new_words` makes.
`sfumato.words.in_use` describes how a word is added, and removed without a trace.

A pipeline that shares the tokenizer but not the text encoder has no vectors for these words. Give it a tokenizer of its
own before (`copy.deepcopy(pipe.tokenizer)`). Otherwise it cannot use words itself, and fails at a prompt with one of
these. No error can say so earlier, because pipelines that share a tokenizer do not know each other. A copied or pickled
pipeline keeps copies of its words for good.

A pipeline that is saved while words are in use is saved without them. Words that diffusers' `load_textual_inversion`
adds meanwhile stay; their rows move up into the place of ours.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.errors import AdapterError, ConfigError
from sfumato.words.in_use import Vectors, Words, check_vectors, check_widths
from sfumato.words.known import sites_of
from sfumato.words.placeholders import spelling
from sfumato.words.start import Start, new_words

if TYPE_CHECKING:
    from os import PathLike

    from sfumato.bases import Base, TextEmbedding

__all__ = ["Start", "Vectors", "Words", "bundled", "encode", "fitting", "is_in_use", "load", "new_words", "read"]


def load(source: Any, path: str | PathLike[str], token: str | None = None) -> Words:
    """Load the words of an embedding file into `source`, until `remove()` or the end of a `with` block.

    source: a Base, or a diffusers pipeline of SD 1.x, 2.x or SDXL. path: a safetensors file, as this package, diffusers
    or a web interface writes it. token: the placeholder, for a file with one word; by default the file's own, or the
    file's name if it has none. Raises FileError for a file that is not a safetensors file (a .pt is a pickle, which can
    run programs), AdapterError for one that does not fit this base model, and ConfigError for a word that is one
    already.
    """
    found = read(path, token)
    name = Path(path).name
    vectors = fitting(source, found, name)
    if known := [word for word, parts in vectors.items() if is_in_use(source, word, parts)]:
        raise ConfigError(
            f"{name}: prompts know {', '.join(known)} already, with these vectors. To load the file anew, remove() "
            "what load gave before."
        )
    try:
        words = Words(source, vectors)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error} A file's word is named by token= (TOKEN=FILE).") from None
    return words.requires_grad_(False)


@contextmanager
def bundled(
    source: Any, found: Mapping[str, Vectors], *, partial: bool = False, quiet: bool = False
) -> Iterator[Words | None]:
    """Within the block the words that adapters bring are in use. Yields them; None if there are none to add.

    found: by the labels of the adapters that count. Words that are in use already with the same vectors stay as they
    are. partial: leave out words that cannot be used here, with a line on stderr for each unless quiet. Raises
    AdapterError if two adapters bring different vectors for one word and, without partial, for words that cannot be
    used.
    """
    from sfumato.files.embedding_file import merge_embeddings

    if not isinstance(found, Mapping):
        raise ConfigError(f"wanted new words by label, as mix.embeddings has them, got a {type(found).__name__}.")
    for label, vectors in found.items():
        if vectors != {}:
            check_vectors(vectors, label)
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
    words = {token: parts for token, parts in merge_embeddings(usable).items() if not is_in_use(source, token, parts)}
    if not words:
        yield None
        return
    with Words(source, words).requires_grad_(False) as made:
        yield made


def _check_usable(source: Any, counts: Mapping[str, int], token: str, parts: Mapping[str, Tensor], label: str) -> None:
    """Raise AdapterError, with the adapter's label, for a word of its file that `source` cannot use.

    counts: number of vectors of this word, and of each word that was found usable before it.
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
    """The vectors of a word that is in use, by part; None if it is not in use."""
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
    """The words of an embedding file: {token: {"text_encoder" | "text_encoder_2": (vectors, width)}}.

    token: another name for the only word of the file. Beside `learned_embeds.safetensors` its second half for SDXL,
    `learned_embeds_2.safetensors`, is read, too: diffusers' textual_inversion_sdxl.py writes the two.
    """
    from sfumato.files import read_embedding

    file = read_embedding(path)
    found = {key: dict(parts) for key, parts in file.embeddings.items()}
    named = re.fullmatch(r"learned_embeds(-steps-\d+)?\.safetensors", file.path.name)
    second = file.path.with_name(f"learned_embeds_2{named[1] or ''}.safetensors") if named else file.path
    if named and second.is_file():
        for key, parts in read_embedding(second).embeddings.items():
            found[key] = {**parts, **found.get(key, {})}
    if token is None:
        return found
    if len(found) != 1:
        raise AdapterError(f"{file.path.name}: holds {len(found)} words ({', '.join(found)}), so it cannot be {token}.")
    return {token: next(iter(found.values()))}


def fitting(source: Any, vectors: Vectors, name: str) -> dict[str, dict[str, Tensor]]:
    """The vectors by the parts that `source` has. Raises AdapterError if they do not all have the width of its
    encoders."""
    check_widths(sites_of(source), vectors, name)
    return {token: dict(parts) for token, parts in vectors.items()}


def encode(base: Base, captions: Sequence[str], *, grad: bool = False) -> TextEmbedding:
    """The embeddings of the captions; each distinct caption is encoded once. "" gives the base model's "no prompt".

    grad: whether gradients flow into the trained parts of the text encoders. None flow through the zeros that SDXL has
    for "".
    """
    distinct = list(dict.fromkeys(captions))
    encoded = [caption for caption in distinct if caption or not base.zeros_for_empty_prompt]
    parts = [base.encode_text(encoded, grad=grad)] if encoded else []
    if len(encoded) < len(distinct):
        parts.append(base.unconditional(1))
    places = {caption: place for place, caption in enumerate(encoded)}
    return type(parts[0]).cat(parts)[[places.get(caption, len(encoded)) for caption in captions]]
