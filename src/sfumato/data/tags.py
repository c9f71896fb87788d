"""Captions that vary: tags in another order, tags left out; a pure function of (seed, step, place in the batch)."""

from collections.abc import Iterator
from itertools import chain, combinations, permutations
from math import factorial, perm

from sfumato.data.options import Options

KeptTags = tuple[int, int]
"""How many tags of a caption stay in front, and how many at its end."""


def without_marks(caption: str, options: Options) -> tuple[str, KeptTags | None]:
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


def vary(caption: str, options: Options, seed: int, step: int, place: int, *, kept: KeptTags | None = None) -> str:
    """The caption as one sample has it; the caption itself where nothing varies. kept: in place of what the options
    keep."""
    if not options.varies_caption or not caption:
        return caption
    import torch

    from sfumato import randomness

    before, rest, after = _split_kept(caption, options, kept)
    if options.tag_dropout:
        draws = torch.rand(len(rest), generator=randomness.generator(seed, "tag dropout", step, place)).tolist()
        rest = [tag for tag, draw in zip(rest, draws, strict=True) if draw >= options.tag_dropout]
    if options.shuffle_tags:
        order = torch.randperm(len(rest), generator=randomness.generator(seed, "tag order", step, place)).tolist()
        rest = [rest[i] for i in order]
    return join_tags([*before, *rest, *after], options)


def count_forms(caption: str, options: Options, kept: KeptTags | None = None) -> int:
    """How many captions `vary` can make of this one."""
    if not options.varies_caption or not caption:
        return 1
    count = len(_split_kept(caption, options, kept)[1])
    if not options.tag_dropout:
        return factorial(count)
    return sum(perm(count, k) if options.shuffle_tags else perm(count, k) // factorial(k) for k in range(count + 1))


def forms(caption: str, options: Options, kept: KeptTags | None = None) -> Iterator[str]:
    """Every caption that `vary` can make of this one; ask `count_forms` first."""
    if not options.varies_caption or not caption:
        yield caption
        return
    before, rest, after = _split_kept(caption, options, kept)
    for size in range(len(rest) + 1) if options.tag_dropout else [len(rest)]:
        choose = permutations if options.shuffle_tags else combinations
        for tags in choose(rest, size):
            yield join_tags([*before, *tags, *after], options)
