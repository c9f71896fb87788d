"""Captions that vary: one alternative of each wildcard, tags in another order, tags left out; a pure function of
(seed, step, place in the batch)."""

from collections.abc import Callable, Iterator
from itertools import chain, combinations, permutations
from math import factorial, perm

from sfumato.data import captions
from sfumato.data.captions import normalize_spaces
from sfumato.data.options import Options

KeptTags = tuple[int, int]
"""How many tags of a caption stay in front, and how many at its end."""

MANY_FORMS = 4096
"""Of the wildcards of a caption; of so many the tags are not counted."""


def strip_keep_separator(caption: str, options: Options) -> tuple[str, KeptTags | None]:
    """The caption without its `keep_tags_separator`, and the tags that this keeps; None where there is none.

    As in sd-scripts, tags before the first stay in front, those after the second at the end.
    """
    first, *rest = [_split(part, options) for part in caption.split(options.keep_tags_separator.strip())]
    if not rest:
        return caption, None
    last = [*chain(*rest[1:])]
    return join_tags([*first, *rest[0], *last], options), (len(first), len(last))


def _split(caption: str, options: Options) -> list[str]:
    return [tag.strip() for tag in caption.split(options.separator.strip()) if tag.strip()]


def _split_kept(caption: str, options: Options, kept: KeptTags | None) -> tuple[list[str], list[str], list[str]]:
    """(tags that stay in front, tags that vary, tags that stay at the end)."""
    tags = _split(caption, options)
    before, after = kept or (options.keep_tags or 0, 0)
    end = len(tags) - after
    return tags[:before], tags[before:end], tags[end:]


def join_tags(tags: list[str], options: Options) -> str:
    """The tags as a caption."""
    return f"{options.separator.strip()} ".join(tags)


def unshuffled_captions(caption: str, options: Options) -> list[str]:
    """The caption as samples have it that keep all tags in their order. With wildcards several: each alternative is in
    one of them, and those that come first in the first."""
    texts = captions.covering_forms(caption) if options.wildcards else [caption]
    return list(dict.fromkeys(_clean_tags(_remove_separators(text, options)[0], options) for text in texts))


def longest_caption(caption: str, options: Options, tokens: Callable[[str], int]) -> str:
    """The same with the longest alternative of each wildcard. tokens: how many a text has."""
    text = captions.longest_form(caption, tokens) if options.wildcards else caption
    return _clean_tags(_remove_separators(text, options)[0], options)


def _remove_separators(text: str, options: Options, kept: KeptTags | None = None) -> tuple[str, KeptTags | None]:
    """A caption whose wildcards are chosen, without marks, which may have been within them; others have none left."""
    return strip_keep_separator(normalize_spaces(text), options) if options.wildcards else (text, kept)


def _clean_tags(caption: str, options: Options) -> str:
    """The caption with the parts of its tags as tags."""
    if not options.secondary_separator:
        return caption
    parts = caption.split(options.secondary_separator.strip())
    return join_tags([part.strip() for part in parts if part.strip()], options)


def vary_caption(
    caption: str, options: Options, seed: int, step: int, place: int, *, kept: KeptTags | None = None
) -> str:
    """The caption as one sample has it; the caption itself where nothing varies. kept: in place of what the options
    keep; with wildcards the caption's marks, which it still has, tell that."""
    if not caption or not (options.varies_caption or options.wildcards):
        return _clean_tags(caption, options)
    import torch

    from sfumato.utils import randomness

    if options.wildcards:
        lots = randomness.generator(seed, "wildcards", step, place)
        chosen = captions.choose_alternatives(caption, lambda count: int(torch.randint(count, (), generator=lots)))
        caption, kept = _remove_separators(chosen, options)
    if not options.varies_caption:
        return _clean_tags(caption, options)
    before, rest, after = _split_kept(caption, options, kept)
    if options.tag_dropout:
        draws = torch.rand(len(rest), generator=randomness.generator(seed, "tag dropout", step, place)).tolist()
        rest = [tag for tag, draw in zip(rest, draws, strict=True) if draw >= options.tag_dropout]
    if options.shuffle_tags:
        order = torch.randperm(len(rest), generator=randomness.generator(seed, "tag order", step, place)).tolist()
        rest = [rest[i] for i in order]
    return _clean_tags(join_tags([*before, *rest, *after], options), options)


def count_forms(caption: str, options: Options, kept: KeptTags | None = None) -> int:
    """How many captions `vary` can make of this one; how many its wildcards make, where these alone are more than
    `MANY_FORMS`."""
    if options.wildcards and (chosen := captions.count_choices(caption)) > MANY_FORMS:
        return chosen
    return sum(_count(text, options, own) for text, own in _chosen(caption, options, kept))


def caption_forms(caption: str, options: Options, kept: KeptTags | None = None) -> Iterator[str]:
    """Every caption that `vary` can make of this one; ask `count_forms` first."""
    for text, own in _chosen(caption, options, kept):
        yield from (_clean_tags(form, options) for form in _forms(text, options, own))


def _chosen(caption: str, options: Options, kept: KeptTags | None) -> Iterator[tuple[str, KeptTags | None]]:
    """The caption for each choice of its wildcards, and which of its tags are kept."""
    texts = captions.expand_wildcards(caption) if options.wildcards else [caption]
    return (_remove_separators(text, options, kept) for text in texts)


def _count(caption: str, options: Options, kept: KeptTags | None) -> int:
    if not options.varies_caption or not caption:
        return 1
    count = len(_split_kept(caption, options, kept)[1])
    if not options.tag_dropout:
        return factorial(count)
    return sum(perm(count, k) if options.shuffle_tags else perm(count, k) // factorial(k) for k in range(count + 1))


def _forms(caption: str, options: Options, kept: KeptTags | None) -> Iterator[str]:
    if not options.varies_caption or not caption:
        yield caption
        return
    before, rest, after = _split_kept(caption, options, kept)
    for size in range(len(rest) + 1) if options.tag_dropout else [len(rest)]:
        choose = permutations if options.shuffle_tags else combinations
        for tags in choose(rest, size):
            yield join_tags([*before, *tags, *after], options)
