"""Two folders of images as pairs of one caption and size: what sliders and preferences learn from."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import ConfigError, DataError
from sfumato.utils.formatting import format_list, pluralize

if TYPE_CHECKING:
    from sfumato.data import Dataset, Example, ExampleSet

Pair = tuple["Example", "Example"]
_STEPS = 100
"""Of which the last is asked what a prompt says there, whose words change between the steps."""


def pair_folders(more: ExampleSet, less: ExampleSet) -> tuple[ExampleSet, ExampleSet]:
    """Two folders' images as pairs: those of one name, with the caption that the first has.

    Raises DataError for an image without a partner, two of one name, or partners of different sizes.
    """
    named = []
    for examples in (more, less):
        by_name = {example.path.stem: example for example in examples}
        if len(by_name) < len(examples):
            twice, _ = Counter(example.path.stem for example in examples).most_common(1)[0]
            raise DataError(f"{examples[0].path.parent}: several images are named {twice}; a pair has one each.")
        named.append(by_name)
    if alone := sorted(named[0].keys() ^ named[1].keys()):
        here, there = (more, less) if alone[0] in named[0] else (less, more)
        raise DataError(
            f"{format_list(alone)} of {here[0].path.parent} has no image of the same name in "
            f"{there[0].path.parent}; wanted "
            "pairs. Add its partner, or leave it out."
        )
    return _as_sets([(example, named[1][name]) for name, example in named[0].items()], more, less)


def _as_sets(pairs: Sequence[Pair], more: ExampleSet, less: ExampleSet) -> tuple[ExampleSet, ExampleSet]:
    """The first and the second of each pair, which have the captions of the first. Raises DataError for two sizes."""
    from sfumato.data.images import upright_size

    for one, other in pairs:
        first, second = (upright_size(each.path) for each in (one, other))
        if first != second:
            raise DataError(
                f"{one.path.stem}: {'x'.join(map(str, first))} pixels in {one.path.parent} and "
                f"{'x'.join(map(str, second))} in {other.path.parent}; the images of a pair must have the same size."
            )
    partners = tuple(
        dataclasses.replace(other, caption=one.caption, further=one.further, kept_tags=one.kept_tags)
        for one, other in pairs
    )
    return (
        dataclasses.replace(more, examples=tuple(one for one, _ in pairs)),
        dataclasses.replace(less, examples=partners),
    )


def prepare_sets(sets: Sequence[ExampleSet], prepare: Callable[..., Dataset]) -> list[Dataset]:
    """The images, or both images of pairs, ready to be learned from. prepare: `prepare_as` of the options.

    Partners come in the steps of the first images, with their captions: what is to be said of the steps is said once,
    and the captions are embedded once.
    """
    found = [prepare(sets[0])]
    for each in sets[1:]:
        found.append(prepare(each, will_draw=None, embed_text=False))
        found[-1].share_embeddings(found[0])
    return found


@dataclass(frozen=True)
class CaptionedFolder:
    """A folder's images with what is known of each without looking at it.

    texts: by path, the caption before the template, or else the prompt. prompts: by path, the prompt that an image was
    generated with, by the settings in its file; empty where there is none.
    """

    examples: ExampleSet
    texts: dict[Path, str]
    prompts: dict[Path, str]


def read_captioned_folder(folder: Path, template: str | None) -> CaptionedFolder:
    """A folder's images; those without a caption have the prompt in their settings for one.

    template: as of `data.read_folder`. Raises as that does.
    """
    from sfumato.data.folder import make_examples
    from sfumato.data.listing import Caption, list_folder

    listing = list_folder(folder)
    prompts = {found.path: prompt_of(found.path) for found in listing.pictures}
    known = tuple(
        found
        if found.caption.text or found.caption.error
        else dataclasses.replace(found, caption=Caption(prompts[found.path], "settings"))
        for found in listing.pictures
    )
    listing = dataclasses.replace(listing, pictures=known)
    examples = make_examples(listing, template=template, trigger=None, mask="none", skip_bad=None)
    return CaptionedFolder(examples, {found.path: _one_line(found.caption.text) for found in known}, prompts)


def prompt_of(path: Path) -> str:
    """The prompt in an image's settings, of sfumato, A1111, Forge, ComfyUI or InvokeAI, as a caption: without weights,
    brackets and tags of adapters, and of words that change between the steps the last. Empty for an image without any.
    """
    from sfumato.adapters.prompt_tags import split_tags
    from sfumato.generation.metadata.png_info import read_picture_info
    from sfumato.generation.metadata.redraw import redraw
    from sfumato.models.prompts.editing import prompt_stages
    from sfumato.models.prompts.syntax import parse_prompt_attention

    try:
        own = read_picture_info(path).own or {}
        if isinstance(said := own.get("prompt"), str) and own.get("prompt_syntax", "plain") == "plain":
            return _one_line(said)
        said = redraw(path).parameters.prompt
    except DataError:
        return ""
    with suppress(ConfigError):
        _, said = prompt_stages(split_tags(said).prompt, _STEPS)[-1]
        said = "".join(text for text, _ in parse_prompt_attention(said))
    return _one_line(said)


def preference_pairs(preferred: CaptionedFolder, rejected: CaptionedFolder) -> tuple[ExampleSet, ExampleSet]:
    """Preferred and rejected images as pairs: those of one name, then those of one text and size.

    Of one text each image comes in one pair or more: three preferred and five rejected ones are five pairs. Images of
    one name are no pair where their settings have different prompts, as the first images of two calls of `generate`.
    The first set's notes tell how many pairs were found and what is left out. Raises DataError where there is none, and
    for a pair by name of two sizes.
    """
    pairs = list(_by_name(preferred, rejected))
    named = len(pairs)
    taken = {each.path for pair in pairs for each in pair}
    pairs += _by_text(preferred, rejected, taken)
    folders = [told.examples[0].path.parent for told in (preferred, rejected)]
    if not pairs:
        counted = [pluralize(len(told.examples), "image") for told in (preferred, rejected)]
        raise DataError(
            f"{folders[0]} and {folders[1]}: no pair among {counted[0]} and {counted[1]}; wanted the same file name in "
            "both, or the same caption or prompt, by a .txt beside each or by the settings that generate writes."
        )
    more, less = _as_sets(pairs, preferred.examples, rejected.examples)
    note = f"{pluralize(len(pairs), 'pair')}: {named} by file name, {len(pairs) - named} by prompt"
    used = {each.path for pair in pairs for each in pair}
    if left := [each.path.name for told in (preferred, rejected) for each in told.examples if each.path not in used]:
        note += f"; without a partner, and left out: {pluralize(len(left), 'image')} ({format_list(left)})"
    return dataclasses.replace(more, notes=(note, *more.notes)), less


def _by_name(preferred: CaptionedFolder, rejected: CaptionedFolder) -> Iterable[Pair]:
    counts = [Counter(each.path.stem for each in told.examples) for told in (preferred, rejected)]
    others = {each.path.stem: each for each in rejected.examples}
    for one in preferred.examples:
        if any(count[one.path.stem] != 1 for count in counts):
            continue
        other = others[one.path.stem]
        prompts = {preferred.prompts[one.path], rejected.prompts[other.path]} - {""}
        if len(prompts) < 2:
            yield one, other


def _by_text(preferred: CaptionedFolder, rejected: CaptionedFolder, taken: set[Path]) -> Iterable[Pair]:
    from sfumato.data.images import upright_size

    groups: dict[tuple[str, tuple[int, int]], tuple[list[Example], list[Example]]] = defaultdict(lambda: ([], []))
    for place, told in enumerate((preferred, rejected)):
        for example in told.examples:
            if example.path not in taken and (text := told.texts[example.path]):
                groups[text, upright_size(example.path)][place].append(example)
    for ones, others in groups.values():
        if ones and others:
            for turn in range(max(len(ones), len(others))):
                yield ones[turn % len(ones)], others[turn % len(others)]


def _one_line(text: str) -> str:
    return " ".join(text.split())
