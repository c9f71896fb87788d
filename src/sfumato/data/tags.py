"""Captions that vary: tags in another order, tags left out; a pure function of (seed, step, place in the batch)."""

from collections.abc import Iterator
from itertools import combinations, permutations
from math import factorial, perm

from sfumato.data.options import Options


def split_caption_tags(caption: str, options: Options) -> tuple[list[str], list[str]]:
    """(tags that stay where they are, tags that vary)."""
    tags = [tag.strip() for tag in caption.split(options.separator.strip()) if tag.strip()]
    keep = options.keep_tags or 0
    return tags[:keep], tags[keep:]


def join_tags(tags: list[str], options: Options) -> str:
    """The tags as a caption."""
    return f"{options.separator.strip()} ".join(tags)


def vary(caption: str, options: Options, seed: int, step: int, place: int) -> str:
    """The caption as one sample has it; the caption itself where nothing varies."""
    if not options.varies_caption or not caption:
        return caption
    import torch

    from sfumato import randomness

    kept, rest = split_caption_tags(caption, options)
    if options.tag_dropout:
        draws = torch.rand(len(rest), generator=randomness.generator(seed, "tag dropout", step, place)).tolist()
        rest = [tag for tag, draw in zip(rest, draws, strict=True) if draw >= options.tag_dropout]
    if options.shuffle_tags:
        order = torch.randperm(len(rest), generator=randomness.generator(seed, "tag order", step, place)).tolist()
        rest = [rest[i] for i in order]
    return join_tags(kept + rest, options)


def count_forms(caption: str, options: Options) -> int:
    """How many captions `vary` can make of this one."""
    if not options.varies_caption or not caption:
        return 1
    count = len(split_caption_tags(caption, options)[1])
    if not options.tag_dropout:
        return factorial(count)
    return sum(perm(count, k) if options.shuffle_tags else perm(count, k) // factorial(k) for k in range(count + 1))


def forms(caption: str, options: Options) -> Iterator[str]:
    """Every caption that `vary` can make of this one; ask `count_forms` first."""
    if not options.varies_caption or not caption:
        yield caption
        return
    kept, rest = split_caption_tags(caption, options)
    for size in range(len(rest) + 1) if options.tag_dropout else [len(rest)]:
        choose = permutations if options.shuffle_tags else combinations
        for tags in choose(rest, size):
            yield join_tags([*kept, *tags], options)
