"""New words: vectors that a text encoder uses for a placeholder, beside its embedding table, which stays unchanged.

    with embedding.load(pipe, "otter.safetensors", token="<otter>"):
        pipe("a <otter> in the snow")

Textual Inversion (Gal et al. 2022) learns such vectors; `trainers/textual_inversion.py` trains what `new_words` makes.
`sfumato.adapters.embeddings.added_tokens` describes how a word is added, and removed without a trace.

A pipeline that shares the tokenizer but not the text encoder has no vectors for these words. Give it a tokenizer of its
own before (`copy.deepcopy(pipe.tokenizer)`). Otherwise it cannot use words itself, and fails at a prompt with one of
these. No error can say so earlier, because pipelines that share a tokenizer do not know each other. A copied or pickled
pipeline keeps copies of its words for good.

A pipeline that is saved while words are in use is saved without them. Words that diffusers' `load_textual_inversion`
adds meanwhile stay; their rows move up into the place of ours.

Words to be learned: what their vectors start from.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.adapters.embeddings.added_tokens import (
    PARTS,
    EncoderSite,
    Vectors,
    Words,
    check_vectors,
    check_widths,
    text_encoder_sites,
)
from sfumato.adapters.embeddings.tokens import MAX_VECTORS, check_placeholder, normalized_spelling
from sfumato.errors import AdapterError, ConfigError
from sfumato.utils import randomness
from sfumato.utils.formatting import pluralize

if TYPE_CHECKING:
    from os import PathLike

    from sfumato.models import Base, TextEmbedding


Start = Literal["words", "random", "mean"]


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
    sites = text_encoder_sites(source)
    for name, texts in {"placeholders": placeholders, "initial": initial}.items():
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{name} {texts!r:.60}: wanted a list of texts, such as ['otter'].")
    _check_placeholders(placeholders, sites, vectors)
    if start not in get_args(Start):
        raise ConfigError(f"start {start!r:.40}: wanted one of {', '.join(get_args(Start))}.")
    if start == "words" and len(initial) not in (1, len(placeholders)):
        raise ConfigError(
            f"{pluralize(len(initial), 'initial word')} for {pluralize(len(placeholders), 'placeholder')}; give "
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


def _check_placeholders(placeholders: Sequence[str], sites: Sequence[EncoderSite], vectors: int) -> None:
    """Raises ConfigError for placeholders that cannot be learned beside each other, with so many vectors each."""
    if not isinstance(vectors, int) or not 1 <= vectors <= MAX_VECTORS:
        raise ConfigError(f"{vectors!r:.40} vectors for a placeholder; wanted 1 to {MAX_VECTORS}.")
    if not placeholders or len({token.lower() for token in placeholders}) < len(placeholders):
        raise ConfigError(f"placeholders {', '.join(placeholders) or 'none'}: wanted one or more, each of its own.")
    for token in placeholders:
        inside = [other for other in placeholders if other != token and other.lower() in token.lower()]
        if inside:
            raise ConfigError(f"placeholder {token} has {inside[0]} within it; give each a spelling of its own.")
        for site in sites:
            check_placeholder(token, site.tokenizer)
            if vectors > 1 and (spelt := normalized_spelling(token, site.tokenizer)) != token:
                raise ConfigError(
                    f"placeholder {token}: the tokenizer reads {spelt}, and of a word spelt otherwise diffusers finds "
                    f"the first vector alone; write {spelt}."
                )


def _ids_of(words: str, site: EncoderSite, count: int) -> list[int]:
    """So many tokens of the words, from the first on and over again. Raises ConfigError for words without any."""
    ids = site.tokenizer(words, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError(f"initial words {words!r} are none; name something like it, such as 'toy'.")
    return [ids[i % len(ids)] for i in range(count)]


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
    from sfumato.files.adapter_file import merge_embeddings

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
    for site in text_encoder_sites(source) if known is None else []:
        try:
            site.check(counts)
        except ConfigError as error:
            raise AdapterError(f"{label}: a word of its file cannot be used: {error}") from None


def _in_use(source: Any, token: str) -> Mapping[str, Tensor] | None:
    """The vectors of a word that is in use, by part; None if it is not in use."""
    site = text_encoder_sites(source)[0]
    for words in site.words:
        for other, parts in words.vectors().items():
            if normalized_spelling(other, site.tokenizer) == normalized_spelling(token, site.tokenizer):
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
    check_widths(text_encoder_sites(source), vectors, name)
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
