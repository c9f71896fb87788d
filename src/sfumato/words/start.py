"""Words to be learned: what their vectors start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from sfumato import randomness
from sfumato.errors import ConfigError
from sfumato.numerals import pluralize
from sfumato.words.in_use import Words
from sfumato.words.known import PARTS, EncoderSite, sites_of
from sfumato.words.placeholders import MOST_VECTORS, check_placeholder, spelling

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
    sites = sites_of(source)
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


def _ids_of(words: str, site: EncoderSite, count: int) -> list[int]:
    """So many tokens of the words, from the first on and over again. Raises ConfigError for words without any."""
    ids = site.tokenizer(words, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError(f"initial words {words!r} are none; name something like it, such as 'toy'.")
    return [ids[i % len(ids)] for i in range(count)]
